"""Masks of single kernels: the connections of one input channel with one output channel.

The weight keeps its shape. A mask goes with the convolution, whose class becomes one that multiplies by it: the mask
stays through training, saving and loading, and no gradient reaches a removed kernel.

Source: Lin et al., *Synaptic Strength For Convolutional Neural Network*, arXiv 1811.02454, sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dscore_plugin.errors import PlanError, did_you_mean
from dscore_plugin.sharing import shared_parameters

MASK = "kernel_mask"


class KernelMasked(nn.Module):
    """What the masked convolutions add to theirs: a mask of kernels.

    The removed kernels are exact zeros in ``weight``, after construction, after loading a state dict, and after every
    ``eval()``. Where gradients may flow, or in training mode, the weight is multiplied by the mask as well.

    Attributes:
        kernel_mask: False for the removed kernels, bool, shape ``(out, in / groups)``; part of the state dict.
    """

    kernel_mask: Tensor
    weight: Tensor

    def masked_weight(self) -> Tensor:
        """Return the weight with zeros for the removed kernels; gradients reach the others only."""
        return self.weight * _over(self.kernel_mask, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the kernels that are left."""
        weight = self.masked_weight() if self.training or torch.is_grad_enabled() else self.weight
        convolved: Tensor = self._conv_forward(x, weight, self.bias)  # type: ignore[operator]
        return convolved

    def train(self, mode: bool = True) -> Any:
        """Set the mode; evaluation begins with exact zeros in the removed kernels, whatever an optimiser did."""
        if not mode:
            self._write_zeros()
        return super().train(mode)

    @torch.no_grad()
    def _write_zeros(self) -> None:
        if not self.weight.is_meta and bool((self.weight * ~_over(self.kernel_mask, self.weight)).any()):
            self.weight.mul_(_over(self.kernel_mask, self.weight))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._write_zeros()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, Tensor) and value.shape[:2] != self.kernel_mask.shape:
            # DepGraph has removed channels; the removed kernels of those that are left are still zeros
            self.kernel_mask = value.detach().flatten(2).ne(0).any(dim=2)

    def extra_repr(self) -> str:
        """Add the number of kernels that are left to the convolution's description."""
        left, all_of_them = int(self.kernel_mask.sum()), self.kernel_mask.numel()
        return f"{super().extra_repr()}, kernels={left} of {all_of_them}"


class KernelMaskedConv1d(KernelMasked, nn.Conv1d):
    """A convolution with removed kernels."""


class KernelMaskedConv2d(KernelMasked, nn.Conv2d):
    """A convolution with removed kernels."""


class KernelMaskedConv3d(KernelMasked, nn.Conv3d):
    """A convolution with removed kernels."""


_MASKED: dict[type[nn.Module], type[KernelMasked]] = {
    nn.Conv1d: KernelMaskedConv1d,
    nn.Conv2d: KernelMaskedConv2d,
    nn.Conv3d: KernelMaskedConv3d,
}
_DENSE: dict[type[nn.Module], type[nn.Module]] = {masked: dense for dense, masked in _MASKED.items()}


def prune_kernels(model: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """Remove kernels, in place: their weights become zero for good.

    Nothing is computed: the model may lie on the meta device. Weights are replaced, not written into, so make the
    optimiser afterwards. Kernels that had been removed before stay removed.

    Args:
        model: the network.
        keep: for convolutions, by qualified name, True for the kernels that stay: bool, shape ``(out, in / groups)``.

    Returns:
        ``model``.

    Raises:
        PlanError: if a name is no convolution of torch's own, its weight is another layer's, too, or a mask has
            another shape or type; the network is then as it was.
    """
    modules = {name: find_convolution(model, name) for name in keep}
    shared = shared_parameters(model)
    for name, module in modules.items():
        _check_mask(name, module, keep[name])
        _check_alone(name, shared)
    for name, module in modules.items():
        _put_mask(module, keep[name])
    return model


def kernel_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a network, by convolution: True for the kernels that are left."""
    return {name: m.kernel_mask for name, m in model.named_modules() if isinstance(m, KernelMasked)}


def can_be_masked(module: nn.Module) -> bool:
    """Whether single kernels can leave a module: torch's own convolutions, masked or not."""
    return type(module) in _MASKED or type(module) in _DENSE


def dense_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has, or had before it lost kernels."""
    return _DENSE.get(type(module), type(module))


def remove_masks(model: nn.Module) -> nn.Module:
    """Make the masked convolutions plain ones again, in place; the removed kernels are zeros that can be trained."""
    for module in model.modules():
        if isinstance(module, KernelMasked):
            module._write_zeros()
            del module._buffers[MASK]
            module.__class__ = dense_class(module)  # type: ignore[assignment]
    return model


def find_convolution(model: nn.Module, name: str) -> nn.Module:
    """Return a convolution that kernels can leave; raise PlanError if it is none."""
    found = dict(model.named_modules())
    if name not in found:
        raise PlanError(
            f"the network has no layer {name!r}{did_you_mean(name, found) or '; make a new plan'}"
        )
    module = found[name]
    if not can_be_masked(module):
        raise PlanError(
            f"{name!r} is a {type(module).__name__}; kernels leave torch's Conv1d, Conv2d and Conv3d only"
        )
    if parametrize.is_parametrized(module, "weight"):
        raise PlanError(f"{name!r} has a parametrised weight; remove the parametrisation before its kernels")
    return module


def _check_mask(name: str, module: nn.Module, keep: Tensor) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    shape = tuple(weight.shape[:2])
    if keep.dtype is not torch.bool or tuple(keep.shape) != shape:
        raise PlanError(
            f"the mask of {name!r} is {keep.dtype} of shape {tuple(keep.shape)}; expected torch.bool of shape {shape}"
        )


def _check_alone(name: str, shared: Mapping[str, str]) -> None:
    other = shared.get(f"{name}.weight")
    if other is not None:
        raise PlanError(
            f"the weight of {name!r} is {other!r}, too; leave {name!r} out of the plan, or give it a weight of its own"
        )


@torch.no_grad()
def _put_mask(module: nn.Module, keep: Tensor) -> None:
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    keep = keep.to(weight.device, copy=True)
    if isinstance(module, KernelMasked):
        keep &= module.kernel_mask
    else:
        module.__class__ = _MASKED[type(module)]
    module.register_buffer(MASK, keep)
    module.weight = nn.Parameter(weight * _over(keep, weight), weight.requires_grad)


def _over(mask: Tensor, weight: Tensor) -> Tensor:
    """Shape a mask of kernels so that it multiplies the weight."""
    return mask.view(*mask.shape, *[1] * (weight.ndim - 2))
