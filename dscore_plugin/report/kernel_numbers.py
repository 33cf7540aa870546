"""The numbers of a network that has lost kernels, counted twice: as it lies there, and what of it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscore_plugin.arguments import as_arguments
from dscore_plugin.costs import count
from dscore_plugin.report.numbers import file_sizes
from dscore_plugin.selection.coarse import used_convolutions
from dscore_plugin.surgery.kernels import compile_sparse


def kernel_numbers(
    model: nn.Module, example_inputs: Any, folder: str | Path | None = None
) -> dict[str, dict[str, float]]:
    """Count MACs and parameters, physical and effective, and the kernels behind them.

    *Physical* is what the tensors' shapes say: what a dense execution computes and holds in memory. *Effective* leaves
    out kernels that are zero as a whole: what a sparse execution computes, at best, and what an artifact stores apart
    from one bit for each kernel. The paper reports effective numbers.

    Args:
        model: the network, left as it is.
        example_inputs: a tensor of shape ``(B, C, H, W)``, or a tuple of inputs.
        folder: the network's artifact, for its size.

    Returns:
        ``{"macs": {"physical", "effective"}, "params": {...}, "kernels": {"physical", "effective", "sparsity"}}``, MACs
        of one image; with a folder also ``"bytes": {"physical", "stored"}``: of all tensors in memory, and of the
        artifact's weights on disk.
    """
    inputs = as_arguments(example_inputs)
    macs, params = count(model, inputs)
    lost_macs = lost_params = kernels = live = 0
    for convolution in used_convolutions(model, inputs):
        weight = convolution.weight.detach()
        alive = int(weight.flatten(2).ne(0).any(dim=2).sum())
        lost = (convolution.kernels - alive) * weight[0, 0].numel()
        lost_params += lost
        lost_macs += lost * convolution.positions
        kernels, live = kernels + convolution.kernels, live + alive
    numbers: dict[str, dict[str, float]] = {
        "macs": {"physical": macs, "effective": macs - lost_macs},
        "params": {"physical": params, "effective": params - lost_params},
        "kernels": {"physical": kernels, "effective": live, "sparsity": 1 - live / max(1, kernels)},
    }
    if folder is not None:
        numbers["bytes"] = {
            "physical": _bytes(model),
            "stored": file_sizes(folder)["model.safetensors"],
        }
    return numbers


def kernel_report(model: nn.Module, input_shape: Sequence[int]) -> dict[str, Any]:
    """Return all numbers of a network that has lost kernels: :func:`kernel_numbers`, and ``"latency_ms"``.

    Args:
        model: the network, left as it is.
        input_shape: shape of one input, ``(C, H, W)``.
    """
    example = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
    return {**kernel_numbers(model, example), "latency_ms": sparse_latency(model, input_shape)}


def sparse_latency(
    model: nn.Module, input_shape: Sequence[int], batch_sizes: Sequence[int] = (1, 64)
) -> dict[str, dict[str, Any]]:
    """Measure a network that has lost kernels, dense and on the backends that are fastest on this machine.

    Args:
        model: the network, left as it is.
        input_shape: shape of one input, ``(C, H, W)``.
        batch_sizes: images at a time; the backends are chosen for each.

    Returns:
        For each batch size, as a string: ``"dense"`` and ``"sparse"``, milliseconds for the whole batch, taken in
        turns, and ``"backends"``, the number of convolutions on each.
    """
    device = next(model.parameters()).device
    found = {}
    for batch in batch_sizes:
        compiled = compile_sparse(model, (torch.randn(batch, *input_shape, device=device),))
        backends = Counter(choice.backend for choice in compiled.choices.values())
        found[str(batch)] = {
            "dense": 1e3 * compiled.dense_seconds,
            "sparse": 1e3 * compiled.sparse_seconds,
            "backends": dict(sorted(backends.items())),
        }
    return found


def _bytes(model: nn.Module) -> int:
    """Return the bytes of a dense state dict: masks of kernels are not among them."""
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype is not torch.bool}
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
