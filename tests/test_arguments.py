"""A tensor stands for one argument, wherever the arguments of a forward pass are asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscore_plugin import DiscriminationAwareImportance, plan_pruning
from dscore_plugin.arguments import as_arguments
from dscore_plugin.costs import count
from dscore_plugin.export import export_model
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.synaptic import find_links, kernel_scores
from dscore_plugin.models import create_model
from dscore_plugin.selection.kernels import plan_kernels
from dscore_plugin.surgery.dead_channels import remove_dead_channels
from dscore_plugin.surgery.sparse_execution import compile_sparse
from dscore_plugin.training.head_places import find_segments
from dscore_plugin.training.heads import Heads
from dscore_plugin.training.synaptic import to_synaptic

X = torch.zeros(1, 1, 8, 8)


def test_what_is_no_tuple_is_one_argument() -> None:
    assert as_arguments(X) == (X,)
    assert as_arguments((X, 2)) == (X, 2)


def watched(model: nn.Module, x: Any) -> list[Any]:
    importance = DiscriminationAwareImportance()
    importance.watch(model, x)
    return [importance._segments]


ENTRANCES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "graph": lambda model, x: [group.name for group in PruningGraph(model, x).groups],
    "plan": lambda model, x: plan_pruning(model, x, ratio=0.5),
    "count": count,
    "kernel_scores": lambda model, x: {k: v.tolist() for k, v in kernel_scores(model, x).items()},
    "links": find_links,
    "kernels": lambda model, x: plan_kernels(
        model, x, kernel_scores(model, x), ratio=0.5, made_by={}
    ),
    "segments": lambda model, x: find_segments(model, x, ["features.3"], 0),
    "heads": lambda model, x: Heads(find_segments(model, x, ["features.3"], 0), model, x).ends,
    "watch": watched,
    "sparse": lambda model, x: compile_sparse(model, x, rounds=1).choices.keys(),
    "synaptic": lambda model, x: str(to_synaptic(model, x)),
    "dead": lambda model, x: remove_dead_channels(model, x, PruningGraph(model, x).prunable),
    "apply": lambda model, x: str(plan_pruning(model, x, ratio=0.5).apply(model, x)),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRANCES)
def test_a_tensor_does_as_well_as_a_tuple(name: str) -> None:
    torch.manual_seed(0)
    model = create_model("digits_cnn", num_classes=10, in_chans=1).eval()
    entrance = ENTRANCES[name]
    assert entrance(copy.deepcopy(model), X) == entrance(copy.deepcopy(model), (X,))


def test_a_tensor_exports(tmp_path: Path) -> None:
    model = create_model("digits_cnn", num_classes=10, in_chans=1).eval()
    assert export_model(model, X, tmp_path / "a.pt2", form="torch-export").difference <= 1e-4
