"""The numbers of a network: MACs, parameters, latency, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from dscore_plugin.modes import in_eval_mode

_SPREAD = 0.1  # measure on until the interquartile range is below this part of the median
_PATIENCE = 4  # but no longer than this many times the least time


def latency(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_sizes: Sequence[int] = (1, 64),
    min_run_time: float = 0.5,
) -> dict[str, dict[str, float]]:
    """Measure how long the network takes for one batch, in eval and inference mode, where it is.

    Args:
        model: any network that takes one tensor; its mode is restored.
        input_shape: shape of one input, ``(C, H, W)``.
        batch_sizes: images at a time.
        min_run_time: seconds to measure at least, for each batch size; up to four times as long where the
            measurements scatter.

    Returns:
        For each batch size, as a string, the ``"median"`` and the interquartile range ``"iqr"`` in
        milliseconds for the whole batch.
    """
    return {
        str(batch): call_latency(model, (_images(model, (batch, *input_shape)),), min_run_time)
        for batch in batch_sizes
    }


def call_latency(model: nn.Module, inputs: tuple[Any, ...], min_run_time: float = 0.5) -> dict[str, float]:
    """Measure how long one call of the network takes, as :func:`latency` does, whatever its arguments are."""
    timer = Timer(
        "model(*inputs)", globals={"model": model, "inputs": inputs}, num_threads=torch.get_num_threads()
    )
    with in_eval_mode(model), torch.inference_mode():
        measured = timer.adaptive_autorange(
            _SPREAD, min_run_time=min_run_time, max_run_time=_PATIENCE * min_run_time
        )
    return {"median": 1e3 * measured.median, "iqr": 1e3 * measured.iqr}


def file_sizes(folder: str | Path) -> dict[str, int]:
    """Return the size in bytes of each file in a folder, by name."""
    return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()}


def weight_bytes(model: nn.Module) -> int:
    """Return how many bytes the state dict takes, shared tensors once: nearly the size of its file."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    distinct = {
        (t.data_ptr() or id(t), t.shape): t for t in tensors
    }  # on the meta device no address tells them
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def _images(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
