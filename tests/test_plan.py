from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscore_plugin import Plan, plan_pruning
from dscore_plugin.errors import ModelError, PlanError
from dscore_plugin.integrations.torch_pruning.counting import count
from dscore_plugin.plan import ChannelRemoval, KernelRemoval, LayerRemoval, LayerRow, fingerprint
from tests.architectures import IMAGE, Residual, randomised

X = torch.zeros(1, *IMAGE)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Residual()).eval()


@pytest.fixture
def plan(model: nn.Module) -> Plan:
    return plan_pruning(model, X, "d_score", ratio=0.5)


def test_a_plan_survives_the_disk(plan: Plan, model: nn.Module, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "new" / "plan.json")
    again = Plan.load(path)
    assert again == plan
    assert str(again) == str(plan)
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]
    x = torch.randn(2, *IMAGE)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    assert torch.equal(plan.apply(one)(x), again.apply(other)(x))


def test_what_a_plan_says_is_what_it_does(plan: Plan, model: nn.Module) -> None:
    assert plan.macs[0], plan.params[0] == count(model, (X,))
    x = torch.randn(2, *IMAGE)
    pruned = plan.apply(model)
    assert pruned is model
    assert not model.training
    assert (plan.macs[1], plan.params[1]) == count(model, (X,))
    assert (model.conv1.out_channels, model.stem.out_channels) == (6, 4)
    assert pruned(x).shape == (2, 4)


def test_the_table_shows_every_layer(plan: Plan) -> None:
    lines = str(plan).splitlines()
    assert lines[0].split() == ["layer", "channels", "score", "range", "cut", "MACs", "saved"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["conv2", "8", "->", "4"],
        ["conv1", "12", "->", "6"],
    ]
    assert lines[3].startswith("MACs 0.1")
    assert f"{plan.params[0]:,} -> {plan.params[1]:,}" in lines[3]
    for row in plan.rows:
        assert row.score_min is not None
        assert row.score_max is not None
        assert row.score_cut is not None
        assert row.score_min <= row.score_cut < row.score_max


def test_rows_say_what_each_alone_would_save(plan: Plan, model: nn.Module) -> None:
    for row in plan.rows:
        alone = replace(plan, removals=(ChannelRemoval(row.layer, plan.removed(row.layer)),))
        pruned = alone.apply(copy.deepcopy(model))
        assert row.macs_saved == plan.macs[0] - count(pruned, (X,))[0]


def test_edits(plan: Plan, model: nn.Module) -> None:
    edited = plan.with_removed("conv1", [3, 1, 1])
    assert edited.removed("conv1") == (1, 3)
    assert edited.removed("conv2") == plan.removed("conv2")
    assert edited.macs == (plan.macs[0], 0)
    assert "MACs" not in str(edited).splitlines()[-1]
    assert plan.removed("conv1") != (1, 3)
    pruned = edited.apply(copy.deepcopy(model))
    kept = [channel for channel in range(12) if channel not in (1, 3)]
    rows = [channel for channel in range(8) if channel not in plan.removed("conv2")]
    assert torch.equal(pruned.conv1.weight, model.conv1.weight[kept][:, rows])
    whole = plan.with_removed("conv1", [])
    assert [removal.layer for removal in whole.removals] == ["conv2"]
    assert whole.apply(copy.deepcopy(model)).conv1.out_channels == 12


@pytest.mark.parametrize(
    ("layer", "channels", "message"),
    [
        ("conv7", [0], r"no layer 'conv7'; it has: conv2, conv1"),
        ("conv1", [0, 12], r"'conv1' has channels 0..11; got 0..12"),
        ("conv1", [-1], r"channels 0..11; got -1..-1"),
    ],
)
def test_edits_that_do_not_fit_are_refused(plan: Plan, layer: str, channels: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan.with_removed(layer, channels)


def test_an_edit_that_empties_a_layer_is_refused_when_applied(plan: Plan, model: nn.Module) -> None:
    with pytest.raises(PlanError, match="removes all 12 channels of 'conv1'"):
        plan.with_removed("conv1", range(12)).apply(model)
    assert model.conv1.out_channels == 12


def test_differences(plan: Plan) -> None:
    assert plan.difference(plan) == {}
    one = plan.with_removed("conv1", [0, 1, 2])
    other = plan.with_removed("conv1", [1, 5])
    assert one.difference(other) == {"conv1": ((0, 2), (5,))}
    assert other.difference(one) == {"conv1": ((5,), (0, 2))}
    without = plan.with_removed("conv2", [])
    assert plan.difference(without) == {"conv2": (plan.removed("conv2"), ())}
    assert without.difference(plan) == {"conv2": ((), plan.removed("conv2"))}


def test_fingerprints_tell_weights_names_and_types_apart(model: nn.Module) -> None:
    own = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == own
    assert fingerprint(copy.deepcopy(model).train().requires_grad_(False)) == own
    other = copy.deepcopy(model)
    other.conv1.weight.data[0, 0, 0, 0] += 1e-6
    assert fingerprint(other) != own
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) != own
    assert fingerprint(nn.Sequential(model)) != own
    assert fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last)) == own
    scalar = nn.Module()
    scalar.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    assert len(fingerprint(scalar)) == 64


def test_other_weights_are_refused_unless_asked_for(plan: Plan, model: nn.Module) -> None:
    other = randomised(Residual(), 1).eval()
    with pytest.raises(PlanError, match=r"another model or other weights.*strict=False"):
        plan.apply(other)
    assert other.conv1.out_channels == 12
    assert plan.apply(other, strict=False).conv1.out_channels == 6


def test_another_model_is_refused_in_any_case(plan: Plan) -> None:
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(PlanError, match="fingerprints differ"):
        plan.apply(other)
    with pytest.raises(PlanError, match="no group of channels named 'conv2'"):
        plan.apply(other, strict=False)


def test_a_plan_cannot_be_applied_twice(plan: Plan, model: nn.Module) -> None:
    plan.apply(model)
    with pytest.raises(PlanError, match="fingerprints differ"):
        plan.apply(model)
    with pytest.raises(PlanError, match="conv"):
        plan.with_removed("conv2", [7]).apply(model, strict=False)


def test_models_of_other_types_are_traced_with_their_type(plan: Plan, model: nn.Module) -> None:
    half = copy.deepcopy(model).to(torch.float64)
    pruned = plan_pruning(half, X.double(), "d_score", ratio=0.5).apply(half)
    assert pruned.conv1.weight.dtype == torch.float64
    assert pruned.conv1.out_channels == 6


def test_inputs_that_do_not_fit_the_model(plan: Plan, model: nn.Module) -> None:
    with pytest.raises(ModelError, match="cannot be traced"):
        replace(plan, input_shape=(5, 8, 8)).apply(model)


def content(plan: Plan) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(plan.to_dict()))
    return loaded


def tampered(plan: Plan, path: list[Any], value: Any) -> dict[str, Any]:
    whole = content(plan)
    inner: Any = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 2, "format version 1, got 2"),
        (["format_version"], "1", "format version 1, got '1'"),
        (["removals"], None, "damaged"),
        (["removals"], {"conv1": [1]}, "damaged"),
        (["removals", 0], ["conv1", [1]], "damaged"),
        (["removals", 0], {"layer": "conv1"}, "damaged"),
        (["removals", 0, "channels"], "123", "must be a list of non-negative integers"),
        (["removals", 0, "channels"], [1, -2], "non-negative"),
        (["removals", 0, "channels"], [1, 2.5], "non-negative"),
        (["removals", 0, "channels"], [True], "non-negative"),
        (["removals", 0, "channels"], [None], "non-negative"),
        (["removals", 0, "channels"], [3, 3], "name one channel twice"),
        (["removals", 0, "layer"], "conv1", "names a layer twice"),
        (["removals", 0, "type"], "kernels?", "'kernels\\?' are unknown"),
        (["macs"], 5, "damaged"),
        (["macs"], [1], "damaged"),
        (["params"], [1, "x"], "damaged"),
        (["params"], [1, float("inf")], "damaged"),
        (["params"], [1, float("nan")], "damaged"),
        (["input_shape"], [3, None, 8], "damaged"),
        (["input_shape"], 3, "damaged"),
        (["made_by"], "d_score", "damaged"),
        (["rows"], 7, "damaged"),
        (["rows", 0], {"layer": "conv2"}, "damaged"),
        (["rows", 0, "channels"], "8", "damaged"),
        (["rows", 0, "layer"], 3, "damaged"),
        (["rows", 0, "score_min"], "0.1", "damaged"),
        (["rows", 0, "macs_saved"], None, "damaged"),
        (["rows", 0, "extra"], 1, "damaged"),
    ],
)
def test_tampered_plans_are_refused(plan: Plan, path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_dict(tampered(plan, path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["fingerprint", "input_shape", "removals", "rows", "macs", "params", "made_by"]
)
def test_nothing_may_be_missing(plan: Plan, key: str) -> None:
    whole = content(plan)
    del whole[key]
    with pytest.raises(PlanError, match=f"damaged: KeyError at '{key}'"):
        Plan.from_dict(whole)


@pytest.mark.parametrize("wrong", [None, [], "plan", 3, {}])
def test_other_json_is_no_plan(wrong: Any) -> None:
    with pytest.raises(PlanError, match="format version"):
        Plan.from_dict(wrong)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["removals", 1, "channels"], [0, 99], r"'conv1' has channels 0..11"),
        (["removals", 1, "channels"], list(range(12)), "removes all 12 channels"),
        (["removals", 1, "channels"], [10**30], r"channels 0..11"),
        (["removals", 1, "layer"], "fc", "must not be pruned"),
        (["removals", 1, "layer"], "../conv1", "no group of channels named"),
        (["removals", 1, "layer"], "", "no group of channels named ''"),
    ],
)
def test_plans_that_name_what_is_not_there_are_refused_before_anything_changes(
    plan: Plan, model: nn.Module, path: list[Any], value: Any, message: str
) -> None:
    before = fingerprint(model)
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(tampered(plan, path, value)).apply(model)
    assert fingerprint(model) == before


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(
        PlanError, match=r"no plan can be read from .*plan.json: No such file.*make one with: dscore plan"
    ):
        Plan.load(path)
    with pytest.raises(PlanError, match="no plan can be read"):
        Plan.load(tmp_path)
    for text in ("{", "", '{"format_version": 1', "\x00", "[" * 200_000):
        path.write_text(text)
        with pytest.raises(PlanError, match=r"plan.json is no valid JSON|format version"):
            Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(PlanError, match="no valid JSON"):
        Plan.load(path)


def test_a_plan_that_cannot_be_written(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot be written"):
        plan.save(tmp_path / "file" / "plan.json")


def test_kernels_and_layers_are_saved_edited_and_shown() -> None:
    kernels = Plan("", (3, 8, 8), (KernelRemoval("conv", (0, 7, 8, 1000)),), (row("conv", 1001, "kernels"),))
    again = Plan.from_dict(json.loads(json.dumps(kernels.to_dict())))
    assert again == kernels
    assert again.removed("conv") == (0, 7, 8, 1000)
    assert again.with_removed("conv", [3]).removals == (KernelRemoval("conv", (3,)),)
    assert "kernels" in str(again).splitlines()[0]
    assert "1001 -> 997" in str(again)

    layers = Plan("", (3, 8, 8), (LayerRemoval("layer1.0"),), (row("layer1.0", 1, "layers"),))
    assert Plan.from_dict(layers.to_dict()) == layers
    assert "1 -> 0" in str(layers)
    assert layers.with_removed("layer1.0", []).removals == ()
    mixed = {**layers.to_dict(), "removals": [*layers.to_dict()["removals"], {"layer": "a", "channels": [1]}]}
    with pytest.raises(PlanError, match="mixes channels and layers"):
        Plan.from_dict(mixed)


def row(layer: str, size: int, kind: str) -> LayerRow:
    return LayerRow(layer, size, None, None, None, 0, kind)
