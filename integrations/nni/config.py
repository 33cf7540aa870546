"""NNI's config lists with two more keys: ``criterion`` and ``criterion_options``, taken out and checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

from nni.compression.base.config import (
    default_config_schema,
    select_modules_by_config,
    trans_legacy_config_list,
)
from nni.compression.base.setting import PruningSetting, canonicalize_settings
from schema import SchemaError
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dscore_plugin.errors import CriterionError
from dscore_plugin.registry import CriterionInfo, get_criterion

OWN_KEYS = ("criterion", "criterion_options")
Entry = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A layer whose weight is to be masked, and by what.

    Attributes:
        layer: its qualified name.
        granularity: ``"out_channel"``, ``"in_channel"`` or ``"kernel"``.
        info: the criterion.
        importance: its importance object; None for kernels.
    """

    layer: str
    granularity: str
    info: CriterionInfo
    importance: Any


def read_config(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], default: str, *, fixed: bool = False
) -> tuple[list[Entry], dict[str, Target]]:
    """Check a config list against a network, touching nothing.

    Args:
        model: the network, without NNI's wrappers.
        config_list: NNI's list, in which an entry may name a ``criterion`` and its ``criterion_options``.
        default: the criterion of entries that name none.
        fixed: whether entries may name only that one.

    Returns:
        The list as NNI takes it, and the layers that it masks, in the network's order.

    Raises:
        CriterionError: if a criterion, an option, a granularity, a dependency group or another key cannot be served,
            or an entry matches no layer.
    """
    targets: dict[str, Target] = {}
    groups: dict[Any, _Member] = {}
    entries = current_entries(config_list)
    if not entries:
        raise CriterionError("the config list names nothing to mask; give an entry with op_types or op_names")
    for position, entry in entries.items():
        name, options = _take_own_keys(entry, default, fixed)
        info = _criterion(name)
        importance = info.build(**options)
        _validate(entry, position)
        modules, settings = select(model, entry, position)
        for layer, module in modules.items():
            weight = _weight_setting(layer, module, settings)
            if weight is not None and layer not in targets:
                granularity = _served(layer, module, weight["granularity"], info)
                targets[layer] = Target(layer, granularity, info, importance)
                _check_group(groups, layer, module, weight, granularity)
    order = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return list(entries.values()), dict(sorted(targets.items(), key=lambda item: order[item[0]]))


def current_entries(config_list: Sequence[Mapping[str, Any]]) -> dict[int, Entry]:
    """Copy a config list, with NNI's old keys translated; entries that only exclude go into the others.

    Returns:
        The entries, by their positions in the list.
    """
    entries = trans_legacy_config_list([deepcopy(dict(entry)) for entry in config_list])
    return {
        position: entry
        for position, (entry, given) in enumerate(zip(entries, config_list, strict=True))
        if "exclude" not in given or "exclude" in entry  # which is then refused as NNI refuses it
    }


def select(model: nn.Module, entry: Entry, position: int) -> tuple[dict[str, nn.Module], Entry]:
    """Return the layers that an entry matches, in the network's order, and what it says of them.

    Raises:
        CriterionError: if it matches none.
    """
    own = {key: value for key, value in entry.items() if key in OWN_KEYS}
    found, settings, _ = select_modules_by_config(
        model, {key: value for key, value in entry.items() if key not in OWN_KEYS}
    )
    if not found:
        asked = ", ".join(f"{key} {entry[key]}" for key in entry if "op_" in key)
        kinds = sorted({type(module).__name__ for module in model.modules() if _is_layer(module)})
        raise CriterionError(
            f"entry {position} of the config list matches no layer of {type(model).__name__} ({asked}); "
            f"its layers are of the types {', '.join(kinds)}"
        )
    for module in found.values():
        _introduce(module)
    order = (name for name, _ in model.named_modules(remove_duplicate=False))
    return {name: found[name] for name in order if name in found}, {**settings, **own}


def granularity_of(granularity: Any, dims: int) -> str:
    """Name a granularity of NNI's for a weight of ``dims`` dimensions.

    Returns:
        ``"out_channel"``, ``"in_channel"``, ``"kernel"``, ``"default"``, or ``"other"``.
    """
    if granularity in ("default", "out_channel", "in_channel", None):
        return granularity or "default"
    if not isinstance(granularity, list | tuple) or not granularity:
        return "other"
    is_plain = all(isinstance(size, int) for size in granularity)
    sizes, mode = (granularity, "front") if is_plain else (granularity[0], (*granularity, "front")[1])
    value = granularity[2] if not is_plain and len(granularity) > 2 else 1
    padding = [value or 1] * (dims - len(sizes))
    full = [*padding, *sizes] if mode == "front" else [*sizes, *padding]
    rest = [-1] * (dims - 2)
    known = {"out_channel": [1, -1, *rest], "in_channel": [-1, 1, *rest], "kernel": [1, 1, *rest]}
    return next((name for name, size in known.items() if size == full), "other")


def default_granularity(info: CriterionInfo, dims: int) -> str:
    """Name the granularity at which a criterion masks a weight of ``dims`` dimensions if none is asked for."""
    return "kernel" if info.kernel_scores and dims > 2 and info.granularity[0] == "kernel" else "out_channel"


def active_targets(layer: str, module: nn.Module, settings: Entry) -> dict[str, Entry]:
    """Return the settings of a layer's tensors that an entry masks on their own account, by name.

    Raises:
        CriterionError: if NNI does not know how to mask such a layer.
    """
    try:
        targets = canonicalize_settings(module, settings, "pruning")
    except (AssertionError, KeyError) as error:
        raise CriterionError(
            f"NNI cannot mask {layer!r}, a {type(module).__name__}: {error}; exclude it, or register its targets"
        ) from error
    return {
        name: setting
        for name, setting in targets.items()
        if setting.get("sparse_ratio") is not None or setting.get("sparse_threshold") is not None
    }


def kernel_size(dims: int) -> list[int]:
    """Return the block sizes that stand for one kernel of a weight of ``dims`` dimensions."""
    return [1, 1, *[-1] * (dims - 2)]


def _take_own_keys(entry: Entry, default: str, fixed: bool) -> tuple[str, dict[str, Any]]:
    name, options = entry.pop("criterion", default), entry.pop("criterion_options", None) or {}
    if fixed and name != default:
        raise CriterionError(
            f"this pruner's criterion is {default!r}, but an entry asks for {name!r}; use CriterionPruner for several"
        )
    if not isinstance(options, Mapping):
        raise CriterionError(f"criterion_options must be a dict of names and values, got {options!r}")
    return name, dict(options)


def _criterion(name: Any) -> CriterionInfo:
    info = get_criterion(str(name))
    if info.kind == "selector":
        raise CriterionError(
            f"criterion {info.name!r} searches for a plan and gives no scores to mask by; "
            f"run it with: dscore prune --criterion {info.name}"
        )
    if not {"channel", "kernel"} & set(info.granularity):
        raise CriterionError(
            f"criterion {info.name!r} removes whole layers, which no mask can; "
            f"run it with: dscore prune --criterion {info.name}"
        )
    return info


def _validate(entry: Entry, position: int) -> None:
    try:
        default_config_schema("pruning").validate(entry)
    except SchemaError as error:
        lines = [line for line in str(error).splitlines() if line]
        raise CriterionError(
            f"entry {position} of the config list is not valid: {lines[-1]} "
            f"(beside NNI's keys it may hold {' and '.join(OWN_KEYS)})"
        ) from error


def _weight_setting(layer: str, module: nn.Module, settings: Entry) -> Entry | None:
    """Return how a layer's weight is masked; None if it is not masked on its own account."""
    active = active_targets(layer, module, settings)
    if not active:
        return None
    if list(active) != ["weight"]:
        other = next(name for name in active if name != "weight")
        raise CriterionError(
            f"criteria score weights; {other!r} of {layer!r} cannot have a sparse_ratio of its own"
        )
    if not _is_layer(module) or getattr(module, "transposed", False):
        why = "NNI masks its inputs for its outputs" if _is_layer(module) else "it has no filters"
        raise CriterionError(
            f"{layer!r}, a {type(module).__name__}, cannot be scored ({why}); exclude it with exclude_op_names"
        )
    return active["weight"]


def _served(layer: str, module: nn.Module, asked: Any, info: CriterionInfo) -> str:
    dims = int(module.weight.ndim)  # type: ignore[arg-type]
    granularity = granularity_of(asked, dims)
    channels = {"out_channel", "in_channel"} if "channel" in info.granularity else set()
    kernels = {"kernel"} if info.kernel_scores and dims > 2 else set()
    if granularity == "default":
        granularity = default_granularity(info, dims)
    if granularity not in channels | kernels:
        can = ", ".join(sorted(channels | kernels)) or "none"
        raise CriterionError(
            f"criterion {info.name!r} cannot serve the granularity {asked!r} of {layer!r}; it can serve: {can} "
            f"(a kernel is {kernel_size(4)})"
        )
    return granularity


class _Member(NamedTuple):
    """What must be the same in all layers of a dependency group, and the name of one of them."""

    layer: str
    ratio: float
    shape: tuple[int, ...]  # of its scores


def _check_group(
    groups: dict[Any, _Member], layer: str, module: nn.Module, weight: Entry, granularity: str
) -> None:
    """Refuse a layer that NNI cannot mask together with the others of its dependency group."""
    name = weight["dependency_group_id"]
    if name is None:
        return
    if weight["sparse_ratio"] is None:
        raise CriterionError(
            f"{layer!r} is in the dependency group {name!r}, which NNI masks by sparse_ratio only, and has a "
            "sparse_threshold; leave its dependency_group_id out"
        )
    scored = {"out_channel": (0,), "in_channel": (1,), "kernel": (0, 1)}[granularity]
    shape = tuple(size if dim in scored else 1 for dim, size in enumerate(module.weight.shape))  # type: ignore[arg-type]
    member = _Member(layer, weight["sparse_ratio"], shape)
    first = groups.setdefault(name, member)
    if first[1:] != member[1:]:
        raise CriterionError(
            f"NNI cannot mask {first.layer!r} and {layer!r} alike, as their dependency_group_id {name!r} asks: "
            f"sparse_ratio {first.ratio} and {member.ratio}, scores of the shapes {first.shape} and {member.shape}; "
            "give them the same, or leave the id out"
        )


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd | nn.Linear)


def _introduce(module: nn.Module) -> None:
    """Make NNI, which knows layers by the exact name of their class, mask subclasses such as timm's Conv2dSame."""
    name = type(module).__name__
    if _is_layer(module) and name not in PruningSetting.registry:
        PruningSetting.register(name, PruningSetting.default_setting)
