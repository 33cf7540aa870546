"""Masks carried on to the consumers: what is trained under the mask is then what removal leaves.

NNI's mask silences the weight of a convolution alone; the batch norm behind it still emits its shift. Here the layers
that read a channel receive zeros for it as soon as every layer that produces it is masked there, and norms that
average over channels leave it out, as :func:`dscore_plugin.masking.masked` does. A layer masked whole cannot leave, and
its masks are not carried on. The masks are read from NNI's wrappers in every forward pass, so schedules, fused
compression and loaded states are followed. All of it comes and goes with the wrappers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from dscore_plugin.groups import ChannelGroup, Role
from dscore_plugin.integrations.nni.masks import LayerMask, silence
from dscore_plugin.masking import _along_channels, _masked_group_norm, _masked_layer_norm

Wrappers = Mapping[str, ModuleWrapper]
_LAST: weakref.WeakKeyDictionary[nn.Module, MaskExtension] = weakref.WeakKeyDictionary()


class ExtendingWrapper(ModuleWrapper):
    """NNI's wrapper, which brings its extension along and leaves nothing behind.

    NNI makes the wrappers itself; they become this class afterwards (:func:`extend`).

    Attributes:
        extension: of the pruner that the wrapper belongs to, or None.
    """

    extension: MaskExtension | None

    def wrap(self) -> None:
        """Put the wrapper on."""
        super().wrap()
        if self.extension is not None:
            self.extension.attach()

    def unwrap(self) -> None:
        """Take the wrapper off; NNI's own leaves ``forward`` among the module's attributes."""
        super().unwrap()
        drop_forward(self.module)
        if self.extension is not None:
            self.extension.detach()


class MaskExtension:
    """Zeros what the consumers of masked channels receive, while NNI's wrappers are on.

    Args:
        model: the network, without wrappers.
        groups: its channel groups.
        wrappers: those of the layers that may be masked.
    """

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup], wrappers: Wrappers) -> None:
        self._wrappers = dict(wrappers)
        self._handles: list[Any] = []
        self._inputs: dict[nn.Module, _InputSilencer] = {}
        self._norms: dict[nn.Module, _MaskedNorm] = {}
        for group in groups:
            state = _GroupState(group, self._wrappers)
            if state.wrappers and not group.protected:
                self._add(model, group, state)

    def _add(self, model: nn.Module, group: ChannelGroup, state: _GroupState) -> None:
        for member in group.roles(Role.CONSUMER, Role.NORM):
            module = model.get_submodule(member.module)
            keep: _Keep
            if member.role is Role.CONSUMER:
                keep = self._inputs.setdefault(module, _InputSilencer(member.width))
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                keep = self._norms.setdefault(module, _MaskedNorm(module, member.width))
            else:
                continue
            keep.sources.append((state, member.index, member.unit))

    def attach(self) -> None:
        """Set the hooks; nothing happens if they are set."""
        if self._handles:
            return
        self._handles = [module.register_forward_pre_hook(hook) for module, hook in self._inputs.items()]
        for module, norm in self._norms.items():
            norm.own = module.__dict__.get("forward")
            module.forward = norm

    def detach(self) -> None:
        """Remove the hooks; nothing happens if they are gone."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        for module, norm in self._norms.items():
            del module.__dict__["forward"]
            if norm.own is not None:
                module.__dict__["forward"] = norm.own
        self._handles = []

    def carried(self, masks: Mapping[str, Mapping[str, Tensor | None]]) -> bool:
        """Whether these are the masks that this extension has carried on."""
        for name, targets in masks.items():
            mask, given = getattr(self._wrappers.get(name), "weight_mask", None), targets.get("weight")
            if mask is None or given is None or not torch.equal(mask.cpu(), given.expand(mask.shape).cpu()):
                return False
        return True


class _GroupState:
    """The silenced units of a group, found anew whenever a mask has changed."""

    def __init__(self, group: ChannelGroup, wrappers: Wrappers) -> None:
        names = {m.module for m in group.roles(Role.PRODUCER, Role.DEPTHWISE, Role.CONSUMER)}
        self.wrappers = {
            name: wrappers[name] for name in sorted(names & wrappers.keys()) if _has_mask(wrappers[name])
        }
        self._group = group
        self._seen: Any = None
        self._silent = torch.zeros(group.units, dtype=torch.bool)

    def version(self) -> tuple[tuple[int, int], ...]:
        masks = [wrapper.weight_mask for wrapper in self.wrappers.values()]
        return tuple((id(mask), 0 if mask is None else mask._version) for mask in masks)

    def silent(self) -> Tensor:
        if (now := self.version()) != self._seen:
            self._silent, self._seen = silence(self._group, self._mask).units, now
        return self._silent

    def _mask(self, name: str) -> LayerMask | None:
        wrapper = self.wrappers.get(name)
        if wrapper is None or wrapper.weight_mask is None:
            return None
        return LayerMask.of(wrapper.module, wrapper.weight_mask)


class _Keep:
    """1 for the channels that a layer still receives and 0 for the others, as long as no mask changes."""

    def __init__(self, width: int) -> None:
        self.sources: list[tuple[_GroupState, Tensor, Tensor]] = []
        self._width = width
        self._seen: Any = None
        self._mask: Tensor | None = None

    def mask(self, like: Tensor) -> Tensor | None:
        """Return the mask, shape ``(width,)``, on the device and in the type of ``like``; None if all stay."""
        now = (*(state.version() for state, _, _ in self.sources), like.device, like.dtype)
        if now != self._seen:
            mask = torch.ones(self._width)
            for state, index, unit in self.sources:
                mask[index[state.silent()[unit]]] = 0
            self._mask = None if bool(mask.all()) else mask.to(like.device, like.dtype)
            self._seen = now
        return self._mask


class _InputSilencer(_Keep):
    """A forward pre-hook."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or (mask := self.mask(inputs[0])) is None:
            return None
        return (inputs[0] * _along_channels(mask, inputs[0], module), *inputs[1:])


class _MaskedNorm(_Keep):
    """The forward pass of a norm that averages over channels."""

    def __init__(self, module: nn.LayerNorm | nn.GroupNorm, width: int) -> None:
        super().__init__(width)
        self.module = module
        self.own: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        if (mask := self.mask(x)) is None:
            return (self.own or type(self.module).forward.__get__(self.module))(x)
        masked = _masked_layer_norm if isinstance(self.module, nn.LayerNorm) else _masked_group_norm
        return masked(self.module, x, mask)  # type: ignore[arg-type]


def extend(wrappers: Wrappers, extension: MaskExtension | None) -> None:
    """Make NNI's wrappers carry their masks on; None takes the extension of an earlier pruner away.

    Args:
        wrappers: of one network, none of them on.
        extension: theirs.
    """
    for wrapper in wrappers.values():
        if type(wrapper) in (ModuleWrapper, ExtendingWrapper):
            wrapper.__class__ = ExtendingWrapper
            wrapper.extension = extension


def remember(model: nn.Module, extension: MaskExtension | None) -> None:
    """Note whose masks were last carried on in a network."""
    _LAST.pop(model, None)
    if extension is not None:
        _LAST[model] = extension


def was_extended(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]]) -> bool:
    """Whether a network ran under exactly these masks, carried on to the consumers."""
    last = _LAST.get(model)
    return last is not None and last.carried(masks)


def drop_forward(module: nn.Module) -> None:
    """Remove a ``forward`` from the module's attributes that only repeats its class's."""
    own = module.__dict__.get("forward")
    if getattr(own, "__func__", None) is type(module).forward and getattr(own, "__self__", None) is module:
        del module.__dict__["forward"]


def _has_mask(wrapper: ModuleWrapper) -> bool:
    return "weight" in wrapper.pruning_target_spaces
