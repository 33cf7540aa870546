from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dscore_plugin.costs import count
from dscore_plugin.criteria.energy import distance_correlation_sqr, distance_covariance_sqr, layer_energy
from dscore_plugin.datasets import ImageData, load_data
from dscore_plugin.errors import BudgetError, CriterionError, ModelError
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import LayerRemoval, Plan
from dscore_plugin.registry import get_criterion
from dscore_plugin.selection.energy import EnergySelector, cluster
from dscore_plugin.selection.selector import Request
from dscore_plugin.surgery.layers import find_branches
from dscore_plugin.training.progress import NoProgress
from tests.selection.helpers import forwards_are_their_own, labelled_images, network

SHAPE = (3, 8, 8)
EXAMPLE = (torch.zeros(1, *SHAPE),)


def request(goal: str = "keep_layers", amount: float = 4, **other: Any) -> Request:
    def unused(*_: Any) -> Any:
        raise AssertionError("layers need no graph of channels")

    settled = {"granularity": "layer", "seed": 0, "work": None, **other}
    return Request(
        EXAMPLE, goal=goal, amount=amount, progress=NoProgress(), say=print, trace=unused, groups=unused,
        allot=unused, write=unused, **settled,
    )  # fmt: skip


def small() -> tuple[torch.nn.Module, ImageData]:
    """A ResNet-20 that sees every class, and 60 images; a third of the labels are wrong."""
    model = network("cifar_resnet20")
    images = labelled_images(model, 60, SHAPE, wrong=20)
    return model, ImageData("small", images, images, images, 10, SHAPE, tuple("abcdefghij"))


def chosen(work: Path | None = None, goal: str = "keep_layers", amount: float = 4, **options: Any) -> Plan:
    model, data = small()
    return EnergySelector(**options).select(model, data, request(goal, amount, work=work))


def scores(plan: Plan) -> list[float | None]:
    return [row.score_max for row in plan.rows]


def kept(plan: Plan) -> list[str]:
    return [row.layer for row in plan.rows if not plan.removed(row.layer)]


def maps(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of every branch, and the logits, in one pass."""
    found: dict[str, torch.Tensor] = {}
    for branch in find_branches(model):
        hook = model.get_submodule(branch.output).register_forward_hook(
            lambda _, __, output, name=branch.name: found.__setitem__(name, output.flatten(1).clone())
        )
        with torch.no_grad():
            found["logits"] = model(images)
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda x, y: layer_energy(x, y)),
        (
            {"statistic": "u", "standardize": False, "exponent": 0.5, "aggregate": "mean"},
            lambda x, y: layer_energy(x, y, statistic="u", standardize=False, exponent=0.5, aggregate="mean"),
        ),
        ({"measure": "covariance"}, lambda x, y: distance_covariance_sqr(x, y) / x.shape[1] ** 0.5),
        ({"measure": "correlation"}, distance_correlation_sqr),
    ],
)
@pytest.mark.parametrize("labels", ["predicted", "ground_truth"])
def test_scores_are_the_criterion_of_all_maps_at_once(options, expected, labels):
    model, data = small()
    found = maps(model, data.train.source.plain(data.train.indices))
    seen = found["logits"].argmax(dim=1) if labels == "predicted" else data.train.labels
    plan = EnergySelector(labels=labels, memory_limit=200_000, **options).select(model, data, request())
    assert forwards_are_their_own(model)
    for row in plan.rows:
        assert row.score_max == pytest.approx(expected(found[row.layer], seen), rel=1e-5)


def sum_of_squares(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=9), st.data())
def test_clusters_are_the_best_there_are(values, data):
    k = data.draw(st.integers(1, len(values)))
    numbers = cluster(values, k)
    parts = [[v for v, c in zip(values, numbers, strict=True) if c == n] for n in set(numbers)]
    ordered = sorted(values)
    cuts = itertools.combinations(range(1, len(values)), k - 1)
    best = min(
        sum(sum_of_squares(ordered[a:b]) for a, b in itertools.pairwise((0, *cut, len(values))))
        for cut in cuts
    )
    assert sum(map(sum_of_squares, parts)) == pytest.approx(best, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=9), st.sampled_from(["first", "last"]), st.data())
def test_one_branch_of_each_cluster_stays(values, keep, data):
    k = data.draw(st.integers(1, len(values)))
    order = [f"b{place}" for place in range(len(values))]
    found = EnergySelector(keep=keep)._clustered(order, dict(zip(order, values, strict=True)), k)
    assert len(found) == k
    numbers = cluster(values, k)
    for number in set(numbers):
        members = [name for name, n in zip(order, numbers, strict=True) if n == number]
        assert members[0 if keep == "first" else -1] in found
        assert k > len(set(numbers)) or len(found & set(members)) == 1


def test_a_plan_keeps_k_layers_and_knows_what_they_cost(tmp_path):
    model, data = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = EnergySelector().select(model, data, request(amount=4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [row.layer for row in plan.rows] == [branch.name for branch in find_branches(model)]
    assert len(kept(plan)) == 4 == len(set(plan.made_by["clusters"]))
    assert {type(removal) for removal in plan.removals} == {LayerRemoval}
    assert all((row.score_cut is None) == (row.layer in kept(plan)) for row in plan.rows)
    assert plan.macs[0] - plan.macs[1] == sum(r.macs_saved for r in plan.rows if r.layer not in kept(plan))
    assert (plan.macs[0], plan.params[0]) == count(model, EXAMPLE)
    assert count(plan.apply(model), EXAMPLE) == (plan.macs[1], plan.params[1])
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_other_goals():
    plans = {k: chosen(amount=k) for k in range(1, 10)}
    assert plans[9].removals == ()
    for goal, place in (("target_macs", "macs"), ("target_params", "params")):
        left = {k: getattr(plan, place)[1] / getattr(plan, place)[0] for k, plan in plans.items()}
        most = max(k for k, share in left.items() if share <= 0.6)
        assert kept(chosen(goal=goal, amount=0.6)) == kept(plans[most])
    assert kept(chosen(goal="ratio", amount=0.5)) == kept(plans[5])  # floor(4.5) of nine leave
    with pytest.raises(BudgetError, match="target_macs 0.001 cannot be reached"):
        chosen(goal="target_macs", amount=0.001)


def test_the_baselines():
    model, data = small()
    rank = get_criterion("energy_rank").build_selector().select(model, data, request())
    highest = sorted(scores(rank), reverse=True)[:4]
    assert [row.score_max for row in rank.rows if row.layer in kept(rank)] == [
        score for score in scores(rank) if score in highest
    ]
    random = [
        get_criterion("random_layers").build_selector().select(model, data, request(seed=seed))
        for seed in (0, 0, 1)
    ]
    assert random[0] == random[1]
    assert kept(random[0]) != kept(random[2])
    assert [len(kept(plan)) for plan in random] == [4] * 3
    assert scores(random[0]) == [None] * 9


def test_rounds_are_averaged():
    alone = [scores(chosen(selection_images=40, rounds=1))]
    model, data = small()
    alone.append(scores(EnergySelector(selection_images=40).select(model, data, request(seed=1))))
    both = scores(chosen(selection_images=40, rounds=2))
    assert alone[0] != alone[1]
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(*alone, strict=True)])


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    whole = chosen()
    score, done = EnergySelector._score, []

    def interrupted(self: EnergySelector, distances: Any) -> float:
        done.append(None)
        if len(done) == 5:
            raise KeyboardInterrupt
        return score(self, distances)

    monkeypatch.setattr(EnergySelector, "_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chosen(work=tmp_path)
    assert chosen(work=tmp_path) == whole
    assert len(done) == 5 + 5  # four were known
    assert chosen(work=tmp_path, choice="rank").made_by["choice"] == "rank"
    assert len(done) == 10  # the baseline ranks the same scores


def test_two_processes_give_the_plan_of_one(tmp_path):
    script = Path(__file__).with_name("several_processes_energy.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    plans = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    torch.set_num_threads(1)
    assert plans[0] == plans[1] == json.loads(json.dumps(chosen().to_dict()))
    lines = next((tmp_path / "work").glob("energy-*.jsonl")).read_text().split()
    assert sum('"score"' in line for line in lines) == 9  # no branch twice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "predicte"}, "did you mean 'predicted'"),
        ({"choice": "best"}, "choice 'best' is unknown"),
        ({"rounds": 0}, "rounds must be a whole number"),
        ({"exponent": 2}, "exponent must lie between"),
    ],
)
def test_options(options, message):
    with pytest.raises(CriterionError, match=message):
        EnergySelector(**options)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"amount": 10}, BudgetError, "from 1 to 9"),
        ({"amount": 2.5}, BudgetError, "whole number"),
        ({"goal": "target_latency"}, BudgetError, "does not go with layers"),
        ({"goal": "ratio", "amount": 1.0}, BudgetError, "between 0 and 1"),
        ({"granularity": "channel"}, CriterionError, "removes whole layers"),
    ],
)
def test_requests(asked, error, message):
    model, data = small()
    with pytest.raises(error, match=message):
        EnergySelector().select(model, data, request(**asked))


def test_networks_without_branches_and_images_of_one_class():
    model, data = small()
    with pytest.raises(ModelError, match="has 0 residual branches"):
        EnergySelector().select(create_model("digits_cnn"), data, request())
    with torch.no_grad():
        model.linear.bias[3] += 1e4
    with pytest.raises(CriterionError, match="of one class"):
        EnergySelector().select(model, data, request())


@pytest.mark.cifar10
def test_the_clusters_of_a_trained_network(shared):
    model = create_model("cifar_resnet20")
    load_weights(model, shared / "weights" / "cifar10" / "resnet20.safetensors")
    data = load_data(f"cifar10:{shared / 'data' / 'cifar10'}")
    asked = Request(
        (torch.zeros(1, 3, 32, 32),), "layer", "keep_layers", 6, 0, None, NoProgress(), print, *[None] * 4
    )
    fewer = replace(data, train=data.test)  # quicker to read
    plan = EnergySelector(selection_images=200).select(model, fewer, asked)
    found = scores(plan)
    assert max(found) == found[-1]  # nothing tells the classes apart like the last branch
    assert kept(plan)[0] == "layer1.0"
