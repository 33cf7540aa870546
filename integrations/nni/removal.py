"""From NNI's masks to a smaller network: a Plan made of what they silence, and its removal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import PlanError
from dscore_plugin.groups import ChannelGroup, Role
from dscore_plugin.integrations.nni.extension import drop_forward, was_extended
from dscore_plugin.integrations.nni.masks import LayerMask, Silence, silence
from dscore_plugin.integrations.nni.pruners import refuse_wrapped
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.masking import _along_channels
from dscore_plugin.modes import in_eval_mode
from dscore_plugin.plan import ChannelRemoval, KernelRemoval, LayerRow, Plan, fingerprint
from dscore_plugin.rollback import rolled_back_on_error

Masks = Mapping[str, Mapping[str, "Tensor | None"]]
Say = Callable[[str], None]
_log = logging.getLogger("dscore_plugin.nni")
_AUDIBLE = 1e-5  # of the largest output of the layer that hears it


def speedup(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    masks: Masks | str | Path,
    *,
    extended: bool | None = None,
    say: Say = _log.warning,
) -> nn.Module:
    """Remove physically, in place, what NNI's masks silence; zero what they mask besides.

    A channel leaves where every layer that produces it is masked, or no layer that reads it does so any more. The
    result computes what the network computes under masks that are carried on to the consumers, as
    :class:`CriterionPruner` carries them. NNI's own pruners do not: for their masks, every layer whose masked
    channels were not silent is named, because accuracy under the mask is then not that of the result.

    Args:
        model: the network, without NNI's wrappers (call ``unwrap_model()`` on the pruner first).
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).
        masks: ``{layer: {"weight": mask, "bias": mask}}``, as ``compress()`` gives them, or a file of them.
        extended: whether the network ran under masks that were carried on; None finds out.
        say: takes a line for everything that could not be removed, and why, and for what was not silent.

    Returns:
        ``model``, in eval mode.

    Raises:
        PlanError: if the masks are those of another model.
        ModelError: if the network wears wrappers, cannot be traced, or does not run afterwards.
    """
    inputs, masks = as_arguments(example_inputs), _load(masks)
    refuse_wrapped(model)
    known = was_extended(model, masks) if extended is None else extended
    reading = _read(model, inputs, masks)
    for line in reading.lines:
        say(line)
    for module in model.modules():
        drop_forward(module)
    with rolled_back_on_error(model):
        _zero(model, masks)
        if not known:
            for line in _audible(model, inputs, reading):
                say(line)
        reading.channel_plan(fingerprint(model)).apply(model, inputs)
        kernels = reading.kernel_plan(model)
        if kernels.removals:
            kernels.apply(model, inputs)
    return model


def plan_from_masks(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...], masks: Masks | str | Path
) -> Plan:
    """Write down what NNI's masks silence as a plan; the network is not touched.

    Args:
        model: the network, without NNI's wrappers.
        example_inputs: the arguments of one forward pass.
        masks: as for :func:`speedup`.

    Returns:
        A plan of channels. Masks of single kernels make no part of it.

    Raises:
        PlanError: if the masks are those of another model.
        ModelError: if the network wears wrappers or cannot be traced.
    """
    refuse_wrapped(model)
    return _read(model, as_arguments(example_inputs), _load(masks)).channel_plan(fingerprint(model))


@dataclass
class _Reading:
    """What masks take from a network.

    Attributes:
        graph: the network's groups.
        layers: the mask of every masked layer.
        silent: groups and their silenced units.
        lines: what cannot be removed, and why.
    """

    graph: PruningGraph
    layers: dict[str, LayerMask]
    silent: list[tuple[ChannelGroup, tuple[int, ...]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def channel_plan(self, made_for: str) -> Plan:
        """Return the removal of the silenced units, for weights of a fingerprint."""
        table, counts = self.graph.costs, {group.name: len(units) for group, units in self.silent}
        left = table.cost(counts)
        rows = [
            LayerRow(g.name, g.channels, None, None, None, round(table.saving({}, g.name, len(units)).macs))
            for g, units in self.silent
        ]
        image = next((x for x in self.graph.example_inputs if isinstance(x, Tensor)), torch.empty(0))
        return Plan(
            made_for,
            tuple(image.shape[1:]),
            tuple(ChannelRemoval(group.name, group.root_channels(units)) for group, units in self.silent),
            tuple(rows),
            (round(table.dense.macs), round(left.macs)),
            (round(table.dense.params), round(left.params)),
            {"source": "NNI masks"},
        )

    def kernel_plan(self, model: nn.Module) -> Plan:
        """Return the removal of single kernels from the network that the removal of channels has left."""
        removals = []
        for name, mask in self.layers.items():
            module = model.get_submodule(name)
            outputs, inputs = self._left(name, Role.PRODUCER), self._left(name, Role.CONSUMER)
            kernels = mask.kernels[outputs][:, inputs] if _takes_kernels(mask, module) else torch.empty(0)
            if kernels.any():
                removals.append(KernelRemoval(name, tuple(kernels.flatten().nonzero().flatten().tolist())))
        image = next((x for x in self.graph.example_inputs if isinstance(x, Tensor)), torch.empty(0))
        made_by = {"source": "NNI masks"}
        return Plan(fingerprint(model), tuple(image.shape[1:]), tuple(removals), made_by=made_by)

    def _left(self, layer: str, role: Role) -> Tensor:
        """Return the positions of a layer that stay when the silenced units leave."""
        mask = self.layers[layer]
        stays = torch.ones(
            len(mask.outputs) if role is Role.PRODUCER else mask.kernels.shape[1], dtype=torch.bool
        )
        for group, units in self.silent:
            for member in group.roles(role):
                if member.module == layer:
                    stays[member.positions(torch.tensor(units)) % len(stays)] = False
        return stays.nonzero().flatten()


def _read(model: nn.Module, inputs: tuple[Any, ...], masks: Masks) -> _Reading:
    _check(model, masks)
    layers = {
        name: LayerMask.of(model.get_submodule(name), weight)
        for name, targets in masks.items()
        if (weight := targets.get("weight")) is not None and _is_layer(model.get_submodule(name))
    }
    reading = _Reading(PruningGraph(model, inputs), layers)
    for group in reading.graph.groups:
        _read_group(reading, group)
    reading.lines += _unread(model, reading, masks)
    return reading


def _read_group(reading: _Reading, group: ChannelGroup) -> None:
    if group.protected:
        return
    found = silence(group, reading.layers.get)
    if found.everything:
        reading.lines.append(
            f"all {group.channels} channels of {group.name!r} are masked and stay, zeroed; a layer needs one at least"
        )
        return
    reading.lines += _partly_masked(group, found)
    if bool(found.units.any()):
        reading.silent.append((group, tuple(found.units.nonzero().flatten().tolist())))


def _partly_masked(group: ChannelGroup, found: Silence) -> Iterator[str]:
    split = int((found.split & ~found.units).sum())
    shared = int((found.touched & ~found.units & ~found.split).sum())
    of = f"of the {group.units} {'channels' if group.division == 1 else f'sets of {group.division} channels'}"
    if split:
        yield (
            f"{split} {of} of {group.name!r} are masked in part and stay, zeroed: what leaves together must be masked "
            "together, as CriterionPruner does and NNI's own pruners do not"
        )
    if shared:
        names = [m.module for m in group.roles(Role.PRODUCER, Role.DEPTHWISE)]
        yield (
            f"{shared} {of} of {group.name!r} are masked in some of the layers that share them ({', '.join(names)}) "
            "and stay, zeroed; mask them alike with set_dependency_groups(), by output channels and one sparse_ratio"
        )


def _unread(model: nn.Module, reading: _Reading, masks: Masks) -> Iterator[str]:
    """Name the masks that no removal answers to."""
    free = {m.module for g in reading.graph.prunable for m in g.roles(Role.PRODUCER, Role.DEPTHWISE)}
    for name, mask in reading.layers.items():
        count = int(mask.outputs.sum())
        if count and name not in free:
            yield f"{count} masked channels of {name!r} stay, zeroed: {_reason(reading.graph, name)}"
        module = model.get_submodule(name)
        if mask.finer:
            yield f"the mask of {name!r} takes single weights, which stay as zeros: no smaller layer computes that"
        elif not _takes_kernels(mask, module) and _has_single_kernels(mask):
            yield f"single kernels of {name!r} are masked and stay, zeroed: it is no convolution without groups"
    for name, targets in masks.items():
        for target, given in targets.items():
            is_known = target in ("weight", "bias") and _is_layer(model.get_submodule(name))
            if given is not None and not is_known and not bool(given.bool().all()):
                yield f"the mask of {name}.{target} is not carried out; mask the layer in front instead"


def _reason(graph: PruningGraph, name: str) -> str:
    for group in graph.groups:
        if group.protected and any(member.module == name for member in group.members):
            return group.protected
    return "DepGraph does not see the layer"


def _takes_kernels(mask: LayerMask, module: nn.Module) -> bool:
    plain = isinstance(module, _ConvNd) and not module.transposed and module.groups == 1
    return plain and _has_single_kernels(mask)


def _has_single_kernels(mask: LayerMask) -> bool:
    rest = mask.kernels[~mask.outputs]
    read = ~rest.all(dim=0) if len(rest) else torch.zeros(0, dtype=torch.bool)
    return bool(len(rest) and rest[:, read].any())


def _zero(model: nn.Module, masks: Masks) -> None:
    """Write the masks into the weights: what cannot be removed stays as zeros, as it was under the mask."""
    for name, targets in masks.items():
        module = model.get_submodule(name)
        for target, mask in targets.items():
            value = getattr(module, target, None)
            if mask is not None and isinstance(value, nn.Parameter):
                masked = value.detach() * mask.to(value.device, value.dtype)
                setattr(module, target, nn.Parameter(masked, requires_grad=value.requires_grad))


def _audible(model: nn.Module, inputs: tuple[Any, ...], reading: _Reading) -> Iterator[str]:
    """Run the masked network on noise, and name the groups whose silenced channels can still be heard."""
    noise = tuple(
        torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in inputs
    )
    heard: dict[str, tuple[str, float]] = {}
    with in_eval_mode(model), ExitStack() as stack, torch.no_grad():
        for group, units in reading.silent:
            for member in group.roles(Role.CONSUMER, Role.NORM):
                module = model.get_submodule(member.module)
                if member.role is Role.CONSUMER:
                    keep = torch.ones(member.width)
                    keep[member.positions(torch.tensor(units))] = 0
                    listener = _Listener(heard, group.name, member.module, keep)
                    stack.callback(module.register_forward_hook(listener).remove)
                elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                    heard[group.name] = (f"{member.module!r} averages over them", 0.0)
        model(*noise)
    for name, (how, _) in heard.items():
        yield (
            f"the masked channels of {name!r} were not silent: {how}, which removal takes away; "
            "train under CriterionPruner's masks instead"
        )


@dataclass
class _Listener:
    """A forward hook that notes what masked channels change in the output of the layer that reads them."""

    heard: dict[str, tuple[str, float]]
    group: str
    consumer: str
    keep: Tensor

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest = inputs
        without = module.forward(x * _along_channels(self.keep.to(x), x, module), *rest)
        change = float((without - output).abs().max())
        if change > max(_AUDIBLE * float(output.abs().max()), self.heard.get(self.group, ("", 0.0))[1]):
            how = f"they change what {self.consumer!r} computes by up to {change:.2g} (a bias, or the norm behind)"
            self.heard[self.group] = (how, change)


def _load(masks: Masks | str | Path) -> Masks:
    if isinstance(masks, str | Path):
        try:
            masks = torch.load(masks, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PlanError(
                f"no masks can be read from {masks}: {reason}; save them with torch.save"
            ) from error
    ok = isinstance(masks, Mapping) and all(
        isinstance(targets, Mapping) and all(m is None or isinstance(m, Tensor) for m in targets.values())
        for targets in masks.values()
    )
    if not ok:
        raise PlanError("expected masks as {layer: {'weight': tensor}}, as NNI's compress() gives them")
    return masks  # type: ignore[return-value]


def _check(model: nn.Module, masks: Masks) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, targets in masks.items():
        if name not in modules:
            raise PlanError(
                f"the masks are those of another model: {type(model).__name__} has no layer {name!r}"
            )
        for target, mask in targets.items():
            value = getattr(modules[name], target, None)
            if mask is not None and isinstance(value, Tensor) and not _fits(mask, value):
                raise PlanError(
                    f"the masks are those of another model: {name}.{target} is {tuple(value.shape)}, its mask "
                    f"{tuple(mask.shape)}"
                )


def _fits(mask: Tensor, value: Tensor) -> bool:
    sizes: Iterable[tuple[int, int]] = zip(mask.shape, value.shape, strict=False)
    return mask.ndim == value.ndim and all(size in (1, full) for size, full in sizes)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd | nn.Linear)
