"""Dependency groups from DepGraph: the same ids for what must be masked alike, and the same ones every time."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner

from dscore_plugin.errors import CriterionError
from dscore_plugin.integrations.nni import CriterionPruner, set_dependency_groups, speedup
from tests.architectures import SMALL
from tests.integrations.nni.helpers import CONVS, INPUTS, residual, taken


def test_a_residual_sum_is_one_group_and_layers_alone_are_none() -> None:
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "criterion": "d_step"}]
    grouped = set_dependency_groups(residual(), config, INPUTS)
    assert [entry["op_names"] for entry in grouped] == [["stem"], ["conv1"], ["conv2"], ["fc"]]
    ids = [entry.get("dependency_group_id") for entry in grouped]
    assert ids == ["conv2", None, "conv2", None]
    assert all(entry["criterion"] == "d_step" and entry["sparse_ratio"] == 0.5 for entry in grouped)
    assert config == [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "criterion": "d_step"}]
    assert set_dependency_groups(residual(1), config, INPUTS[0]) == grouped


def test_nnis_own_pruner_masks_a_residual_sum_alike_with_them_and_not_without() -> None:
    kept = {}
    for name, config in {"without": CONVS, "with": set_dependency_groups(residual(), CONVS, INPUTS)}.items():
        model = residual()
        pruner = L1NormPruner(model, config)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        lines: list[str] = []
        speedup(model, INPUTS, masks, say=lines.append)
        kept[name] = (
            model.stem.out_channels,
            len([line for line in lines if "masked in some of the layers" in line]),
        )
        assert model.conv1.out_channels == 6
    assert kept["with"] == (4, 0)
    assert kept["without"][0] > 4
    assert kept["without"][1] == 1


@pytest.mark.parametrize("pruner", [CriterionPruner, L1NormPruner])
def test_layers_in_front_of_grouped_ones_lose_whole_units(pruner: type) -> None:
    architecture = SMALL["mixed"]
    model = architecture.randomised()
    config = set_dependency_groups(model, [{"op_names": ["stem"], "sparse_ratio": 0.5}], architecture.inputs)
    assert config == [
        {"op_names": ["stem"], "sparse_ratio": 0.5, "dependency_group_id": "stem", "internal_metric_block": 4}
    ]
    _, masks = pruner(model, config).compress()
    assert taken(masks["stem"]["weight"]) == 8
    assert torch.equal(masks["stem"]["weight"][:, 0, 0, 0].view(4, 4).sum(dim=1), torch.full((4,), 2.0))


def test_convolutions_and_linear_layers_in_one_group_are_masked_alike() -> None:
    architecture = SMALL["convnext_block"]
    model = architecture.randomised()
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "exclude_op_names": ["head"]}]
    pruner = CriterionPruner(
        model, set_dependency_groups(model, config, architecture.inputs), example_inputs=architecture.inputs
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    speedup(model, architecture.inputs, masks, say=pytest.fail)


def test_other_granularities_and_empty_entries() -> None:
    config = [{**CONVS[0], "granularity": "in_channel"}]
    assert all(
        "dependency_group_id" not in entry for entry in set_dependency_groups(residual(), config, INPUTS)
    )
    with pytest.raises(CriterionError, match="matches no layer"):
        set_dependency_groups(residual(), [{"op_types": ["Conv9d"], "sparse_ratio": 0.5}], INPUTS)


def test_tensorboard_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(set_dependency_groups(residual(), CONVS, INPUTS)) == 3
