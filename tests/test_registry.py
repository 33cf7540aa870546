from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
import torch

from dscore_plugin import get_criterion, list_criteria, plan_pruning, registry
from dscore_plugin.criteria.d_score import d_score
from dscore_plugin.errors import CriterionError
from dscore_plugin.loading import load_object
from dscore_plugin.registry import ENTRY_POINTS, CriterionInfo
from tests.architectures import Residual

OURS = {"d_score", "d_step", "d_step_gm"}
BASELINES = {"l1", "l2", "fpgm", "bn_scale", "lamp", "taylor", "random"}


class SmallestFirst:
    """An importance as a third party writes it: the channel's number, from either end."""

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def __call__(self, group: Any) -> torch.Tensor:
        scores = torch.arange(len(group[0].idxs), dtype=torch.float64)
        return -scores if self.reverse else scores


def info(name: str = "theirs", **changes: Any) -> CriterionInfo:
    fields: dict[str, Any] = {
        "name": name, "kind": "score", "paper": "Somebody et al.", "arxiv": "-", "granularity": ("channel",),
        "summary": "by number", "importance": f"{__name__}:SmallestFirst",
    }  # fmt: skip
    return CriterionInfo(**{**fields, **changes})


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Pretend that an installed package offers an object as an entry point."""
    found: list[metadata.EntryPoint] = []

    def offer(loaded: Any, name: str = "theirs") -> None:
        module = type(sys)("their_package")
        module.loaded = loaded  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "their_package", module)
        found.append(metadata.EntryPoint(name, "their_package:loaded", ENTRY_POINTS))
        registry._criteria.cache_clear()

    def entry_points(*, group: str) -> list[metadata.EntryPoint]:
        return found if group == ENTRY_POINTS else []

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or type(sys)(__name__))
    monkeypatch.setattr(sys.modules[__name__], "SmallestFirst", SmallestFirst, raising=False)
    yield offer
    monkeypatch.undo()
    registry._criteria.cache_clear()


def test_the_criteria_of_the_paper_and_the_baselines_are_known() -> None:
    names = [info.name for info in list_criteria()]
    assert len(set(names)) == len(names)
    assert set(names) >= OURS | BASELINES
    assert {info.name for info in list_criteria(lambda info: info.baseline)} == BASELINES
    flags = [info.baseline for info in list_criteria()]
    assert flags == sorted(flags)  # ours first
    for name in OURS:
        assert get_criterion(name).arxiv == "2308.04470"
        assert get_criterion(name).granularity == ("channel",)


def test_metadata_says_what_a_criterion_needs() -> None:
    assert {i.name for i in list_criteria(lambda i: i.needs_gradients and i.baseline)} == {"taylor"}
    assert get_criterion("bn_scale").needs_batchnorm
    assert {i.kind for i in list_criteria(lambda i: i.needs_data and i.baseline)} == {"data_score"}


@pytest.mark.parametrize("name", sorted(OURS | BASELINES))
def test_every_importance_and_function_can_be_imported(name: str) -> None:
    criterion = get_criterion(name)
    assert callable(criterion.build())
    assert not criterion.function or callable(load_object(criterion.function))
    assert criterion.summary
    assert criterion.paper


def test_functions_are_the_pure_ones() -> None:
    assert load_object(get_criterion("d_score").function) is d_score


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("dscor", "d_score"),
        ("D-Score", "d_score"),
        ("d-step-gm", "d_step_gm"),
        ("fgpm", "fpgm"),
        ("taylr", "taylor"),
    ],
)
def test_an_unknown_name_gets_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(
        CriterionError, match=f"criterion '{wrong}' is unknown; did you mean.*'{nearest}'.*dscore list"
    ):
        get_criterion(wrong)


def test_a_name_unlike_all_others_gets_no_guess() -> None:
    with pytest.raises(CriterionError, match=r"criterion 'xyzzy' is unknown \(see: dscore list\)"):
        get_criterion("xyzzy")


def test_options_override_those_of_the_criterion() -> None:
    assert get_criterion("l1").build().p == 1
    assert get_criterion("l1").build(p=3).p == 3
    assert get_criterion("d_score").build(group_reduction="max").group_reduction == "max"


@pytest.mark.parametrize("options", [{"power": 2}, {"group_reduction": "sum"}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CriterionError, match="power|sum"):
        get_criterion("d_score").build(**options)


@pytest.mark.parametrize(
    "changes", [{"kind": "scores"}, {"granularity": ("filter",)}, {"granularity": ()}, {"kind": None}]
)
def test_unknown_kinds_and_granularities_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CriterionError, match="criterion 'theirs' has"):
        info(**changes)


def test_a_third_party_criterion_is_listed_and_used(third_party: Callable[[Any], None]) -> None:
    third_party(info())
    assert get_criterion("theirs").paper == "Somebody et al."
    assert "theirs" in {i.name for i in list_criteria(lambda i: not i.baseline)}
    x = torch.zeros(1, 3, 8, 8)
    plan = plan_pruning(Residual(), x, "theirs", ratio=0.5)
    assert plan.removed("conv1") == (0, 1, 2, 3, 4, 5)
    plan = plan_pruning(Residual(), x, "theirs", ratio=0.5, criterion_options={"reverse": True})
    assert plan.removed("conv1") == (6, 7, 8, 9, 10, 11)
    with pytest.raises(CriterionError, match="did you mean 'theirs'"):
        get_criterion("their")


def test_one_entry_point_may_bring_several(third_party: Callable[[Any], None]) -> None:
    third_party([info("one"), info("two")])
    assert {"one", "two"} <= {i.name for i in list_criteria()}


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (info("d_score"), "'theirs' redefines the criterion 'd_score'"),
        ([info("one"), info("one")], "redefines the criterion 'one'"),
        (["d_score"], "is no CriterionInfo: 'd_score'"),
        (3, "cannot be loaded: 'int' object is not iterable; repair or uninstall"),
    ],
)
def test_what_a_third_party_gets_wrong_is_said(
    third_party: Callable[[Any], None], loaded: Any, message: str
) -> None:
    third_party(loaded)
    with pytest.raises(CriterionError, match=message):
        list_criteria()


def test_a_broken_package_is_named(
    third_party: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    third_party(info())
    monkeypatch.delitem(sys.modules, "their_package")
    with pytest.raises(CriterionError, match="entry point 'theirs'.*No module named 'their_package'"):
        get_criterion("d_score")


@pytest.mark.parametrize(
    "path", ["no_such_module:Thing", "dscore_plugin.errors:Thing", "dscore_plugin.errors", ":x"]
)
def test_an_importance_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(CriterionError, match="of criterion 'theirs' cannot be imported"):
        info(importance=path).build()


def test_listing_is_light() -> None:
    code = (
        "import sys, dscore_plugin; dscore_plugin.list_criteria(); dscore_plugin.get_criterion('d_score'); "
        "heavy = {'timm', 'torch_pruning', 'nni', 'matplotlib', 'sklearn'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
