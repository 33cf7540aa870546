"""Silence channels as their removal would: zero what their consumers receive, after norm and activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.groups import ChannelGroup, Role

Silenced = Iterable[tuple[ChannelGroup, Iterable[int]]]


@contextmanager
def masked(model: nn.Module, silenced: Silenced) -> Iterator[None]:
    """Run ``model`` as if the named units had been removed; on exit it is as before, come what may.

    Zeroing a filter is not its removal: the batch norm behind it still emits its shift. What the consumers
    receive is zeroed instead. Norms that average over channels (layer norm, group norm) leave the silenced ones
    out of their statistics, as they would after removal. Gradients pass, so one can train under the mask.

    Args:
        model: the network that the groups were found in.
        silenced: pairs of a group and of its units to silence.
    """
    keep = _keep_masks(silenced)
    with ExitStack() as stack:
        for (name, role), mask in keep.items():
            module = model.get_submodule(name)
            mask = mask.to(next((p.device for p in module.parameters()), torch.device("cpu")))
            if role is Role.CONSUMER:
                stack.callback(module.register_forward_pre_hook(_silence_input(mask)).remove)
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                _replace_forward(stack, module, mask)
        yield


def _keep_masks(silenced: Silenced) -> dict[tuple[str, Role], Tensor]:
    """Return, for each consumer and norm that a unit reaches, 1 for the channels that stay and 0 for the others."""
    keep: dict[tuple[str, Role], Tensor] = {}
    for group, units in silenced:
        gone = torch.as_tensor(list(units), dtype=torch.int64)
        for member in group.roles(Role.CONSUMER, Role.NORM):
            mask = keep.setdefault((member.module, member.role), torch.ones(member.width))
            mask[member.positions(gone)] = 0
    return keep


def _silence_input(mask: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def silence(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        return (x * _along_channels(mask.to(x.dtype), x, module), *rest)

    return silence


def _along_channels(mask: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    """Shape a mask so that it multiplies the channels of ``x``: the last dimension for linear layers, else dim 1."""
    return mask if isinstance(module, nn.Linear) else mask.view(-1, *[1] * (x.ndim - 2))


def _replace_forward(stack: ExitStack, module: nn.LayerNorm | nn.GroupNorm, mask: Tensor) -> None:
    def forward(x: Tensor) -> Tensor:
        if isinstance(module, nn.LayerNorm):
            return _masked_layer_norm(module, x, mask.to(x.dtype))
        return _masked_group_norm(module, x, mask.to(x.dtype))

    stack.callback(_restore_forward, module, module.__dict__.get("forward"))
    module.forward = forward  # type: ignore[method-assign,assignment]


def _restore_forward(module: nn.Module, own: Any) -> None:
    del module.__dict__["forward"]
    if own is not None:  # some other tool has wrapped the module
        module.__dict__["forward"] = own


def _masked_layer_norm(module: nn.LayerNorm, x: Tensor, mask: Tensor) -> Tensor:
    # timm's and torchvision's LayerNorm2d normalise over dim 1, which may be as long as the last one
    channels_first = x.shape[-1] != len(mask) or (x.ndim == 4 and "2d" in type(module).__name__)
    rows = x.movedim(1, -1) if channels_first else x
    normal = _normalise(rows, mask, mask.sum(), module.eps, dim=-1)
    out = normal if module.weight is None else normal * module.weight
    out = out if module.bias is None else out + module.bias
    return out.movedim(-1, 1) if channels_first else out


def _masked_group_norm(module: nn.GroupNorm, x: Tensor, mask: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    grouped = x.reshape(len(x), module.num_groups, -1)
    mask = mask.view(shape).expand_as(x[:1]).reshape(1, module.num_groups, -1)
    normal = _normalise(grouped, mask, mask.sum(-1, keepdim=True), module.eps, dim=-1).reshape(x.shape)
    return normal if module.weight is None else normal * module.weight.view(shape) + module.bias.view(shape)


def _normalise(x: Tensor, mask: Tensor, count: Tensor, eps: float, dim: int) -> Tensor:
    mean = (x * mask).sum(dim, keepdim=True) / count
    variance = ((x - mean).square() * mask).sum(dim, keepdim=True) / count
    return (x - mean) * torch.rsqrt(variance + eps)
