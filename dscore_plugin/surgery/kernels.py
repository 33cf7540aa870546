"""Single kernels that leave a network: masks that stay, a plan's removals, and execution that gains from it.

Source: Lin et al., *Synaptic Strength For Convolutional Neural Network*, arXiv 1811.02454, sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dscore_plugin.errors import PlanError
from dscore_plugin.rollback import check_runs, rolled_back_on_error
from dscore_plugin.surgery.kernel_masks import (
    KernelMasked,
    can_be_masked,
    dense_class,
    find_convolution,
    kernel_masks,
    prune_kernels,
    remove_masks,
)
from dscore_plugin.surgery.sparse_execution import compile_sparse

if TYPE_CHECKING:
    from dscore_plugin.plan import KernelRemoval

__all__ = [
    "KernelMasked",
    "can_be_masked",
    "carry_out",
    "compile_sparse",
    "dense_class",
    "kernel_masks",
    "prune_kernels",
    "remove_masks",
]


def carry_out(
    model: nn.Module, example_inputs: tuple[Any, ...], removals: Sequence[KernelRemoval]
) -> nn.Module:
    """Remove the kernels that a plan names, in place.

    Args:
        model: the network.
        example_inputs: the arguments of one forward pass, for the check at the end.
        removals: which kernels leave which convolution.

    Returns:
        ``model``, in eval mode.

    Raises:
        PlanError: if a removal does not fit the network.
        ModelError: if the network does not run afterwards; then it is as it was.
    """
    keep: dict[str, Tensor] = {}
    for removal in removals:
        if removal.layer in keep:
            raise PlanError(f"the plan names {removal.layer!r} twice; put all of its kernels into one entry")
        keep[removal.layer] = _keep_all_but(find_convolution(model, removal.layer), removal)
    with rolled_back_on_error(model), _classes_kept_on_error(model):
        check_runs(prune_kernels(model, keep), example_inputs, "kernels", "report the architecture")
    return model


@contextmanager
def _classes_kept_on_error(model: nn.Module) -> Iterator[None]:
    before = [(module, type(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind in before:
            module.__class__ = kind
        raise


def _keep_all_but(module: nn.Module, removal: KernelRemoval) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    keep = torch.ones(weight.shape[0] * weight.shape[1], dtype=torch.bool)
    places = torch.as_tensor(removal.kernels, dtype=torch.int64)
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(keep):
        raise PlanError(
            f"{removal.layer!r} has kernels 0..{len(keep) - 1}; the plan names "
            f"{int(places.min())}..{int(places.max())}"
        )
    keep[places] = False
    return keep.view(weight.shape[:2])
