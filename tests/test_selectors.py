"""Criteria that search, and those that prune kernels or layers, from the command's job to the loaded artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dscore_plugin import load_pruned
from dscore_plugin.analysis_runs import run_plan
from dscore_plugin.artifact import read_structure
from dscore_plugin.datasets import load_data
from dscore_plugin.errors import CriterionError
from dscore_plugin.jobs import Choice, PruneJob, Source
from dscore_plugin.models import create_model
from dscore_plugin.pipeline import run_prune
from dscore_plugin.training.evaluation import evaluate
from tests.architectures import randomised

DCP = {"selection_images": 64, "channels_per_step": 8, "head_passes": 1}
COARSE = {"candidates": 3, "selection_images": 50}
ENERGY = {"selection_images": 60, "labels": "ground_truth"}
CASES = [
    ("digits_cnn", "channels", Choice("dcp", ratio=0.5, criterion_options=DCP)),
    ("digits_cnn", "channels", Choice("dcp_adapt", criterion_options={**DCP, "epsilon": 0.5})),
    ("digits_cnn", "channels", Choice("discrimination_aware", ratio=0.5, calibration_images=64)),
    ("digits_cnn", "channels", Choice("coarse", ratio=0.3, criterion_options=COARSE)),
    ("digits_cnn", "kernels", Choice("coarse", ratio=0.3, granularity="kernel", criterion_options=COARSE)),
    ("digits_cnn", "kernels", Choice("synaptic_strength", ratio=0.5)),
    ("digits_cnn", "channels", Choice("synaptic_strength", ratio=0.5, granularity="channel")),
    ("cifar_resnet8_digits", "layers", Choice("energy", keep_layers=2, criterion_options=ENERGY)),
    ("cifar_resnet8_digits", "layers", Choice("random_layers", target_macs=0.8)),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder, made = tmp_path_factory.mktemp("weights"), {}
    for name, architecture in (("digits_cnn", "digits_cnn"), ("cifar_resnet8_digits", "cifar_resnet20")):
        torch.manual_seed(0)
        model = randomised(create_model(architecture, num_classes=10, in_chans=1))
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        made[name] = Source(architecture, weights=str(folder / f"{name}.safetensors"))
    return made


@pytest.mark.parametrize(("name", "unit", "choice"), CASES, ids=[f"{c.criterion}-{u}" for _, u, c in CASES])
def test_a_run_removes_what_its_criterion_prunes_and_the_artifact_is_the_network(
    sources: dict[str, Source], name: str, unit: str, choice: Choice, tmp_path: Path
) -> None:
    job = PruneJob(sources[name], (choice,), tmp_path / "a", recalibrate=False)
    metrics = run_prune(job)

    plan = read_structure(tmp_path / "a")["plan"]
    types = {removal.get("type", "channels") for removal in plan["removals"]}
    assert types == {unit}
    assert plan["made_by"]["criterion"] == choice.criterion if "criterion" in plan["made_by"] else True
    assert plan["macs"][1] < plan["macs"][0]
    loaded = load_pruned(tmp_path / "a")
    assert evaluate(loaded, load_data("digits").test).top1 == metrics["pruned"]["top1"]
    assert unit[:-1] in (tmp_path / "a" / "report.md").read_text()
    assert ("kernels" in json.loads((tmp_path / "a" / "metrics.json").read_text())) == (unit == "kernels")
    if unit == "kernels":
        effective = metrics["kernels"]["params"]["effective"]
        assert effective == plan["params"][1] < metrics["pruned"]["params"]


def test_feature_maps_first_kernels_second(sources: dict[str, Source], tmp_path: Path) -> None:
    choices = Choice("coarse", criterion_options=COARSE).in_stages({"channel": 0.3, "kernel": 0.4})
    metrics = run_prune(PruneJob(sources["digits_cnn"], choices, tmp_path / "a", recalibrate=False))

    stages: list[Any] = read_structure(tmp_path / "a")["plan"]["stages"]
    types = [{removal.get("type", "channels") for removal in stage["removals"]} for stage in stages]
    assert types == [{"channels"}, {"kernels"}]
    top1 = evaluate(load_pruned(tmp_path / "a"), load_data("digits").test).top1
    assert top1 == metrics["pruned"]["top1"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            Choice("coarse", ratio=0.5, granularity="kernel", criterion_options={"proposal": "d_score"}),
            "kernels",
        ),
        (Choice("coarse", ratio=0.5, criterion_options={"proposal": "dependency"}), "did you mean"),
        (Choice("dcp", ratio=0.5, granularity="kernel"), "prunes channels, not kernels"),
        (Choice("energy", ratio=0.5, criterion_options={"rounds": 0}), "rounds"),
    ],
)
def test_a_choice_that_cannot_be_searched_is_refused_before_any_work(choice: Choice, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        choice.check()


def test_a_proposal_must_fit_both_stages() -> None:
    choice = Choice("coarse", criterion_options={"proposal": "d_score"})
    channels, kernels = choice.in_stages({"channel": 0.3, "kernel": 0.5})
    channels.check()
    with pytest.raises(CriterionError, match="'d_score' does not score kernels.*one of synaptic_strength"):
        kernels.check()


def test_a_searched_plan_is_the_same_again(sources: dict[str, Source]) -> None:
    choice = Choice("coarse", ratio=0.3, criterion_options=COARSE)
    first, second = (run_plan(sources["digits_cnn"], choice) for _ in range(2))
    assert first == second
