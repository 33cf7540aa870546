from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscore_plugin.datasets import ImageSet
from dscore_plugin.errors import ArtifactError, BudgetError, DataError
from dscore_plugin.files import read_json
from dscore_plugin.groups import removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.masking import masked
from dscore_plugin.selection import candidates as random_masks
from dscore_plugin.selection.candidates import NetworkMask, Options, Pool, Search, sample_candidate, search
from dscore_plugin.selection.journal import Journal
from dscore_plugin.selection.processes import Processes
from tests.architectures import SMALL
from tests.selection.candidates_in_processes import found, summary
from tests.selection.helpers import forwards_are_their_own, labelled_images, network

SHAPE = (1, 8, 8)
LITERAL = [[4, 6, 7, 8, 13], [3, 4, 6, 13, 17, 19, 21, 23, 24]]  # of seed 0, number 7; it may never change


def channel_pools(model: nn.Module, shape: tuple[int, ...], ratio: float = 0.3) -> list[Pool]:
    groups = PruningGraph(model, (torch.zeros(1, *shape),)).prunable
    return [Pool(g.name, g.units, removal_count(ratio, g.units), g) for g in groups]


def kernel_pools(model: nn.Module, ratio: float = 0.3) -> list[Pool]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    sizes = {name: m.weight.shape[0] * m.weight.shape[1] for name, m in list(layers.items())[1:]}
    return [Pool(name, size, removal_count(ratio, size)) for name, size in sizes.items()]


# Drawing ----------------------------------------------------------------------------------------------------


def test_candidates_are_uniform_over_all_joint_masks() -> None:
    pools = [Pool("a", 4, 2), Pool("b", 3, 1)]
    drawn = Counter(
        tuple(tuple(part.tolist()) for part in sample_candidate(pools, 11, index).removed.values())
        for index in range(3600)
    )
    allowed = {(a, b) for a in combinations(range(4), 2) for b in combinations(range(3), 1)}
    assert set(drawn) == allowed
    assert sum((drawn[mask] - 200) ** 2 / 200 for mask in allowed) < 47.6  # 17 degrees of freedom, p = 1e-4


def test_a_candidate_is_told_by_seed_and_number() -> None:
    pools = [Pool("a", 16, 5), Pool("b", 32, 9)]

    def drawn(seed: int, index: int) -> list[list[int]]:
        return [part.tolist() for part in sample_candidate(pools, seed, index).removed.values()]

    assert drawn(0, 7) == LITERAL
    different = {str(drawn(seed, index)) for seed in range(5) for index in range(20)}
    assert len(different) == 100
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert drawn(0, 7) == LITERAL
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_candidate_around_scores_is_what_the_scores_remove() -> None:
    scores = torch.tensor([0.3, 0.1, 0.8, 0.1, 0.9, 0.2])
    pools = [Pool("a", 6, 3, scores=scores)]
    assert sample_candidate(pools, 5, 0).removed["a"].tolist() == [1, 3, 5]
    others = {tuple(sample_candidate(pools, 5, i, 0.5).removed["a"].tolist()) for i in range(1, 200)}
    assert len(others) > 10


# Searching --------------------------------------------------------------------------------------------------


def naive(model: nn.Module, pools: list[Pool], drawn: NetworkMask, images: ImageSet) -> int:
    """Copy, mask, evaluate."""
    copied = copy.deepcopy(model)
    inputs, labels = images.__getitems__(list(range(len(images))))
    for pool in pools:
        if pool.group is None:
            weight = copied.get_submodule(pool.name).weight.data
            for place in drawn.removed[pool.name].tolist():
                weight[place // weight.shape[1], place % weight.shape[1]] = 0
    silenced = [(p.group, drawn.removed[p.name].tolist()) for p in pools if p.group is not None]
    with masked(copied, silenced), torch.no_grad():
        return int((copied(inputs).argmax(1) == labels).sum())


NETWORKS: dict[str, tuple[str, tuple[int, ...], float, dict[str, Any]]] = {
    "digits": ("digits_cnn", SHAPE, 0.3, {}),
    "inner": ("cifar_resnet20", (3, 16, 16), 0.07, {}),
    "residual_sums": ("cifar_resnet20", (3, 16, 16), 0.07, {"shortcut": "conv"}),
    "depthwise": ("mobilenetv2_100", (3, 32, 32), 0.04, {"num_classes": 5}),
    "layer_norm": ("convnext_atto", (3, 32, 32), 0.02, {"num_classes": 5}),
}


@pytest.mark.parametrize(
    ("name", "kind", "fold"),
    [
        ("digits", "channel", True),
        ("digits", "channel", False),
        ("digits", "kernel", True),
        ("inner", "channel", True),
        ("inner", "kernel", False),
        ("residual_sums", "channel", False),
        ("depthwise", "channel", False),
        ("layer_norm", "channel", False),
    ],
)
def test_the_winner_and_every_count_are_those_of_the_naive_loop(name: str, kind: str, fold: bool) -> None:
    architecture, shape, ratio, arguments = NETWORKS[name]
    model = network(architecture, **arguments)
    images = labelled_images(model, 41, shape, wrong=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pools = channel_pools(model, shape, ratio) if kind == "channel" else kernel_pools(model, ratio)
    options = Options(6, seed=4, batch_size=16, fold_batchnorm=fold)
    result = search(model, pools, images, options)
    pools = [pool for pool in pools if pool.leaving]
    expected = [naive(model, pools, sample_candidate(pools, 4, i), images) for i in range(6)]
    assert len(set(expected)) > 1
    assert list(result.correct) == expected
    assert result.seen == (41,) * 6
    assert result.winner.index == expected.index(max(expected))
    assert result.mcr == pytest.approx(100 * (1 - max(expected) / 41))
    assert result.evaluations == 6 * 41
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert forwards_are_their_own(model)


def test_networks_of_volumes_are_searched() -> None:
    model, shape = SMALL["conv_3d"].randomised(), SMALL["conv_3d"].shape
    images, pools = labelled_images(model, 30, shape, wrong=3), channel_pools(model, shape, 0.5)
    expected = [naive(model, pools, sample_candidate(pools, 0, i), images) for i in range(3)]
    assert list(search(model, pools, images, Options(3)).correct) == expected


def test_memory_decides_the_pieces_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("digits_cnn")
    images, pools = labelled_images(model, 50, SHAPE, wrong=5), channel_pools(model, SHAPE)
    whole = search(model, pools, images, Options(5, batch_size=8))
    loads = []
    load = random_masks._Bench._recorded
    monkeypatch.setattr(
        random_masks._Bench, "_recorded", lambda bench, batches: loads.append(0) or load(bench, batches)
    )
    assert search(model, pools, images, Options(5, batch_size=8, memory_limit=1)).correct == whole.correct
    assert len(loads) > 4


def result(correct: list[int], seen: list[int] | None = None) -> Search:
    seen = seen or [100] * len(correct)
    return Search(
        NetworkMask(max(range(len(correct)), key=correct.__getitem__), {}), 100, tuple(seen), tuple(correct)
    )


def test_the_curve_of_the_best_so_far() -> None:
    found = result([30, 20, 55, 90, 56], [100, 100, 100, 25, 100])
    assert found.best_so_far == (70, 70, 45, 45, 44)
    assert [found.best_of(n) for n in (1, 2, 3, 4, 5)] == [0, 0, 2, 2, 4]
    assert result([30, 50, 50]).best_of(3) == 1


# Racing, and how many ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [8, 21, 40])
def test_racing_evaluates_at_least_three_times_fewer_images(number: int) -> None:
    model = network("digits_cnn")
    images, pools = labelled_images(model, 80, SHAPE, wrong=8), channel_pools(model, SHAPE)
    full = search(model, pools, images, Options(number, seed=1))
    raced = search(model, pools, images, Options(number, seed=1, racing=True))
    assert full.evaluations == 80 * number
    assert raced.evaluations * 3 <= full.evaluations
    survivors = [i for i, seen in enumerate(raced.seen) if seen == 80]
    assert len(survivors) == -(-number // 8)
    assert raced.winner.index == max(survivors, key=lambda i: (full.correct[i], -i))
    assert all(raced.correct[i] == full.correct[i] for i in survivors)
    assert sorted(Counter(raced.seen)) == [10, 20, 40, 80]


def test_the_better_half_goes_on_from_rung_to_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(bench: Any, candidate: NetworkMask, first: int, last: int) -> int:
        return (7 * candidate.index % 20) * (last - first) // 20

    monkeypatch.setattr(random_masks._Bench, "correct", right)
    model = network("digits_cnn")
    images = labelled_images(model, 160, SHAPE)
    raced = search(model, channel_pools(model, SHAPE), images, Options(20, racing=True))
    quality = sorted(range(20), key=lambda index: -(7 * index % 20))
    for images_seen, survivors in ((20, 20), (40, 10), (80, 5), (160, 3)):
        assert {i for i, seen in enumerate(raced.seen) if seen >= images_seen} == set(quality[:survivors])
    assert raced.winner.index == quality[0]


@pytest.mark.parametrize(
    ("better", "number", "winner"),
    [
        ({40: 24}, 50, 40),  # 5 points better, and the standard error of 24 out of 80 is 5.1
        ({40: 26}, 100, 40),  # 7.5 points better, and the standard error of 26 out of 80 is 5.2
        ({40: 40, 130: 72}, 100, 40),  # nothing between 50 and 100: number 130 is never drawn
        ({10: 21, 49: 40, 51: 60, 199: 80}, 400, 199),
        ({}, 50, 0),
    ],
)
def test_auto_doubles_until_the_best_has_stopped_improving(
    better: dict[int, int], number: int, winner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right(bench: Any, candidate: NetworkMask, first: int, last: int) -> int:
        return max(
            0, min(last, better.get(candidate.index, 20)) - first
        )  # the first images are the easy ones

    monkeypatch.setattr(random_masks._Bench, "correct", right)
    model = network("digits_cnn")
    found = search(model, channel_pools(model, SHAPE), labelled_images(model, 80, SHAPE), Options("auto"))
    assert (len(found.seen), found.winner.index) == (number, winner)


def test_auto_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_masks, "_improves", lambda *_: True)
    monkeypatch.setattr(random_masks._Bench, "correct", lambda *_: 0)
    model = network("digits_cnn")
    images = labelled_images(model, 8, SHAPE)
    assert len(search(model, channel_pools(model, SHAPE), images, Options("auto")).seen) == 1600


# Resuming, several processes --------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network("digits_cnn")
    images, pools = labelled_images(model, 40, SHAPE, wrong=4), channel_pools(model, SHAPE)
    expected, file = search(model, pools, images, Options(9)), tmp_path / "new" / "measured.jsonl"
    add, written = Journal.add, []

    def interrupted(self: Journal, record: Any) -> None:
        if len(written) == 14:
            raise KeyboardInterrupt
        written.append(record)
        add(self, record)

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(model, pools, images, Options(9), checkpoint=file)
    assert forwards_are_their_own(model)
    again: list[Any] = []
    monkeypatch.setattr(Journal, "add", lambda self, record: again.append(record) or add(self, record))
    assert search(model, pools, images, Options(9), checkpoint=file, resume=True).correct == expected.correct
    assert len(again) == 9 * 4 - 14
    again.clear()
    raced = search(model, pools, images, Options(9, racing=True), checkpoint=file, resume=True)
    longer = search(model, pools, images, Options(11), checkpoint=file, resume=True)
    assert len(again) == 2 * 4  # racing found everything there
    assert longer.correct[:9] == expected.correct
    assert raced.evaluations < expected.evaluations
    with pytest.raises(ArtifactError, match="exists|unfinished"):
        search(model, pools, images, Options(9), checkpoint=file)
    with pytest.raises(ArtifactError, match="seed differ"):
        search(model, pools, images, Options(9, seed=1), checkpoint=file, resume=True)
    fewer = [replace(pool, leaving=1) for pool in pools]
    with pytest.raises(ArtifactError, match="pools differ"):
        search(model, fewer, images, Options(9), checkpoint=file, resume=True)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    script = Path(__file__).with_name("candidates_in_processes.py")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *two, str(script), str(tmp_path)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = [summary(found(racing)) for racing in (False, True)]
    assert [read_json(tmp_path / f"rank{rank}.json") for rank in (0, 1)] == [expected, expected]
    lines = (tmp_path / "False.jsonl").read_text().splitlines()[1:]
    assert len(lines) == 13 * 4  # each was measured once


@pytest.mark.parametrize("number", [2, 3])
def test_any_number_of_processes_divides_all_candidates(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []
    for index in range(number):
        process = Processes()
        process.index, process.number = index, number
        processes.append(process.share(range(13), lambda _: 1.0))
    assert sorted(i for mine in processes for i in mine) == list(range(13))


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(0), "candidates must be a number"),
        (Options("many"), "'auto'; got 'many'"),  # type: ignore[arg-type]
        (Options(True), "candidates must be"),
        (Options(batch_size=0), "batch_size"),
        (Options(temperature=0), "temperature"),
        (Options(seed=-1), "seed"),
    ],
)
def test_options_out_of_range_are_refused(options: Options, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        search(nn.Linear(1, 1), [Pool("a", 4, 2)], ImageSet(None, torch.arange(0)), options)  # type: ignore[arg-type]


def test_what_cannot_be_searched_is_refused() -> None:
    model = network("digits_cnn")
    images, pools = labelled_images(model, 4, SHAPE), channel_pools(model, SHAPE)
    with pytest.raises(BudgetError, match="nothing would leave"):
        search(model, [replace(pool, leaving=0) for pool in pools], images)
    with pytest.raises(BudgetError, match="16 of 16 cannot leave"):
        search(model, [replace(pool, leaving=pool.size) for pool in pools if pool.size == 16], images)
    with pytest.raises(DataError):
        search(model, pools, ImageSet(images.source, torch.arange(0)))


def test_a_network_without_batch_norms_is_measured_as_it_is() -> None:
    architecture = SMALL["group_norm"]
    model = architecture.randomised()
    images = labelled_images(model, 20, architecture.shape)
    pools = [pool for pool in channel_pools(model, architecture.shape) if pool.leaving]
    counts = search(model, pools, images, Options(4)).correct
    assert list(counts) == [naive(model, pools, sample_candidate(pools, 0, i), images) for i in range(4)]
