"""Masks for layers that compute something over the channels they read: what they must leave out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin import masking
from dscore_plugin.groups import ChannelGroup, Role
from dscore_plugin.integrations.timm import adapters
from dscore_plugin.integrations.torch_pruning.channel_graph import ChannelGraph, channel_dim
from dscore_plugin.integrations.torch_pruning.graph import pruner_of

_STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
_OVER_CHANNELS = (nn.LayerNorm, nn.GroupNorm)


@contextmanager
def masked(model: nn.Module, silenced: Iterable[tuple[ChannelGroup, Iterable[int]]]) -> Iterator[None]:
    """Run a timm model as if the named units had been removed: :func:`dscore_plugin.masking.masked`, and more.

    Weight-standardised convolutions take mean and variance of each filter over the inputs that are left, and timm's
    own norms theirs over the channels that are left, each with the activation that comes with it.

    Args:
        model: the network that the groups were found in.
        silenced: pairs of a group and of its units to silence.
    """
    pairs = [(group, list(units)) for group, units in silenced]
    narrow = {}
    for (name, role), gone in _silenced(pairs).items():
        forward = form_of(model.get_submodule(name), role, gone)
        if forward is not None:
            narrow[model.get_submodule(name)] = forward
    with _biased(model), masking.masked(model, pairs), ExitStack() as stack:
        for layer, forward in narrow.items():
            stack.callback(_put_back, layer, layer.__dict__.get("forward"))
            layer.forward = forward
        yield


def form_of(layer: nn.Module, role: Role, gone: set[int]) -> Callable[[Tensor], Tensor] | None:
    """Return the forward of a layer of timm's that leaves channels out of what it computes over them.

    Args:
        layer: a norm or a consumer of the channels.
        role: which of the two.
        gone: the channels, counted in the layer.

    Returns:
        None for layers that need no form of their own.
    """
    if role is Role.NORM and _averages(layer):
        return _narrow_norm(layer, gone)
    if role is Role.CONSUMER and isinstance(layer, nn.Conv2d) and type(layer).__name__ in _STANDARDISED:
        return _narrow_convolution(layer, gone)
    return None


def _silenced(pairs: list[tuple[ChannelGroup, list[int]]]) -> dict[tuple[str, Role], set[int]]:
    found: dict[tuple[str, Role], set[int]] = {}
    for group, units in pairs:
        for member in group.roles(Role.CONSUMER, Role.NORM):
            gone = member.positions(torch.tensor(units, dtype=torch.int64)).tolist()
            found.setdefault((member.module, member.role), set()).update(gone)
    return found


def _averages(layer: nn.Module) -> bool:
    """Whether a layer of timm's computes something over its channels."""
    rule = adapters.rule_of(layer)
    own = isinstance(layer, _OVER_CHANNELS) and type(layer) not in _OVER_CHANNELS
    return own or bool(rule and rule.averages)


def _narrow_norm(layer: nn.Module, gone: set[int]) -> Callable[[Tensor], Tensor]:
    """Return a norm's forward that knows nothing of some of its channels, and gives zeros for them."""
    pruner = pruner_of(layer) or ChannelGraph().get_pruner_of_module(layer)
    width = pruner.get_out_channels(layer)
    kept = torch.tensor([c for c in range(width) if c not in gone])
    narrow = pruner.prune_out_channels(copy.deepcopy(layer), sorted(gone))

    def forward(x: Tensor) -> Tensor:
        dim = channel_dim(layer, x.shape) if pruner_of(layer) is None else pruner.dim
        return torch.zeros_like(x).index_copy(dim, kept, narrow(x.index_select(dim, kept)))

    return forward


def _narrow_convolution(layer: nn.Conv2d, gone: set[int]) -> Callable[[Tensor], Tensor]:
    """Return a convolution's forward that knows nothing of some of its inputs."""
    kept = torch.tensor([c for c in range(layer.in_channels) if c not in gone])
    narrow = copy.deepcopy(layer)
    narrow.weight = nn.Parameter(layer.weight.detach()[:, kept[: len(kept) // layer.groups]])
    narrow.in_channels = len(kept)
    return lambda x: narrow(x[:, kept])


@contextmanager
def _biased(model: nn.Module) -> Iterator[None]:
    """Give group norms without a bias one of zeros for the time being."""
    without: list[Any] = [
        m for m in model.modules() if isinstance(m, nn.GroupNorm) and m.weight is not None and m.bias is None
    ]
    for module in without:
        module.bias = nn.Parameter(torch.zeros(module.num_channels, device=module.weight.device))
    try:
        yield
    finally:
        for module in without:
            module.register_parameter("bias", None)


def _put_back(layer: nn.Module, forward: object) -> None:
    del layer.__dict__["forward"]
    if forward is not None:
        layer.__dict__["forward"] = forward
