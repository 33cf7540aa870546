"""What an artifact says of removed layers and kernels, and how it stores a convolution that has lost kernels.

The field ``surgery`` lists what was done to the dense model, in this order:

- ``{"type": "layers", "layers": [names of residual branches]}``: done before anything is narrowed;
- ``{"type": "kernels", "layers": {convolution: shape of its weight}}``: the weight is stored as
  ``NAME.weight.kernels``, the kernels that are left, one after the other, and ``NAME.weight.kernel_bits``, one bit for
  each kernel of the layer, row by row, the lowest bit first. Thus the file shrinks with the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.artifact.fit import Stored
from dscore_plugin.artifact.structure import WEIGHTS
from dscore_plugin.errors import ArtifactError, PlanError
from dscore_plugin.surgery.kernel_masks import can_be_masked, kernel_masks
from dscore_plugin.surgery.layers import remove_branches, removed_branches

Surgery = list[dict[str, Any]]
_KERNELS, _BITS = "weight.kernels", "weight.kernel_bits"


def describe_surgery(model: nn.Module) -> Surgery:
    """List which layers and kernels a model has lost."""
    layers = removed_branches(model)
    kernels = {name: list(model.get_parameter(f"{name}.weight").shape) for name in kernel_masks(model)}
    listed: Surgery = [{"type": "layers", "layers": layers}] if layers else []
    return listed + ([{"type": "kernels", "layers": kernels}] if kernels else [])


def remove_layers(model: nn.Module, surgery: Surgery) -> None:
    """Remove from the dense model, in place, the layers that the pruned one has lost, or raise ArtifactError."""
    for entry in surgery:
        if entry["type"] == "layers":
            try:
                remove_branches(model, entry["layers"])
            except PlanError as error:
                raise ArtifactError(f"the artifact's layers cannot be removed: {error}") from error


def without_masks(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict as the dense architecture names it: the masks of kernels left out."""
    masked = {id(mask) for mask in kernel_masks(model).values()}
    names = {n for n, b in model.named_buffers(remove_duplicate=False) if id(b) in masked}
    return {name: tensor for name, tensor in state.items() if name not in names}


def compress(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the weights of convolutions that have lost kernels by the kernels that are left, and their places."""
    compressed = dict(tensors)
    for name, mask in kernel_masks(model).items():
        weight = compressed.pop(f"{name}.weight").detach()
        compressed[f"{name}.{_KERNELS}"] = weight[mask]
        compressed[f"{name}.{_BITS}"] = _to_bits(mask)
    return compressed


def expanded_shapes(surgery: Surgery, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Translate what the file's header says of compressed weights into what it means, checking both.

    Args:
        surgery: the field of the structure file.
        stored: what the header says, by name.

    Returns:
        The same by the names of the dense architecture.

    Raises:
        ArtifactError: if a compressed weight is missing or contradicts itself.
    """
    expanded = dict(stored)
    for name, shape in _compressed(surgery):
        kernels, bits = expanded.pop(f"{name}.{_KERNELS}", None), expanded.pop(f"{name}.{_BITS}", None)
        if kernels is None or bits is None or f"{name}.weight" in expanded:
            raise ArtifactError(
                f"the kernels of {name!r} are missing in {WEIGHTS}, or its whole weight is there, too; save it again"
            )
        every = shape[0] * shape[1]
        if kernels.shape[1:] != tuple(shape[2:]) or bits != ((-(-every // 8),), "U8"):
            raise ArtifactError(f"the kernels of {name!r} in {WEIGHTS} do not make a weight of shape {shape}")
        expanded[f"{name}.weight"] = Stored(tuple(shape), kernels.dtype)
    return expanded


def expand(surgery: Surgery, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Turn compressed weights into whole ones.

    Returns:
        The tensors by the names of the dense architecture, and the masks by convolution.

    Raises:
        ArtifactError: if there are not as many kernels as places.
    """
    expanded, masks = dict(tensors), {}
    for name, shape in _compressed(surgery):
        kernels, bits = expanded.pop(f"{name}.{_KERNELS}"), expanded.pop(f"{name}.{_BITS}")
        mask = _from_bits(bits, shape[0] * shape[1])
        if mask is None or int(mask.sum()) != len(kernels):
            raise ArtifactError(f"{WEIGHTS} holds {len(kernels)} kernels of {name!r}, but not as many places")
        masks[name] = mask.view(shape[0], shape[1])
        weight = kernels.new_zeros(shape)
        weight[masks[name]] = kernels
        expanded[f"{name}.weight"] = weight
    return expanded, masks


def check_maskable(model: nn.Module, surgery: Surgery) -> None:
    """Refuse an artifact that removes kernels from what is no convolution."""
    modules = dict(model.named_modules())
    for name, _ in _compressed(surgery):
        if name not in modules or not can_be_masked(modules[name]):
            raise ArtifactError(f"kernels cannot leave {name!r}; expected a convolution of the dense model")


def _compressed(surgery: Surgery) -> Iterator[tuple[str, list[int]]]:
    for entry in surgery:
        if entry["type"] == "kernels":
            yield from entry["layers"].items()


def _to_bits(mask: Tensor) -> Tensor:
    flat = mask.detach().cpu().flatten().to(torch.uint8)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _from_bits(bits: Tensor, number: int) -> Tensor | None:
    """Return the first ``number`` bits as truths, or None if others are set."""
    flat = ((bits.view(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
    return None if flat[number:].any() else flat[:number]
