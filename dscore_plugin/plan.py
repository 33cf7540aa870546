"""The Plan: what leaves a network. The only currency between choosing and removing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import PlanError
from dscore_plugin.loading import load_object
from dscore_plugin.rollback import rolled_back_on_error

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ChannelRemoval:
    """Output channels that leave a layer, and with them whatever is tied to them.

    Attributes:
        layer: qualified name of the group's root layer.
        channels: indices of its output channels before pruning, sorted.
    """

    type: ClassVar[str] = "channels"
    layer: str
    channels: tuple[int, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """What leaves, counted within the layer."""
        return self.channels


@dataclass(frozen=True)
class InputRemoval:
    """Channels that a channel selection no longer passes on, and the inputs of the layers behind it.

    Attributes:
        layer: qualified name of the :class:`~dscore_plugin.surgery.inputs.ChannelSelection`.
        channels: indices of the channels in front of it, sorted.
    """

    type: ClassVar[str] = "inputs"
    layer: str
    channels: tuple[int, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """What leaves, counted within the layer."""
        return self.channels


@dataclass(frozen=True)
class LayerRemoval:
    """A residual branch that leaves whole; its shortcut remains.

    Attributes:
        layer: qualified name of the block that holds the branch.
    """

    type: ClassVar[str] = "layers"
    layer: str

    @property
    def indices(self) -> tuple[int, ...]:
        """A branch counts as one thing."""
        return (0,)


@dataclass(frozen=True)
class KernelRemoval:
    """Kernels, each the connection of one input channel with one output channel, that leave a convolution.

    Attributes:
        layer: qualified name of the convolution.
        kernels: their places, sorted: ``o * (in_channels / groups) + c`` for output ``o`` and input ``c`` of its group.
    """

    type: ClassVar[str] = "kernels"
    layer: str
    kernels: tuple[int, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """What leaves, counted within the layer."""
        return self.kernels


Removal = ChannelRemoval | InputRemoval | LayerRemoval | KernelRemoval
_KINDS: tuple[type[Removal], ...] = (ChannelRemoval, InputRemoval, LayerRemoval, KernelRemoval)
_REMOVALS: dict[str, type[Removal]] = {kind.type: kind for kind in _KINDS}
# What carries each type out, in this order: DepGraph then refuses to prune a stream whose channels are selected.
_EXECUTORS = {
    "inputs": "dscore_plugin.surgery.inputs:remove_inputs",
    "channels": "dscore_plugin.integrations.torch_pruning.removal:remove_channels",
    "layers": "dscore_plugin.surgery.layers:carry_out",
    "kernels": "dscore_plugin.surgery.kernels:carry_out",
}
_MADE_ALONE = ("layers", "kernels")  # what other removals would rename or renumber


@dataclass(frozen=True)
class LayerRow:
    """One line of the plan's table, as it was when the plan was made.

    Attributes:
        layer: qualified name of the group's root layer, or of what else leaves as one removal.
        channels: its output channels before pruning (the kernels of a convolution; 1 for a residual branch).
        score_min: the lowest score of its channels.
        score_max: the highest.
        score_cut: the highest score among those that leave, None where none does.
        macs_saved: MACs that this row alone would save, the other layers left whole.
        type: of its removal.
    """

    layer: str
    channels: int
    score_min: float | None
    score_max: float | None
    score_cut: float | None
    macs_saved: int
    type: str = ChannelRemoval.type


@dataclass(frozen=True)
class Plan:
    """What leaves a network, made for one set of weights; look at it, save it, edit it, compare it, apply it.

    Attributes:
        fingerprint: of the model it was made for (:func:`fingerprint`).
        input_shape: of one image, ``(channels, height, width)``.
        removals: what leaves; at most one entry for a layer.
        rows: the table, one row for each group that may be pruned.
        macs: MACs before and after, by Torch-Pruning's rules.
        params: parameters before and after.
        made_by: criterion, allocation, ratio or budget: how it was chosen.
    """

    fingerprint: str
    input_shape: tuple[int, ...]
    removals: tuple[Removal, ...]
    rows: tuple[LayerRow, ...] = ()
    macs: tuple[int, int] = (0, 0)
    params: tuple[int, int] = (0, 0)
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def apply(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...] | None = None,
        *,
        strict: bool = True,
    ) -> nn.Module:
        """Remove what the plan names from ``model``, in place, and with it what is tied to it.

        Args:
            model: the network that the plan was made for.
            example_inputs: arguments of a forward pass, for tracing (a tensor stands for one argument); by default one
                image of zeros.
            strict: refuse other weights than those the plan was made for.

        Returns:
            ``model``, in eval mode.

        Raises:
            PlanError: if the model or its weights are others, or the plan names what is not there.
            ModelError: if the model cannot be traced, or does not run afterwards; then it is left as it was.
        """
        if strict and self.fingerprint and fingerprint(model) != self.fingerprint:
            raise PlanError(
                "the plan was made for another model or other weights (the fingerprints differ); make a new plan, "
                "or pass strict=False to remove the same channels from these weights"
            )
        if example_inputs is None:
            like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
            example_inputs = like.new_zeros(1, *self.input_shape)
        inputs = as_arguments(example_inputs)
        alone = any(removal.type in _MADE_ALONE for removal in self.removals)
        with rolled_back_on_error(model):
            for kind, executor in _EXECUTORS.items():
                removals = [removal for removal in self.removals if removal.type == kind]
                if removals or (kind == ChannelRemoval.type and not alone):
                    load_object(executor)(model, inputs, removals)
        return model

    def removed(self, layer: str) -> tuple[int, ...]:
        """Return the channels (kernels; 0 for a residual branch) that leave ``layer``."""
        return next((r.indices for r in self.removals if r.layer == layer), ())

    def with_removed(self, layer: str, channels: Iterable[int]) -> Plan:
        """Return a copy in which exactly ``channels`` leave ``layer``; an empty list keeps it whole.

        The copy's ``macs`` and ``params`` after pruning are unknown until it is applied: set to 0.

        Raises:
            PlanError: if the plan has no row for ``layer``, or an index is not one of its channels.
        """
        row = next((row for row in self.rows if row.layer == layer), None)
        if row is None:
            known = ", ".join(row.layer for row in self.rows)
            raise PlanError(f"the plan has no layer {layer!r}; it has: {known}")
        chosen = tuple(sorted(set(channels)))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < row.channels:
            raise PlanError(f"{layer!r} has channels 0..{row.channels - 1}; got {chosen[0]}..{chosen[-1]}")
        others = [r for r in self.removals if r.layer != layer]
        removals = (*others, _make(row.type, layer, chosen)) if chosen else tuple(others)
        return replace(self, removals=removals, macs=(self.macs[0], 0), params=(self.params[0], 0))

    def difference(self, other: Plan) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Compare with another plan: for each layer that differs, the channels that only this and only that removes."""
        layers = dict.fromkeys(r.layer for r in (*self.removals, *other.removals))
        pairs = {layer: (set(self.removed(layer)), set(other.removed(layer))) for layer in layers}
        return {
            layer: (tuple(sorted(here - there)), tuple(sorted(there - here)))
            for layer, (here, there) in pairs.items()
            if here != there
        }

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON.

        Raises:
            PlanError: if the file cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise PlanError(f"the plan cannot be written to {path}: {error.strerror}") from error
        return path

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        content["removals"] = [_entry(removal) for removal in self.removals]
        content["rows"] = [_entry(row) for row in self.rows]
        return content

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from JSON; raise PlanError if there is none, or it is not one."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(
                f"no plan can be read from {path}: {error.strerror}; make one with: dscore plan"
            ) from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} is no valid JSON: {error}") from error
        return Plan.from_dict(content)

    @staticmethod
    def from_dict(content: Any) -> Plan:
        """Build a plan from plain JSON values; raise PlanError if they are none."""
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise PlanError(f"expected a plan of format version {FORMAT_VERSION}, got {version!r}")
        try:
            removals = tuple(read_removal(entry) for entry in content["removals"])
            macs, params = (tuple(int(x) for x in content[key]) for key in ("macs", "params"))
            plan = Plan(
                str(content["fingerprint"]),
                tuple(int(size) for size in content["input_shape"]),
                removals,
                tuple(_row(row) for row in content["rows"]),
                (macs[0], macs[1]),
                (params[0], params[1]),
                dict(content["made_by"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise PlanError(
                f"the plan is damaged: {type(error).__name__} at {error}; make a new one"
            ) from error
        layers = [r.layer for r in removals]
        if len(set(layers)) < len(layers):
            raise PlanError("the plan names a layer twice; put all of its channels into one entry")
        types = {removal.type for removal in removals}
        if len(types) > 1 and types & set(_MADE_ALONE):
            raise PlanError(f"the plan mixes {' and '.join(sorted(types))}; apply one plan after the other")
        return plan

    def __str__(self) -> str:
        types = {row.type for row in self.rows}
        heading = types.pop() if len(types) == 1 else "channels"
        lines = [f"{'layer':<32} {heading:>14} {'score range':>17} {'cut':>7} {'MACs saved':>12}"]
        for row in self.rows:
            left = row.channels - len(self.removed(row.layer))
            scores = "" if row.score_min is None else f"{row.score_min:.3f} .. {row.score_max:.3f}"
            cut = "" if row.score_cut is None else f"{row.score_cut:.3f}"
            widths, saved = f"{row.channels} -> {left}", f"{row.macs_saved / 1e6:.2f} M"
            lines.append(f"{row.layer:<32} {widths:>14} {scores:>17} {cut:>7} {saved:>12}")
        if not self.removals:
            lines.append("nothing leaves the network: the goal is less than one of any layer; ask for more")
        if self.macs[1]:
            kept = 100 * self.macs[1] / max(1, self.macs[0])
            lines.append(
                f"MACs {self.macs[0] / 1e6:.2f} M -> {self.macs[1] / 1e6:.2f} M ({kept:.1f} % kept), "
                f"parameters {self.params[0]:,} -> {self.params[1]:,}"
            )
        return "\n".join(lines)


def _entry(item: Removal | LayerRow) -> dict[str, Any]:
    """Return a removal or a row as JSON: its type is written only where it is not channels."""
    content = {**asdict(item), "type": item.type}
    if isinstance(item, KernelRemoval):
        content["kernels"] = _to_bits(item.kernels)
    if item.type == ChannelRemoval.type:
        del content["type"]
    return content


def read_removal(content: Any) -> Removal:
    """Build a removal from plain JSON values, as a plan's ``removals`` hold them."""
    kind, layer = _kind(content.get("type", ChannelRemoval.type)), str(content["layer"])
    if kind is LayerRemoval:
        return LayerRemoval(layer)
    if kind is KernelRemoval:
        return KernelRemoval(layer, _from_bits(content["kernels"]))
    return _make(kind.type, layer, _indices(content["channels"], layer))


def _make(kind: str, layer: str, indices: tuple[int, ...]) -> Removal:
    if kind == LayerRemoval.type:
        return LayerRemoval(layer)
    made: Removal = _REMOVALS[kind](layer, indices)  # type: ignore[call-arg]
    return made


def _to_bits(places: tuple[int, ...]) -> str:
    """Write places as base64 of a bit for each: networks have millions of kernels."""
    bits = torch.zeros(8 * ((max(places, default=-1) + 8) // 8), dtype=torch.uint8)
    bits[list(places)] = 1
    packed = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
    return base64.b64encode(packed.numpy().tobytes()).decode("ascii")


def _from_bits(text: Any) -> tuple[int, ...]:
    packed = torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)
    bits = (packed.view(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return tuple(bits.flatten().nonzero().flatten().tolist())


def _kind(name: Any) -> type[Removal]:
    if not isinstance(name, str) or name not in _REMOVALS:
        raise PlanError(f"removals of type {name!r} are unknown; expected one of {', '.join(_REMOVALS)}")
    return _REMOVALS[name]


def _row(content: Any) -> LayerRow:
    row = LayerRow(**content)
    _kind(row.type)
    numbers = (row.channels, row.macs_saved, row.score_min, row.score_max, row.score_cut)
    optional = [isinstance(number, float | int) or number is None for number in numbers[2:]]
    if not (isinstance(row.layer, str) and all(isinstance(n, int) for n in numbers[:2]) and all(optional)):
        raise TypeError(f"the row {content}")
    return row


def _indices(values: Any, layer: str) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or any(
        isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values
    ):
        raise PlanError(f"the channels of {layer!r} must be a list of non-negative integers")
    if len(set(values)) < len(values):
        raise PlanError(f"the channels of {layer!r} name one channel twice")
    return tuple(sorted(values))


def fingerprint(model: nn.Module) -> str:
    """Hash the names, shapes, types and values of a model's parameters (SHA-256, hexadecimal)."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
