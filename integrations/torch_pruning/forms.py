"""Layers of timm's that compute something over the channels they read: what masked channels must be left out of.

Weight-standardised convolutions take mean and variance of each filter over the inputs that are left, and timm's own
norms theirs over the channels that are left, each with the activation that comes with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dscore_plugin.groups import Role
from dscore_plugin.integrations.timm import adapters
from dscore_plugin.integrations.torch_pruning.channel_graph import ChannelGraph, channel_dim
from dscore_plugin.integrations.torch_pruning.pruners import pruner_of

_STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
_OVER_CHANNELS = (nn.LayerNorm, nn.GroupNorm)


def form_of(layer: nn.Module, role: Role, mask: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the forward of a layer that leaves channels out of what it computes over them.

    Args:
        layer: a norm or a consumer of the channels.
        role: which of the two.
        mask: 1 for channels that stay, 0 for the others, shape ``(width of the layer,)``.

    Returns:
        None for layers that need no form of their own.
    """
    if role is Role.NORM and _averages(layer):
        return _narrow_norm(layer, mask)
    if role is Role.CONSUMER and isinstance(layer, nn.Conv2d) and type(layer).__name__ in _STANDARDISED:
        return _narrow_convolution(layer, mask)
    return None


def _averages(layer: nn.Module) -> bool:
    """Whether a layer of timm's computes something over its channels."""
    rule = adapters.rule_of(layer)
    own = isinstance(layer, _OVER_CHANNELS) and type(layer) not in _OVER_CHANNELS
    return own or bool(rule and rule.averages)


def _narrow_norm(layer: nn.Module, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a norm's forward that knows nothing of some of its channels, and gives zeros for them."""
    own = pruner_of(layer)
    kept, gone = mask.nonzero().flatten(), (mask == 0).nonzero().flatten().tolist()
    narrow = (own or ChannelGraph().get_pruner_of_module(layer)).prune_out_channels(
        copy.deepcopy(layer), gone
    )

    def forward(x: Tensor) -> Tensor:
        dim = channel_dim(layer, x.shape) if own is None else own.dim
        places = kept.to(x.device)
        return torch.zeros_like(x).index_copy(dim, places, narrow(x.index_select(dim, places)))

    return forward


def _narrow_convolution(layer: nn.Conv2d, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a convolution's forward that knows nothing of some of its inputs."""
    kept = mask.nonzero().flatten()
    narrow = copy.deepcopy(layer)
    narrow.weight = nn.Parameter(layer.weight.detach()[:, kept[: len(kept) // layer.groups]])
    narrow.in_channels = len(kept)
    return lambda x: narrow(x[:, kept.to(x.device)])
