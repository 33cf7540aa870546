from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dscore_plugin.costs import Cost, CostTable, CostTerm
from dscore_plugin.groups import ChannelGroup, Member, Role
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.plan import ChannelRemoval
from tests.architectures import LARGE, SMALL


def member(
    name: str, role: Role, index: torch.Tensor, unit: torch.Tensor, width: int, call: int = 0
) -> Member:
    return Member(name, role, index, unit, width, call)


def straight(name: str, role: Role, width: int, call: int = 0) -> Member:
    positions = torch.arange(width)
    return member(name, role, positions, positions, width, call)


# conv a: 3 -> 4 channels, conv b: 4 -> 6, a linear layer that reads 2 positions of each of the 6
A, B, LINEAR = 27.0 * 4 * 100, 9.0 * 4 * 6 * 100, 12.0 * 5
TERMS = (
    CostTerm("a", 0, Cost(A, 27 * 4), Cost(4 * 100, 4)),
    CostTerm("act", 0, Cost(), Cost(4 * 100)),
    CostTerm("act", 1, Cost(), Cost(6 * 100)),
    CostTerm("b", 0, Cost(B, 9 * 4 * 6), Cost(6 * 100, 6)),
    CostTerm("linear", 0, Cost(LINEAR, 12 * 5), Cost(5, 5)),
)
GROUPS = (
    ChannelGroup(
        "a", 4, 1,
        (straight("a", Role.PRODUCER, 4), straight("act", Role.PASSING, 4), straight("b", Role.CONSUMER, 4)),
    ),
    ChannelGroup(
        "b", 6, 1,
        (
            straight("b", Role.PRODUCER, 6), straight("act", Role.PASSING, 6, call=1),
            member("linear", Role.CONSUMER, torch.arange(12), torch.arange(12) // 2, 12),
        ),
    ),
)  # fmt: skip
FIXED = Cost(1000, 7)


def by_hand(removed: Mapping[str, int]) -> tuple[float, float]:
    a, b = 4 - removed.get("a", 0), 6 - removed.get("b", 0)
    macs = 27 * a * 100 + 2 * a * 100 + 9 * a * b * 100 + 2 * b * 100 + 2 * b * 5 + 5 + 1000
    params = 27 * a + a + 9 * a * b + b + 2 * b * 5 + 5 + 7
    return macs, params


@given(st.integers(0, 3), st.integers(0, 5))
def test_costs_by_hand(a: int, b: int) -> None:
    table = CostTable(TERMS, GROUPS, FIXED)
    cost = table.cost({"a": a, "b": b})
    assert (cost.macs, cost.params) == pytest.approx(by_hand({"a": a, "b": b}))
    assert (table.dense.macs, table.dense.params) == pytest.approx(by_hand({}))


@given(st.integers(0, 2), st.integers(0, 3), st.sampled_from("ab"), st.integers(0, 2))
def test_savings_are_differences_of_costs(a: int, b: int, name: str, units: int) -> None:
    table = CostTable(TERMS, GROUPS, FIXED)
    removed = {"a": a, "b": b}
    more = {**removed, name: removed[name] + units}
    saved = table.saving(removed, name, units)
    before, after = table.cost(removed), table.cost(more)
    assert (saved.macs, saved.params) == pytest.approx(
        (before.macs - after.macs, before.params - after.params)
    )


def test_a_layer_between_two_groups_loses_the_product() -> None:
    table = CostTable(TERMS, GROUPS)
    b = TERMS[3]
    saved = table.saving({}, "a", 2).macs - table.saving({"b": 3}, "a", 2).macs
    assert saved == pytest.approx(b.weight.macs / 4)  # half of half


def test_costs_add_and_scale() -> None:
    assert Cost(3, 1) + Cost(1, 1) - Cost(2, 0) * 0.5 == Cost(3, 2)
    assert CostTerm("x", 0, Cost(2, 1), Cost(3, 4)).total == Cost(5, 5)


def flops(model: nn.Module, x: torch.Tensor) -> int:
    """Multiplications of convolutions and linear layers, by torch's own counter (two operations each)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def weight_macs(table: CostTable, removed: Mapping[str, int]) -> float:
    lost = table._lost(removed)
    convolutions = [key for key, term in table._terms.items() if term.weight.macs]
    return sum(
        (table._left(key, lost) - table._terms[key].channel * _out(lost, key)).macs for key in convolutions
    )


def _out(lost: Mapping[tuple[str, int, str], float], key: tuple[str, int]) -> float:
    return 1 - lost.get((*key, "out"), 0.0)


@pytest.mark.parametrize(
    "name", ["resnet18", "cifar_resnet56", "cifar_vgg16_bn", "residual", "flattened", "bn_free"]
)
def test_convolutions_and_linear_layers_agree_with_torchs_counter(name: str) -> None:
    architecture = {**LARGE, **SMALL}[name]
    model = architecture.randomised()
    graph = PruningGraph(model, architecture.inputs)
    table = graph.costs
    assert weight_macs(table, {}) == pytest.approx(flops(model, architecture.inputs[0]))
    removed = {group.name: group.units // 3 for group in graph.prunable}
    chosen = [ChannelRemoval(g.name, g.root_channels(range(g.units // 3))) for g in graph.prunable]
    left = weight_macs(table, removed)
    remove_channels(model, architecture.inputs, chosen)
    assert left == pytest.approx(flops(model, architecture.inputs[0]))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_costs_fall_with_every_unit(table_of: Callable[[str], PruningGraph], data: st.DataObject) -> None:
    graph = table_of(data.draw(st.sampled_from(["residual", "group_norm", "squeezed", "mixed"])))
    removed = {g.name: data.draw(st.integers(0, g.units - 2)) for g in graph.prunable}
    name = data.draw(st.sampled_from([g.name for g in graph.prunable]))
    before, after = graph.costs.cost(removed), graph.costs.cost({**removed, name: removed[name] + 1})
    assert 0 < after.macs < before.macs
    assert 0 < after.params < before.params


@pytest.fixture(scope="module")
def table_of() -> Callable[[str], PruningGraph]:
    graphs: dict[str, PruningGraph] = {}

    def graph(name: str) -> PruningGraph:
        if name not in graphs:
            graphs[name] = PruningGraph(SMALL[name].randomised(), SMALL[name].inputs)
        return graphs[name]

    return graph
