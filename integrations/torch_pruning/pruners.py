"""What takes channels out of layers where Torch-Pruning's functions go wrong or do not know the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch_pruning.pruner import function

from dscore_plugin.integrations.timm import adapters


class GroupNormPruner(function.GroupNormPruner):
    """Torch-Pruning's, for group norms without a bias, too."""

    def prune_out_channels(self, layer: nn.GroupNorm, idxs: Sequence[int]) -> nn.GroupNorm:
        """Take channels out of a norm."""
        layer.num_channels = _narrow(self, layer, layer.num_channels, idxs)
        return layer

    prune_in_channels = prune_out_channels


class LayerNormPruner(function.LayernormPruner):
    """Torch-Pruning's keeps the weights in the order of a Python set, which for wide layers is not theirs."""

    def prune_out_channels(self, layer: nn.LayerNorm, idxs: Sequence[int]) -> nn.LayerNorm:
        """Take channels out of a norm over one dimension."""
        layer.normalized_shape = (_narrow(self, layer, layer.normalized_shape[-1], idxs),)
        return layer

    prune_in_channels = prune_out_channels


class ChannelwisePruner(function.BasePruningFunc):
    """Prunes a layer that gives out the channels it reads.

    Args:
        dim: of its input, the dimension of the channels.
        along: its parameters and buffers that run along the channels.
        widths: its attributes that hold the number of channels, plain or in a tuple.
    """

    def __init__(self, dim: int, along: Sequence[str], widths: Sequence[str]) -> None:
        super().__init__(pruning_dim=dim)
        self.dim, self.along, self.widths = dim, along, widths

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Take channels out of all that runs along them."""
        gone, width = set(idxs), self.get_out_channels(layer)
        kept = [channel for channel in range(width) if channel not in gone]
        for name in self.along:
            tensor = getattr(layer, name, None)
            if isinstance(tensor, nn.Parameter):
                setattr(layer, name, self._prune_parameter_and_grad(tensor, kept, 0))
            elif tensor is not None:
                setattr(layer, name, tensor[kept])
        for name in self.widths:
            setattr(layer, name, (len(kept),) if isinstance(getattr(layer, name), tuple) else len(kept))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        """Return the layer's width."""
        for name in self.along:
            if getattr(layer, name, None) is not None:
                return len(getattr(layer, name))
        width = getattr(layer, self.widths[0])
        return int(width[-1] if isinstance(width, tuple) else width)

    get_in_channels = get_out_channels


def pruner_of(module: nn.Module) -> ChannelwisePruner | None:
    """Return what prunes a layer of timm's that DepGraph does not know."""
    rule, dim = adapters.rule_of(module), adapters.channel_dim(module)
    return None if rule is None or dim is None else ChannelwisePruner(dim, rule.along, rule.widths)


def _narrow(pruner: Any, layer: nn.Module, width: int, idxs: Sequence[int]) -> int:
    gone = set(idxs)
    kept = [channel for channel in range(width) if channel not in gone]
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            setattr(layer, name, pruner._prune_parameter_and_grad(getattr(layer, name), kept, 0))
    return len(kept)
