"""NNI's config lists with two more keys: ``criterion`` and ``criterion_options``, taken out and checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

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
        CriterionError: if a criterion, an option, a granularity or another key cannot be served, or an entry
            matches no layer.
    """
    targets: dict[str, Target] = {}
    entries = trans_legacy_config_list([deepcopy(dict(entry)) for entry in config_list])
    if not entries:
        raise CriterionError("the config list is empty; give at least one entry with op_types or op_names")
    for position, entry in enumerate(entries):
        name, options = _take_own_keys(entry, default, fixed)
        info = _criterion(name)
        importance = info.build(**options)
        _validate(entry, position)
        modules, settings = select(model, entry, position)
        for layer, module in modules.items():
            granularity = _granularity(layer, module, settings, info)
            if granularity is not None:
                targets.setdefault(layer, Target(layer, granularity, info, importance))
    order = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return entries, dict(sorted(targets.items(), key=lambda item: order[item[0]]))


def select(model: nn.Module, entry: Entry, position: int) -> tuple[dict[str, nn.Module], Entry]:
    """Return the layers that an entry matches, and what it says of them.

    Raises:
        CriterionError: if it matches none.
    """
    own = {key: value for key, value in entry.items() if key in OWN_KEYS}
    modules, settings, _ = select_modules_by_config(
        model, {key: value for key, value in entry.items() if key not in OWN_KEYS}
    )
    if not modules:
        asked = ", ".join(f"{key} {entry[key]}" for key in entry if "op_" in key)
        kinds = sorted({type(module).__name__ for module in model.modules() if _is_layer(module)})
        raise CriterionError(
            f"entry {position} of the config list matches no layer of {type(model).__name__} ({asked}); "
            f"its layers are of the types {', '.join(kinds)}"
        )
    for module in modules.values():
        _introduce(module)
    return modules, {**settings, **own}


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


def _granularity(layer: str, module: nn.Module, settings: Entry, info: CriterionInfo) -> str | None:
    """Say how a layer is masked; None if its weight is not masked on its own account."""
    try:
        targets = canonicalize_settings(module, settings, "pruning")
    except (AssertionError, KeyError) as error:
        raise CriterionError(
            f"NNI cannot mask {layer!r}, a {type(module).__name__}: {error}; exclude it, or register its targets"
        ) from error
    active = [name for name, setting in targets.items() if _is_active(setting)]
    if not active:
        return None
    if active != ["weight"]:
        other = next(name for name in active if name != "weight")
        raise CriterionError(
            f"criteria score weights; {other!r} of {layer!r} cannot have a sparse_ratio of its own"
        )
    if not _is_layer(module) or getattr(module, "transposed", False):
        why = "NNI masks its inputs for its outputs" if _is_layer(module) else "it has no filters"
        raise CriterionError(
            f"{layer!r}, a {type(module).__name__}, cannot be scored ({why}); exclude it with exclude_op_names"
        )
    return _served(layer, module, targets["weight"]["granularity"], info)


def _served(layer: str, module: nn.Module, asked: Any, info: CriterionInfo) -> str:
    dims = module.weight.ndim
    granularity = granularity_of(asked, int(dims))  # type: ignore[arg-type]
    channels = {"out_channel", "in_channel"} if "channel" in info.granularity else set()
    kernels = {"kernel"} if info.kernel_scores and dims > 2 else set()  # type: ignore[operator]
    if granularity == "default":
        granularity = "kernel" if kernels and info.granularity[0] == "kernel" else "out_channel"
    if granularity not in channels | kernels:
        can = ", ".join(sorted(channels | kernels)) or "none"
        raise CriterionError(
            f"criterion {info.name!r} cannot serve the granularity {asked!r} of {layer!r}; it can serve: {can} "
            f"(a kernel is {kernel_size(4)})"
        )
    return granularity


def _is_active(setting: Mapping[str, Any]) -> bool:
    return setting.get("sparse_ratio") is not None or setting.get("sparse_threshold") is not None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd | nn.Linear)


def _introduce(module: nn.Module) -> None:
    """Make NNI, which knows layers by the exact name of their class, mask subclasses such as timm's Conv2dSame."""
    name = type(module).__name__
    if _is_layer(module) and name not in PruningSetting.registry:
        PruningSetting.register(name, PruningSetting.default_setting)
