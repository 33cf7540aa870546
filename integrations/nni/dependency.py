"""Dependency groups for NNI's config lists, from DepGraph: which layers must lose the same channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from nni.compression.base.config import trans_legacy_config_list
from torch import Tensor, nn

from dscore_plugin.groups import Role
from dscore_plugin.integrations.nni.config import Entry, granularity_of, select
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph


def set_dependency_groups(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    example_inputs: Tensor | tuple[Any, ...],
) -> list[Entry]:
    """Give the layers of a config list that must lose the same channels the same ``dependency_group_id``.

    Does what NNI's ``auto_set_denpendency_group_ids`` is for. The ids are names of layers and the order is the
    network's: the same network gives the same list. A layer that must lose channels in sets (a grouped convolution
    or a group norm behind it) gets its ``internal_metric_block``. Layers alone in their group get no id, so that
    global ratios and minimal and maximal ones, which NNI does not apply to dependency groups, still hold for them;
    so do layers that DepGraph cannot prune, and granularities other than output channels.

    NNI adds the metrics of a group's members up; convolutions and linear layers in one group get two ids, because
    it cannot add tensors of 4 and of 2 dimensions.

    Args:
        model: the network, without NNI's wrappers.
        config_list: NNI's list; further keys (``criterion``) are kept.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).

    Returns:
        A new list, one entry for each layer.

    Raises:
        CriterionError: if an entry matches no layer.
        ModelError: if the network cannot be traced.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    entries = trans_legacy_config_list([deepcopy(dict(entry)) for entry in config_list])
    selected = [select(model, entry, position) for position, entry in enumerate(entries)]
    masked = {
        name
        for modules, settings in selected
        for name, module in modules.items()
        if _by_output(module, settings)
    }
    keys = _group_keys(PruningGraph(model, inputs), masked)
    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [
        {"op_names": [name], **deepcopy(settings), **(keys.get(name, {}) if name in masked else {})}
        for modules, settings in selected
        for name in order
        if name in modules
    ]


def _group_keys(graph: PruningGraph, masked: set[str]) -> dict[str, Entry]:
    keys: dict[str, Entry] = {}
    for group in graph.prunable:
        shapes: dict[tuple[int, int], list[str]] = {}
        for member in group.roles(Role.PRODUCER, Role.DEPTHWISE):
            if member.module in masked:
                dims = graph.model.get_parameter(f"{member.module}.weight").ndim
                shapes.setdefault((dims, member.width), []).append(member.module)
        for (dims, width), names in shapes.items():
            if len(names) == 1 and group.division == 1:
                continue
            suffix = "" if len(shapes) == 1 else f" ({dims}-d, {width})"
            for name in dict.fromkeys(names):
                keys[name] = {"dependency_group_id": f"{group.name}{suffix}"}
                if group.division > 1:
                    keys[name]["internal_metric_block"] = group.division
    return keys


def _by_output(module: nn.Module, settings: Entry) -> bool:
    weight = getattr(module, "weight", None)
    target = settings.get("target_settings", {}).get("weight", {})
    asked = target.get("granularity", settings.get("granularity"))
    return isinstance(weight, Tensor) and granularity_of(asked, weight.ndim) in ("default", "out_channel")


def removable_layers(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> list[str]:
    """Name the layers whose outputs can be masked and then removed, as ``op_names`` for a config list.

    Classifiers, layers whose outputs DepGraph cannot follow, and transposed convolutions, whose inputs NNI takes for
    their outputs, are left out, and with them the layers that share their channels.

    Args:
        model: the network, without NNI's wrappers.
        example_inputs: the arguments of one forward pass.

    Returns:
        Qualified names, in the network's order.

    Raises:
        ModelError: if the network cannot be traced.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    names = set()
    for group in PruningGraph(model, inputs).prunable:
        makers = [member.module for member in group.roles(Role.PRODUCER, Role.DEPTHWISE)]
        if not any(getattr(model.get_submodule(name), "transposed", False) for name in makers):
            names.update(makers)
    return [name for name, _ in model.named_modules() if name in names]
