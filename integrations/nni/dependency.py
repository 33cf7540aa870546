"""Dependency groups for NNI's config lists, from DepGraph: which layers must lose the same channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import CriterionError
from dscore_plugin.groups import Role
from dscore_plugin.integrations.nni.config import (
    Entry,
    active_targets,
    current_entries,
    default_granularity,
    granularity_of,
    select,
)
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.registry import get_criterion


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
    so do layers that DepGraph cannot prune, layers with a ``sparse_threshold``, which NNI does not take in dependency
    groups, and granularities other than output channels (that of a criterion that masks single kernels, too).

    NNI adds the metrics of a group's members up; convolutions and linear layers in one group get two ids, because
    it cannot add tensors of 4 and of 2 dimensions.

    Args:
        model: the network, without NNI's wrappers.
        config_list: NNI's list; further keys (``criterion``) are kept.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).

    Returns:
        A new list, one entry for each layer.

    Raises:
        CriterionError: if an entry matches no layer, or layers that lose the same channels have several ratios.
        ModelError: if the network cannot be traced.
    """
    inputs = as_arguments(example_inputs)
    selected = [select(model, entry, position) for position, entry in current_entries(config_list).items()]
    ratios: dict[str, float | None] = {}
    for modules, settings in selected:
        for name, module in modules.items():
            weight = active_targets(name, module, settings).get("weight")
            if weight is not None and name not in ratios:  # NNI serves a layer by the first entry
                ratios[name] = _ratio_of_outputs(module, weight, settings.get("criterion"))
    keys = _group_keys(
        PruningGraph(model, inputs), {n: ratio for n, ratio in ratios.items() if ratio is not None}
    )
    return [
        {"op_names": [name], **deepcopy(settings), **keys.get(name, {})}
        for modules, settings in selected
        for name in modules
    ]


def _group_keys(graph: PruningGraph, ratios: Mapping[str, float]) -> dict[str, Entry]:
    keys: dict[str, Entry] = {}
    for group in graph.prunable:
        shapes: dict[tuple[int, int], list[str]] = {}
        for member in group.roles(Role.PRODUCER, Role.DEPTHWISE):
            if member.module in ratios:
                dims = graph.model.get_parameter(f"{member.module}.weight").ndim
                shapes.setdefault((dims, member.width), []).append(member.module)
        for (dims, width), names in shapes.items():
            if len(names) == 1 and group.division == 1:
                continue
            if len({ratios[name] for name in names}) > 1:
                asked = ", ".join(f"{name} {ratios[name]}" for name in names)
                raise CriterionError(
                    f"these layers lose the same channels and are asked for several ratios: {asked}; give them one"
                )
            suffix = "" if len(shapes) == 1 else f" ({dims}-d, {width})"
            for name in dict.fromkeys(names):
                keys[name] = {"dependency_group_id": f"{group.name}{suffix}"}
                if group.division > 1:
                    keys[name]["internal_metric_block"] = group.division
    return keys


def _ratio_of_outputs(module: nn.Module, weight: Entry, criterion: str | None) -> float | None:
    """Return the sparse_ratio of a layer's outputs; None where its weight is masked in another way."""
    if not isinstance(module.weight, Tensor):
        return None
    granularity = granularity_of(weight["granularity"], module.weight.ndim)
    if granularity == "default" and criterion is not None:
        granularity = default_granularity(get_criterion(criterion), module.weight.ndim)
    return weight["sparse_ratio"] if granularity in ("default", "out_channel") else None


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
    inputs = as_arguments(example_inputs)
    names = set()
    for group in PruningGraph(model, inputs).prunable:
        makers = [member.module for member in group.roles(Role.PRODUCER, Role.DEPTHWISE)]
        if not any(getattr(model.get_submodule(name), "transposed", False) for name in makers):
            names.update(makers)
    return [name for name, _ in model.named_modules() if name in names]
