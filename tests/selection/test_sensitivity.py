from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dscore_plugin.criteria.d_score import d_score
from dscore_plugin.errors import ArtifactError, BudgetError, DataError, ModelError, PlanError
from dscore_plugin.groups import ChannelGroup, Member, Role, ScoredGroup, removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.plan import ChannelRemoval, fingerprint
from dscore_plugin.planning import score_groups
from dscore_plugin.registry import get_criterion
from dscore_plugin.selection import measurement
from dscore_plugin.selection.allocation import Limits, total
from dscore_plugin.selection.processes import Processes
from dscore_plugin.selection.sensitivity import (
    RATIOS,
    Sensitivity,
    SensitivityPath,
    check_ratios,
    ratio_key,
    reranked,
    sensitivity_analysis,
)
from dscore_plugin.training.evaluation import evaluate
from tests.architectures import SMALL
from tests.selection.helpers import (
    forwards_are_their_own,
    labelled_images,
    network,
    scored_groups,
)
from tests.selection.several_processes import SHAPE, measure

COARSE = (0.1, 0.3, 0.5, 0.7, 0.9)


def removed(model: nn.Module, item: ScoredGroup, count: int, shape: tuple[int, ...]) -> nn.Module:
    """A copy without a group's first units, removed by DepGraph."""
    channels = item.group.root_channels(item.order[:count])
    removals = [ChannelRemoval(item.group.name, channels)] if count else []
    return remove_channels(copy.deepcopy(model), (torch.zeros(1, *shape),), removals)


@pytest.mark.parametrize(
    ("name", "shape", "every"),
    [
        ("digits_cnn", (1, 8, 8), 1),
        ("cifar_resnet20", (3, 16, 16), 3),
        ("mobilenetv2_100", (3, 32, 32), 8),
        ("convnext_atto", (3, 32, 32), 6),
    ],
)
def test_masks_give_the_accuracies_of_physical_removal(name: str, shape: tuple[int, ...], every: int) -> None:
    model = network(name)
    images = labelled_images(model, 50, shape, wrong=7)
    scored = scored_groups(model, shape)[::every]
    table = sensitivity_analysis(model, scored, images, ratios=COARSE, batch_size=20)

    assert table.dense_top1 == evaluate(model, images).top1 == 86.0
    assert list(table.layers) == [item.group.name for item in scored]
    seen = set()
    for item in scored:
        for ratio in COARSE:
            smaller = removed(model, item, removal_count(ratio, item.group.units), shape)
            expected = evaluate(smaller, images).top1
            assert table.layers[item.group.name][ratio_key(ratio)] == expected, (item.group.name, ratio)
            seen.add(expected)
    assert len(seen) > 3


def test_networks_of_volumes_are_measured() -> None:
    model, shape = SMALL["conv_3d"].randomised(), SMALL["conv_3d"].shape
    images, scored = labelled_images(model, 30, shape, wrong=3), scored_groups(model, shape)
    table = sensitivity_analysis(model, scored, images, ratios=(0.5,))
    for item in scored:
        smaller = removed(model, item, removal_count(0.5, item.group.units), shape)
        assert table.layers[item.group.name]["0.50"] == evaluate(smaller, images).top1


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, list[ScoredGroup], Any]:
    model = network("digits_cnn")
    return model, scored_groups(model, SHAPE), labelled_images(model, 60, SHAPE, wrong=5)


@pytest.fixture(scope="module")
def whole(digits: Any) -> Sensitivity:
    return sensitivity_analysis(*digits, criterion="random")


def test_the_table_says_what_was_measured(digits: Any, whole: Sensitivity) -> None:
    model, scored, images = digits
    assert (whole.images, whole.ratios, whole.protocol, whole.criterion) == (
        60,
        RATIOS,
        "validation",
        "random",
    )
    assert whole.fingerprint == fingerprint(model)
    assert whole.orders == {item.group.name: item.order for item in scored}
    assert set(whole.layers["features.0"]) == {f"{5 * step / 100:.2f}" for step in range(1, 20)}
    assert whole.layers["features.0"]["0.05"] == whole.dense_top1  # floor(0.05 * 16) = 0
    assert whole.floor == 0


def test_the_network_is_not_touched(digits: Any) -> None:
    model, scored, images = digits
    model = copy.deepcopy(model).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sensitivity_analysis(model, scored, images, ratios=(0.5,), fold_batchnorm=True)
    assert all(module.training for module in model.modules())
    assert forwards_are_their_own(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.stride() == value.stride() for p, value in zip(model.state_dict().values(), state.values()))  # noqa: B905


@pytest.mark.parametrize(
    "options",
    [
        {"memory_limit": 1},  # nothing fits: every pass computes everything
        {"memory_limit": 50_000, "batch_size": 10},  # six parts
        {"memory_limit": 100_000, "batch_size": 7},  # three parts, the last one smaller
        {"fold_batchnorm": True},
        {"batch_size": 1000},
    ],
)
def test_how_it_is_measured_does_not_change_the_table(
    digits: Any, whole: Sensitivity, options: dict[str, Any]
) -> None:
    table = sensitivity_analysis(*digits, criterion="random", **options)
    assert table.layers == whole.layers
    assert table.dense_top1 == whole.dense_top1


def count_passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count batches that are evaluated and prefixes that are recorded."""
    passes: Counter[str] = Counter()
    for cls, name in ((measurement.Measurement, "_correct"), (measurement.Replay, "record")):
        own = getattr(cls, name)

        def counted(*args: Any, own: Any = own, name: str = name) -> Any:
            passes[name] += 1
            return own(*args)

        monkeypatch.setattr(cls, name, counted)
    return passes


def test_equal_counts_are_measured_once(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scored, images = digits
    passes = count_passes(monkeypatch)
    (item,) = (item for item in scored if item.group.units == 16)
    sensitivity_analysis(model, [item], images, batch_size=30)
    assert passes == {"_correct": 2 * (1 + 15), "record": 2}  # dense, and 1 to 15 units


class Aliasing(nn.Module):
    """Reads a tensor again after a module has changed it in place, which a replay cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.activation = nn.Conv2d(3, 8, 3), nn.Tanh()
        self.activation.forward = torch.tanh_  # type: ignore[method-assign]
        self.second, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.activation(y)
        return self.last((self.second(z) * y.std()).mean((2, 3)))


def test_what_cannot_be_replayed_is_computed() -> None:
    torch.manual_seed(0)
    model = Aliasing().eval()
    images = labelled_images(model, 40, (3, 6, 6))
    first = ChannelGroup("first", 8, 1, _members(("first", Role.PRODUCER), ("second", Role.CONSUMER)))
    scored = [ScoredGroup(first, torch.arange(8.0))]
    table = sensitivity_analysis(model, scored, images, ratios=COARSE, batch_size=20)
    everything = sensitivity_analysis(model, scored, images, ratios=COARSE, batch_size=20, memory_limit=1)
    assert table.layers == everything.layers
    assert table.dense_top1 == 100
    assert len(set(table.curve("first"))) > 2


def _members(*roles: tuple[str, Role]) -> tuple[Member, ...]:
    every = torch.arange(8)
    return tuple(Member(module, role, every, every, 8) for module, role in roles)


def test_it_stops_cleanly_when_the_network_fails(digits: Any) -> None:
    model, scored, images = digits
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("no more")

    handle = model.get_submodule(scored[-1].group.name).register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="no more"):
            sensitivity_analysis(model, scored, images, ratios=COARSE)
    finally:
        handle.remove()
    assert forwards_are_their_own(model)
    assert not torch.is_inference_mode_enabled()


# The early exit ---------------------------------------------------------------------------------------------


def cut_off(table: Sensitivity, layer: str, floor: float) -> tuple[float | None, ...]:
    """What an early exit should leave of a curve: everything up to the first count that falls below the floor."""
    counts = [removal_count(ratio, len(table.orders[layer])) for ratio in table.ratios]
    measured = list(zip(counts, table.curve(layer), strict=True))
    failing = next((count for count, top1 in measured if top1 < floor), max(counts))
    return tuple(top1 if count <= failing else None for count, top1 in measured)


@pytest.mark.parametrize("points", [1, 10, 30, 60])
@pytest.mark.parametrize("options", [{}, {"memory_limit": 50_000, "batch_size": 10}, {"memory_limit": 1}])
def test_early_exit_leaves_out_what_the_rule_does_not_need(
    whole: Sensitivity, digits: Any, points: float, options: dict[str, Any]
) -> None:
    table = sensitivity_analysis(*digits, early_exit=points, **options)
    assert table.floor == whole.dense_top1 - points
    for layer in whole.layers:
        assert table.curve(layer) == cut_off(whole, layer, table.floor)
    for drop in (0, points / 2, points):
        threshold = whole.dense_top1 - drop
        assert table.ratios_at(threshold) == whole.ratios_at(threshold)


def test_early_exit_saves_passes(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_passes(monkeypatch)
    sensitivity_analysis(*digits, batch_size=10)
    everything = passes["_correct"]
    passes.clear()
    sensitivity_analysis(*digits, batch_size=10, early_exit=20)
    assert passes["_correct"] < 0.8 * everything


def test_a_threshold_below_the_floor_is_refused(digits: Any) -> None:
    table = sensitivity_analysis(*digits, early_exit=20, ratios=COARSE)
    with pytest.raises(BudgetError, match=r"lies below 71\.67 %, .* early_exit=31\.7 or without"):
        table.ratios_at(60)


# The threshold rule -----------------------------------------------------------------------------------------


def table_of(layers: dict[str, list[float | None]], dense: float = 92.0, units: int = 40) -> Sensitivity:
    ratios = tuple(step / 10 for step in range(1, len(next(iter(layers.values()))) + 1))
    return Sensitivity(
        dense,
        1000,
        ratios,
        {name: dict(zip(map(ratio_key, ratios), curve, strict=True)) for name, curve in layers.items()},
        {name: tuple(range(units)) for name in layers},
        criterion="by hand",
    )


def test_the_rule_by_hand() -> None:
    table = table_of(
        {
            "falls at once": [89.9, 95.0, 95.0, 95.0],
            "falls": [91.0, 90.0, 89.9, 80.0],
            "recovers": [91.0, 89.0, 91.0, 91.0],
            "stays": [92.0, 91.9, 90.5, 90.0],
        }
    )
    expected = {"falls at once": 0.0, "falls": 0.2, "recovers": 0.1, "stays": 0.4}
    assert table.ratios_at(90) == expected
    assert set(table.ratios_at(0).values()) == {0.4}
    assert table.ratios_at(92) == {"falls at once": 0.0, "falls": 0.0, "recovers": 0.0, "stays": 0.1}


def test_a_threshold_on_an_accuracy_keeps_it_in_spite_of_rounding() -> None:
    table = table_of({"layer": [100 * 1827 / 2000, 50.0]}, dense=93.35)
    assert table.ratios_at(93.35 - 2) == {"layer": 0.1}


@pytest.mark.parametrize("threshold", [92.1, 100, -1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(BudgetError, match=r"between 0 and the dense accuracy on these images, 92\.00 %"):
        table_of({"layer": [50.0]}).ratios_at(threshold)


def scored_for(table: Sensitivity) -> list[ScoredGroup]:
    return [
        ScoredGroup(ChannelGroup(name, len(order), 1, ()), torch.arange(len(order), dtype=torch.float64))
        for name, order in table.orders.items()
    ]


curves = st.lists(st.floats(0, 100), min_size=4, max_size=4)


@given(
    layers=st.dictionaries(st.sampled_from("abc"), curves, min_size=1),
    dense=st.floats(1, 100),
    places=st.lists(st.floats(0, 1), min_size=2, max_size=6),
)
def test_the_path_goes_from_nothing_to_everything(
    layers: dict[str, list[float | None]], dense: float, places: list[float]
) -> None:
    table = table_of(layers, dense)
    scored = scored_for(table)
    path = SensitivityPath(table, scored, Limits(scored))
    assert total(path.at(0)) == 0
    assert path.at(1) == dict.fromkeys(layers, 16)  # floor(0.4 * 40)
    counts = [path.at(t) for t in sorted(places)]
    for earlier, later in zip(counts, counts[1:], strict=False):
        assert all(earlier[name] <= later[name] for name in layers)
    for t in places:
        threshold = path.threshold(t)
        if threshold <= dense:
            rule = table.ratios_at(max(0, threshold))
            assert path.at(t) == {name: removal_count(ratio, 40) for name, ratio in rule.items()}


def test_the_path_ends_at_the_floor_of_an_early_exit(digits: Any) -> None:
    model, scored, images = digits
    table = sensitivity_analysis(model, scored, images, early_exit=20)
    path = SensitivityPath(table, scored, Limits(scored))
    ratios = table.ratios_at(table.floor)
    assert path.at(1) == {i.group.name: removal_count(ratios[i.group.name], i.group.units) for i in scored}
    assert 0 < total(path.at(1)) < sum(i.group.units for i in scored) * 0.95


def test_the_path_respects_limits() -> None:
    table = table_of({"layer": [90.0, 90.0, 90.0, 90.0]})
    scored = scored_for(table)
    assert SensitivityPath(table, scored, Limits(scored, min_channels=30)).at(1) == {"layer": 10}
    assert SensitivityPath(table, scored, Limits(scored, round_to=16)).at(1) == {"layer": 8}
    assert SensitivityPath(table, scored, Limits(scored)).counts(90.0) == {"layer": 16}


def test_the_path_refuses_other_scores() -> None:
    table = table_of({"layer": [90.0]}, units=3)
    (item,) = scored_for(table)
    other = replace(item, scores=torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    with pytest.raises(PlanError, match=r"'layer' was measured with other scores \(criterion 'by hand'\)"):
        SensitivityPath(table, [other], Limits([other]))
    unknown = ScoredGroup(ChannelGroup("new", 3, 1, ()), torch.zeros(3))
    with pytest.raises(PlanError, match="has no layer 'new'"):
        SensitivityPath(table, [item, unknown], Limits([item, unknown]))


# The paper's cumulative ranking -----------------------------------------------------------------------------


def test_reranking_by_hand() -> None:
    """Each step removes what is nearest to the mean of what is left."""
    values = torch.tensor([0.0, 1.0, 2.0, 10.0, 20.0, 40.0, 41.0, 50.0])
    item = ScoredGroup(ChannelGroup("layer", 8, 1, ()), torch.arange(8.0))
    seen = []

    def nearest_to_the_mean(group: ScoredGroup, left: Tensor) -> Tensor:
        assert group is item
        seen.append(left.tolist())
        return (values[left] - values[left].mean()).abs()

    (ordered,) = reranked([item], (0.5, 0.25), nearest_to_the_mean)
    # mean 20.5: 20, then 10 leave; mean 22.33 of the rest: 40, then 41 (18.67) leave; then mean 13.25: 2, 1, 0, 50
    assert ordered.order == (4, 3, 5, 6, 2, 1, 0, 7)
    assert seen == [list(range(8)), [0, 1, 2, 5, 6, 7], [0, 1, 2, 7]]
    assert float(ordered.scores.max()) == 1


def test_reranking_with_a_criterion_that_scores_each_alone_changes_nothing() -> None:
    model = network("digits_cnn")
    graph = PruningGraph(model, (torch.zeros(1, *SHAPE),))
    scored = score_groups(graph, get_criterion("l1"))

    def rescore(item: ScoredGroup, left: Tensor) -> Tensor:
        return item.scores[left]

    for before, after in zip(scored, reranked(scored, RATIOS, rescore), strict=True):
        assert after.order == before.order
        assert after.group is before.group


def test_reranking_d_score_on_pruned_copies_is_the_papers_procedure() -> None:
    """Against a transcription: take filters out of the weight itself, and rank what is left."""
    model = network("digits_cnn")
    info = get_criterion("d_score")
    importance = info.build()

    def rescore(item: ScoredGroup, left: Tensor) -> Tensor:
        gone = sorted(set(range(item.group.units)) - set(left.tolist()))
        whole = replace(item, scores=torch.ones(item.group.units).index_fill(0, torch.tensor(gone).long(), 0))
        smaller = removed(model, whole, len(gone), SHAPE)
        graph = PruningGraph(smaller, (torch.zeros(1, *SHAPE),))
        (group,) = (group for group in graph.prunable if group.name == item.group.name)
        return graph.score(group, importance).scores

    graph = PruningGraph(model, (torch.zeros(1, *SHAPE),))
    scored = score_groups(graph, info)
    differs = False
    for before, after in zip(scored, reranked(scored, RATIOS, rescore), strict=True):
        weight = model.get_submodule(before.group.name).weight.detach()
        names, gone = list(range(len(weight))), []
        for ratio in RATIOS:
            count = removal_count(ratio, before.group.units) - len(gone)
            lowest = torch.argsort(d_score(weight), stable=True)[:count].tolist()
            gone += [names[place] for place in lowest]
            stays = [place for place in range(len(names)) if place not in lowest]
            names, weight = [names[place] for place in stays], weight[stays]
        assert after.order[: len(gone)] == tuple(gone)
        differs |= after.order != before.order
    assert differs


# Resuming, several processes --------------------------------------------------------------------------------


def start(task: str, folder: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("several_processes.py")
    return subprocess.run(
        [sys.executable, *launcher, str(script), task, str(folder)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def expected() -> Sensitivity:
    table = measure()
    assert any(None in table.curve(layer) for layer in table.layers)
    return table


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "measured.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_a_killed_run_goes_on_to_the_same_table(tmp_path: Path, expected: Sensitivity) -> None:
    killed = start("killed", tmp_path)
    assert killed.returncode == -9, killed.stderr[-2000:]
    before = records(tmp_path)
    assert len(before) == 5
    assert not (tmp_path / "0").exists()

    table = measure(checkpoint=tmp_path / "measured.jsonl", resume=True)
    assert table == expected
    after = records(tmp_path)
    assert after[:5] == before
    assert len({(r["layer"], *r["images"]) for r in after}) == len(after)

    again = measure(checkpoint=tmp_path / "measured.jsonl", resume=True)
    assert again == expected
    assert records(tmp_path) == after


def test_a_resumed_run_uses_what_it_finds(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    measure(checkpoint=path, early_exit=None)
    header, *lines = path.read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    for record in changed:
        record["correct"] = dict.fromkeys(record["correct"], 3)
    path.write_text("\n".join([header, *map(json.dumps, changed)]) + "\n")
    table = measure(checkpoint=path, early_exit=None, resume=True)
    parts = len(lines) // len(table.layers)
    assert parts > 1
    assert {x for layer in table.layers for x in table.curve(layer)} == {100 * 3 * parts / 60}


def test_two_processes_give_the_table_of_one(tmp_path: Path, expected: Sensitivity) -> None:
    done = start("whole", tmp_path, TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = [Sensitivity.load(tmp_path / rank / "sensitivity.json") for rank in ("0", "1")]
    assert tables == [expected, expected]
    measured = [(r["layer"], *r["images"]) for r in records(tmp_path)]
    assert len(set(measured)) == len(measured) == 4 * len(expected.layers)  # no group twice

    refused = start("whole", tmp_path, TWO)
    assert refused.returncode != 0
    assert refused.stderr.count("holds an unfinished measurement") >= 2

    # one process goes on with what two have measured
    assert measure(checkpoint=tmp_path / "measured.jsonl", resume=True) == expected
    assert len(records(tmp_path)) == len(measured)


@given(costs=st.lists(st.integers(1, 100), min_size=1, max_size=20), number=st.integers(1, 5))
def test_every_task_belongs_to_one_process_and_none_has_much_more(costs: list[int], number: int) -> None:
    tasks = list(enumerate(costs))
    shares = []
    for index in range(number):
        processes = Processes()
        processes.index, processes.number = index, number
        shares.append(processes.share(tasks, lambda task: task[1]))
    assert sorted(task for share in shares for task in share) == tasks
    loads = [sum(cost for _, cost in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


def test_processes_that_do_not_know_of_each_other_are_refused(
    digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match="2 processes were launched but accelerate works with 1"):
        sensitivity_analysis(*digits)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"ratios": (0.1, 0.3)}, "ratios"),
        ({"criterion": "d_score"}, "criterion"),
        ({"early_exit": 10.0}, "early_exit"),
        ({"protocol": "test"}, "protocol"),
        ({"fold_batchnorm": True}, "fold_batchnorm"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    path = tmp_path / "deeper" / "measured.jsonl"
    measure(checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=rf"belongs to another measurement \({what} differ\)"):
        measure(checkpoint=path, resume=True, **options)
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_weights_scores_or_images_is_refused(tmp_path: Path, digits: Any) -> None:
    model, scored, images = digits
    path = tmp_path / "measured.jsonl"
    sensitivity_analysis(model, scored, images, ratios=(0.5,), checkpoint=path)

    def refused(what: str, *others: Any) -> None:
        with pytest.raises(ArtifactError, match=rf"\({what} differ\)"):
            sensitivity_analysis(*others, ratios=(0.5,), checkpoint=path, resume=True)

    refused("model", network("digits_cnn", seed=1), scored, images)
    refused("scores", model, scored_groups(model, SHAPE, seed=1), images)
    refused("scores", model, scored[:-1], images)
    refused("images", model, scored, images.subset(30))
    refused("images", model, scored, labelled_images(copy.deepcopy(model), 60, SHAPE, wrong=6))


def test_a_checkpoint_is_not_overwritten(tmp_path: Path, digits: Any) -> None:
    path = tmp_path / "measured.jsonl"
    path.write_text("something else")
    with pytest.raises(ArtifactError, match="holds an unfinished measurement; go on with resume=True"):
        sensitivity_analysis(*digits, checkpoint=path)
    with pytest.raises(ArtifactError, match="belongs to another measurement"):
        sensitivity_analysis(*digits, checkpoint=path, resume=True)
    assert path.read_text() == "something else"


# Files and bad input ----------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path: Path, digits: Any) -> None:
    table = sensitivity_analysis(*digits, early_exit=20, ratios=(0.125, 0.5, 0.9), protocol="test")
    table.save(tmp_path / "new" / "folder")
    assert Sensitivity.load(tmp_path / "new/folder/sensitivity.json") == table
    assert list(table.layers["features.0"]) == ["0.125", "0.50", "0.90"]
    content = json.loads((tmp_path / "new/folder/sensitivity.json").read_text())
    assert {"dense_top1", "images", "layers", "protocol", "criterion", "fingerprint"} <= content.keys()
    with (tmp_path / "new/folder/sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == list(table.layers)
    for row in rows:
        cells = [None if row[key] == "" else float(row[key]) for key in ("0.125", "0.50", "0.90")]
        assert cells == [x if x is None else round(x, 4) for x in table.curve(row["layer"])]
        assert int(row["units"]) == len(table.orders[row["layer"]])


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("layers"),
        lambda t: t["orders"].pop("layer"),
        lambda t: t.update(orders={"layer": [0, 0, 1]}),
        lambda t: t["layers"]["layer"].pop("0.20"),
        lambda t: t["layers"]["layer"].update({"0.20": 120}),
        lambda t: t["layers"]["layer"].update({"0.20": "x"}),
        lambda t: t.update(ratios=[0.1, 2]),
        lambda t: t.update(protocol="training"),
        lambda t: t.update(format_version=2),
        lambda t: t.update(early_exit="no"),
    ],
)
def test_a_damaged_table_is_refused(damage: Any) -> None:
    content = json.loads(json.dumps(table_of({"layer": [91.0, None]}, units=3).to_dict()))
    assert Sensitivity.from_dict(copy.deepcopy(content)).layers["layer"] == {"0.10": 91.0, "0.20": None}
    damage(content)
    with pytest.raises(ArtifactError, match="sensitivity table"):
        Sensitivity.from_dict(content)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        Sensitivity.load(tmp_path / "sensitivity.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ()}, r"ratios must lie between 0 and 1 \(exclusive\), got \[\]"),
        ({"ratios": (0.5, 1.0)}, "ratios must lie"),
        ({"ratios": (0.0,)}, "ratios must lie"),
        ({"ratios": (float("nan"),)}, "ratios must lie"),
        ({"batch_size": 0}, "batch_size and memory_limit must be at least 1, got 0"),
        ({"memory_limit": 0}, "must be at least 1"),
        ({"early_exit": 0.0}, "early_exit must lie above 0"),
        ({"early_exit": float("nan")}, "early_exit must lie above 0"),
    ],
)
def test_options_out_of_range_are_refused(digits: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        sensitivity_analysis(*digits, **options)


def test_ratios_are_put_in_order() -> None:
    assert check_ratios([0.3, 0.1, 0.3]) == (0.1, 0.3)


def test_no_images_no_groups_no_classes_are_refused(digits: Any) -> None:
    model, scored, images = digits
    empty = type(images)(images.source, torch.arange(0))
    with pytest.raises(DataError, match="the set of images is empty"):
        sensitivity_analysis(model, scored, empty)
    with pytest.raises(ModelError, match="no groups of channels"):
        sensitivity_analysis(model, [], images)
    with pytest.raises(ModelError, match="expected logits"):
        sensitivity_analysis(model.features, scored_in_features(model), images)


def scored_in_features(model: nn.Module) -> list[ScoredGroup]:
    group = ChannelGroup("0", 16, 1, ())
    return [ScoredGroup(group, torch.arange(16.0))]


def test_images_are_taken_without_augmentation(digits: Any, whole: Sensitivity) -> None:
    model, scored, images = digits
    augmented = type(images)(images.source, images.indices, augmented=True)
    assert sensitivity_analysis(model, scored, augmented).layers == whole.layers


class Bar:
    """A progress bar that remembers."""

    def __init__(self) -> None:
        self.done, self.total = 0, 0

    def task(self, name: str, total: int) -> Bar:
        self.total = total
        return self

    def __enter__(self) -> Any:
        return self.advance

    def __exit__(self, *_: Any) -> None:
        pass

    def advance(self, steps: int = 1, **_: float) -> None:
        self.done += steps


@pytest.mark.parametrize("options", [{}, {"early_exit": 5.0}, {"memory_limit": 50_000, "batch_size": 7}])
def test_progress_comes_to_its_end(digits: Any, options: dict[str, Any]) -> None:
    bar = Bar()
    sensitivity_analysis(*digits, progress=bar, **options)
    assert bar.done == bar.total > 0


@pytest.mark.cifar10
def test_a_trained_network_on_cifar10(shared: Path) -> None:
    from dscore_plugin.datasets import load_data
    from dscore_plugin.models import load_weights

    model = network("cifar_resnet20")
    load_weights(model, shared / "weights" / "cifar10" / "resnet20.safetensors")
    images = load_data(f"cifar10:{shared / 'data' / 'cifar10'}").test.subset(200)
    graph = PruningGraph(model, (torch.zeros(1, 3, 32, 32),))
    scored = score_groups(graph, get_criterion("d_score"), layers="inner")[::4]
    table = sensitivity_analysis(model, scored, images, ratios=(0.25, 0.9), protocol="test")
    assert abs(table.dense_top1 - 91.67) < 5
    for item in scored:
        quarter, most = table.curve(item.group.name)
        smaller = removed(model, item, item.group.units // 4, (3, 32, 32))
        assert (
            abs(quarter - evaluate(smaller, images).top1) <= 0.5
        )  # an image on the edge may fall either way
        assert most < quarter
