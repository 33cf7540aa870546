"""Dependency groups from DepGraph: the same ids for what must be masked alike, and the same ones every time."""

from __future__ import annotations

import sys
from typing import Any

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
def test_layers_in_front_of_grouped_ones_lose_as_many_channels_in_every_group(pruner: type) -> None:
    architecture = SMALL["mixed"]
    model = architecture.randomised()
    config = set_dependency_groups(model, [{"op_names": ["stem"], "sparse_ratio": 0.5}], architecture.inputs)
    assert config == [
        {"op_names": ["stem"], "sparse_ratio": 0.5, "dependency_group_id": "stem", "internal_metric_block": 4}
    ]
    made = pruner(model, config)
    _, masks = made.compress()
    made.unwrap_model()
    assert taken(masks["stem"]["weight"]) == 8
    assert torch.equal(masks["stem"]["weight"][:, 0, 0, 0].view(4, 4).sum(dim=1), torch.full((4,), 2.0))
    lines: list[str] = []
    speedup(model, architecture.inputs, masks, say=lines.append)
    if pruner is CriterionPruner:  # which takes the same channels in every group
        assert (model.stem.out_channels, lines) == (8, [])
    else:
        assert any(
            " of the 4 sets of 4 channels of 'stem' are masked in part and stay" in line for line in lines
        )
        assert not any("set_dependency_groups" in line for line in lines)


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


@pytest.mark.parametrize(
    "settings", [{"criterion": "synaptic_strength", "sparse_ratio": 0.5}, {"sparse_threshold": 0.4}]
)
def test_kernels_and_thresholds_get_no_ids_and_can_be_masked(settings: dict[str, Any]) -> None:
    model = residual()
    config = set_dependency_groups(model, [{"op_types": ["Conv2d"], **settings}], INPUTS)
    assert config == [{"op_names": [name], **settings} for name in ("stem", "conv1", "conv2")]
    _, masks = CriterionPruner(model, config, example_inputs=INPUTS).compress()
    assert all(bool((masks[name]["weight"] == 0).any()) for name in ("stem", "conv1", "conv2"))


def test_the_first_entry_of_a_layer_counts_and_the_ratios_of_a_group_must_agree() -> None:
    kernels = {"op_names": ["conv2"], "sparse_ratio": 0.3, "criterion": "synaptic_strength"}
    config = set_dependency_groups(residual(), [kernels, *CONVS], INPUTS)
    assert all("dependency_group_id" not in entry for entry in config)
    with pytest.raises(CriterionError, match=r"several ratios: conv2 0\.3, stem 0\.5; give them one"):
        set_dependency_groups(residual(), [{"op_names": ["conv2"], "sparse_ratio": 0.3}, *CONVS], INPUTS)


def test_old_entries_that_exclude() -> None:
    old = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv1"], "exclude": True}]
    config = set_dependency_groups(residual(), old, INPUTS)
    assert [(entry["op_names"], entry["dependency_group_id"]) for entry in config] == [
        (["stem"], "conv2"),
        (["conv2"], "conv2"),
    ]


def test_tensorboard_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(set_dependency_groups(residual(), CONVS, INPUTS)) == 3
