from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dscore_plugin import CriterionInfo, Plan, list_criteria, plan_pruning, planning, prune
from dscore_plugin.errors import BudgetError, CriterionError, ModelError, PlanError
from dscore_plugin.integrations.torch_pruning.counting import count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model
from dscore_plugin.plan import ChannelRemoval, fingerprint
from dscore_plugin.planning import score_groups
from dscore_plugin.registry import get_criterion
from tests.architectures import IMAGE, LARGE, SMALL, Residual, SeveralOutputs, Tied, randomised

X = torch.zeros(1, *IMAGE)
SCORES = [
    i.name for i in list_criteria(lambda i: i.kind in ("score", "data_score") and "channel" in i.granularity)
]


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(Residual()).eval()


def batches(count: int = 2, size: int = 4, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, size, *IMAGE, generator=generator)
    labels = torch.randint(0, classes, (count, size), generator=generator)
    return list(zip(images, labels, strict=True))


def units(plan: Plan) -> dict[str, int]:
    return {row.layer: len(plan.removed(row.layer)) for row in plan.rows}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("name", SCORES)
def test_every_criterion_makes_a_plan(name: str, allocation: str) -> None:
    model = residual()
    data = batches() if get_criterion(name).needs_data else []
    plan = plan_pruning(model, X, name, ratio=0.4, allocation=allocation, batches=data)
    assert plan.made_by["criterion"] == name
    if allocation == "uniform":
        assert units(plan) == {"conv2": 3, "conv1": 4}
    else:
        assert sum(units(plan).values()) == 8
    assert (plan.macs[1], plan.params[1]) == count(plan.apply(copy.deepcopy(model)), (X,))


NETWORKS = ("mixed", "conv_3d", "groups_of_four_three_and_two", "squeezed", "prelu")
CANNOT = {
    "bn_scale": dict.fromkeys(NETWORKS, "needs batch norm"),
    "fpgm": dict.fromkeys(
        ("mixed", "groups_of_four_three_and_two"), "'fpgm' cannot score"
    ),  # grouped convolutions
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", [name for name in SCORES if not get_criterion(name).needs_data])
def test_every_criterion_scores_layers_of_every_kind(name: str, network: str) -> None:
    architecture = SMALL[network]
    model = architecture.randomised()
    if network in CANNOT.get(name, ()):
        with pytest.raises(CriterionError, match=CANNOT[name][network]):
            plan_pruning(model, architecture.inputs, name, ratio=0.5)
        return
    plan = plan_pruning(model, architecture.inputs, name, ratio=0.5)
    plan.apply(model, architecture.inputs)(torch.randn(2, *architecture.shape))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("network", ["cifar_resnet20", "residual", "groups_of_four_three_and_two"])
def test_uniform_is_the_floor_of_each_group(network: str, ratio: float) -> None:
    model = create_model(network) if network not in SMALL else SMALL[network].randomised()
    x = torch.zeros(1, 3, 32, 32) if network not in SMALL else SMALL[network].inputs[0]
    plan = plan_pruning(model, x, "d_score", ratio=ratio)
    groups = {group.name: group for group in PruningGraph(model, (x,)).prunable}
    assert set(units(plan)) == set(groups)
    for layer, removed in units(plan).items():
        group = groups[layer]
        expected = min(math.floor(ratio * group.units + 1e-9), group.units - 1)
        assert removed == expected * group.division


def test_the_lowest_scores_leave() -> None:
    model = residual()
    plan = plan_pruning(model, X, "d_score", ratio=0.5)
    for item in score_groups(PruningGraph(model, (X,)), get_criterion("d_score")):
        lowest = item.scores.argsort(stable=True)[: item.group.units // 2]
        assert plan.removed(item.group.name) == tuple(sorted(lowest.tolist()))


def test_global_clamps_instead_of_skipping() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)
    )
    model[0].weight.data.mul_(1e-4)
    model[0].bias.data.mul_(1e-4)
    options: dict[str, Any] = {"normalizer": None, "bias": False}
    for least, left in ((1, 1), (5, 5)):
        plan = plan_pruning(
            model, X, "l2", ratio=0.5, allocation="global", min_channels=least, criterion_options=options
        )
        assert units(plan)["0"] == 16 - left
        assert plan.apply(copy.deepcopy(model))(X).shape == (1, 4, 2, 2)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("network", ["resnet18", "cifar_resnet56", "mobilenetv2_100"])
def test_budgets_are_met_from_below_within_a_point(network: str, allocation: str) -> None:
    architecture = LARGE[network]
    model = architecture.randomised()
    for budget, target in (("target_macs", 0.5), ("target_params", 0.7)):
        if (network, budget) == ("cifar_resnet56", "target_macs"):
            target = 0.55
        plan = plan_pruning(model, architecture.inputs, "d_score", allocation=allocation, **{budget: target})
        before, after = plan.macs if budget == "target_macs" else plan.params
        assert target - 0.01 <= after / before <= target
    assert plan.made_by["target_params"] == 0.7


def test_a_budget_is_what_is_left_in_the_end() -> None:
    model, x = create_model("cifar_resnet20"), torch.zeros(1, 3, 32, 32)
    dense = count(model, (x,))[0]
    prune(model, x, "d_step", target_macs=0.6)
    assert 0.59 <= count(model, (x,))[0] / dense <= 0.6


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("goal", [{"target_macs": 0.05}, {"target_params": 0.04}])
def test_an_unreachable_budget_names_one_that_works(goal: dict[str, float], allocation: str) -> None:
    model, x = create_model("cifar_resnet20"), torch.zeros(1, 3, 32, 32)
    options: dict[str, Any] = {"min_channels": 6, "allocation": allocation}
    with pytest.raises(BudgetError, match=rf"{next(iter(goal))} .* cannot be reached") as caught:
        plan_pruning(model, x, **goal, **options)
    nearest = re.search(r"the nearest is ([0-9.]+)$", str(caught.value))
    assert nearest is not None
    plan = plan_pruning(model, x, **dict.fromkeys(goal, float(nearest[1])), **options)
    assert plan.removals


def test_round_to_and_min_channels() -> None:
    model, x = LARGE["resnet18"].randomised(), LARGE["resnet18"].inputs
    plan = plan_pruning(model, x, ratio=0.3, round_to=16)
    for row in plan.rows:
        left = row.channels - len(plan.removed(row.layer))
        assert left % 16 == 0
        assert 0.7 * row.channels <= left < 0.7 * row.channels + 16
    plan = plan_pruning(model, x, ratio=0.9, min_channels=40)
    assert min(row.channels - len(plan.removed(row.layer)) for row in plan.rows) == 40
    plan = plan_pruning(model, x, target_macs=0.5, round_to=8)
    assert plan.macs[1] / plan.macs[0] <= 0.5
    assert all((row.channels - len(plan.removed(row.layer))) % 8 == 0 for row in plan.rows)


def test_a_plan_that_removes_nothing_says_so() -> None:
    plan = plan_pruning(residual(), X, ratio=0.01)
    assert not plan.removals
    assert "nothing leaves the network" in str(plan)
    assert "nothing leaves" not in str(plan_pruning(residual(), X, ratio=0.5))


def test_inner_layers_leave_residual_sums_whole() -> None:
    plan = plan_pruning(residual(), X, ratio=0.5, layers="inner")
    assert units(plan) == {"conv1": 6}


def test_ignored_layers_have_no_row() -> None:
    model = residual()
    assert units(plan_pruning(model, X, ratio=0.5, ignored_layers=[model.conv1])) == {"conv2": 4}


@pytest.mark.parametrize("name", SCORES)
def test_the_same_seed_makes_the_same_plan(name: str) -> None:
    data = batches() if get_criterion(name).needs_data else []
    state = torch.get_rng_state()
    one = plan_pruning(residual(), X, name, ratio=0.5, batches=data, seed=3)
    torch.manual_seed(99)
    other = plan_pruning(residual(), X, name, ratio=0.5, batches=data, seed=3)
    assert one == other
    torch.set_rng_state(state)


def test_seeds_differ_and_leave_the_generator_alone() -> None:
    model = residual()
    state = torch.get_rng_state()
    plans = [plan_pruning(model, X, "random", ratio=0.5, seed=seed) for seed in (0, 1)]
    assert plans[0].difference(plans[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def untouched() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Hand in a model; at the end it must be as it was, gradients, modes and hooks included."""
    seen: list[tuple[nn.Module, dict[str, Any]]] = []

    def state(model: nn.Module) -> dict[str, Any]:
        return {
            "weights": fingerprint(model),
            "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
            "modes": [m.training for m in model.modules()],
            "frozen": [p.requires_grad for p in model.parameters()],
            "grads": [id(p.grad) for p in model.parameters()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "attributes": [sorted(m.__dict__) for m in model.modules()],
        }

    def watch(model: nn.Module) -> nn.Module:
        seen.append((model, state(model)))
        return model

    yield watch
    for model, before in seen:
        after = state(model)
        buffers = before.pop("buffers"), after.pop("buffers")
        assert before == after
        assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())


def mixed_modes() -> nn.Module:
    model = residual().train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    return model


@pytest.mark.parametrize("name", SCORES)
def test_planning_does_not_touch_the_model(name: str, untouched: Callable[[nn.Module], nn.Module]) -> None:
    model = untouched(mixed_modes())
    data = batches() if get_criterion(name).needs_data else []
    plan = plan_pruning(model, X, name, target_macs=0.5, batches=data)
    assert plan.removals


@pytest.mark.parametrize("bad", [torch.full((4,), 9), torch.zeros(3, dtype=torch.int64)])
def test_a_batch_that_fails_leaves_the_model_as_it_was(
    bad: Tensor, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    model = untouched(mixed_modes())
    data = [*batches(), (torch.randn(4, *IMAGE), bad)]
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        plan_pruning(model, X, "taylor", ratio=0.5, batches=data)


def test_gradients_do_not_depend_on_the_batch_size() -> None:
    model, ((images, labels), _) = residual(), batches(2, 8)
    halves = list(zip(images.split(4), labels.split(4), strict=True))
    whole = plan_pruning(model, X, "taylor", ratio=0.5, batches=[(images, labels)])
    parts = plan_pruning(model, X, "taylor", ratio=0.5, batches=halves)
    assert not whole.difference(parts)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one.score_max == pytest.approx(other.score_max, rel=1e-4)


def test_one_call_prunes_by_half() -> None:
    model = residual()
    assert prune(model, X) is model
    assert (model.conv1.out_channels, model.stem.out_channels) == (6, 4)
    assert not model.training
    model = residual()
    prune(model, (X,), "l1", 0.25)
    assert (model.conv1.out_channels, model.stem.out_channels) == (9, 6)


def test_what_a_model_gives_out_keeps_its_width() -> None:
    model = SeveralOutputs()
    prune(model, X, ratio=0.5)
    result = model(torch.randn(2, *IMAGE))
    assert (result["features"][0].shape[1], result["logits"].shape[1]) == (6, 4)
    embedding = timm.create_model("resnet18", num_classes=0)
    prune(embedding, torch.zeros(1, 3, 32, 32), ratio=0.5)
    assert embedding(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert embedding.conv1.out_channels == 32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criterion": "dscor"}, CriterionError, "criterion 'dscor' is unknown; did you mean 'd_score'"),
        ({"ratio": 0}, BudgetError, r"ratio must lie between 0 and 1 \(exclusive\), got 0"),
        ({"ratio": 1.0}, BudgetError, "got 1"),
        ({"ratio": -0.5}, BudgetError, "got -0.5"),
        ({"ratio": float("nan")}, BudgetError, "got nan"),
        ({"ratio": None, "target_macs": 50}, BudgetError, "target_macs must lie between 0 and 1"),
        ({"ratio": None}, BudgetError, "give exactly one of ratio, target_macs, .*; got none"),
        ({"target_macs": 0.5}, BudgetError, "got ratio and target_macs"),
        (
            {"allocation": "fair"},
            BudgetError,
            "allocation 'fair' is unknown; expected one of uniform, global",
        ),
        ({"layers": "outer"}, BudgetError, "layers 'outer' is unknown; expected one of all, inner"),
        ({"min_channels": 0}, BudgetError, "min_channels and round_to must be at least 1"),
        ({"round_to": 0}, BudgetError, "min_channels and round_to must be at least 1"),
        ({"criterion": "taylor"}, CriterionError, "'taylor' needs images and labels; pass batches="),
        (
            {"criterion_options": {"group_reduction": "sum"}},
            CriterionError,
            "group_reduction 'sum' is unknown",
        ),
        ({"criterion_options": {"power": 2}}, CriterionError, "cannot take the options"),
        ({"model": "resnet18"}, ModelError, "expected a network .*got a str; build one by name"),
        ({"ignored_layers": ["conv1"]}, ModelError, "modules, not 'conv1'; from a name: model.get_submodule"),
        ({"ignored_layers": "conv1"}, ModelError, "modules, not 'conv1'"),
        ({"criterion": "coarse"}, CriterionError, "on its own; run it with: dscore prune --criterion coarse"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        plan_pruning(**{"model": residual(), "example_inputs": X, "ratio": 0.5, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(bad: float) -> None:
    model = residual()
    model.bn2.bias.data[3] = bad
    with pytest.raises(
        ModelError, match="the parameter 'bn2.bias' holds NaN or infinity; check the checkpoint"
    ):
        plan_pruning(model, X, ratio=0.5)


def test_a_network_in_which_nothing_can_be_pruned_says_why() -> None:
    with pytest.raises(ModelError, match="nothing in Linear can be pruned .*an output of the network"):
        plan_pruning(nn.Linear(4, 3), torch.zeros(1, 4), ratio=0.5)
    model = residual()
    with pytest.raises(ModelError, match="'conv1' is ignored"):
        plan_pruning(model, X, ratio=0.5, ignored_layers=[model.conv1, model.conv2])
    with pytest.raises(ModelError, match="'conv1' is ignored"):
        plan_pruning(model, X, ratio=0.5, ignored_layers=model)


def test_a_criterion_for_batch_norm_says_so_where_there_is_none() -> None:
    architecture = SMALL["bn_free"]
    with pytest.raises(CriterionError, match="'bn_scale' needs batch norm, but 'body.2' has none"):
        plan_pruning(architecture.randomised(), architecture.inputs, "bn_scale", ratio=0.5)


@pytest.mark.parametrize(
    "changes", [{"kind": "selector", "selector": "a:b"}, {"kind": "trained"}, {"granularity": ("kernel",)}]
)
def test_only_what_scores_channels_can_be_planned_with(changes: dict[str, Any]) -> None:
    fields = {**get_criterion("d_score").__dict__, **changes}
    with pytest.raises(CriterionError, match="scores no channels on its own"):
        score_groups(PruningGraph(residual(), (X,)), CriterionInfo(**fields))


def test_scores_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self: CriterionInfo, **options: Any) -> Callable[[Any], Tensor]:
        return lambda group: torch.full((len(group[0].idxs),), float("nan"))

    monkeypatch.setattr(CriterionInfo, "build", build)
    with pytest.raises(CriterionError, match="criterion 'l1' gives NaN or infinity for 'conv2'"):
        plan_pruning(residual(), X, "l1", ratio=0.5)


def test_networks_with_several_inputs() -> None:
    class Two(Residual):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x * scale)

    model, inputs = Two().eval(), (X, torch.ones(1, 1, 1, 1))
    plan = plan_pruning(model, inputs, ratio=0.5)
    assert plan.input_shape == IMAGE
    assert plan.apply(model, inputs)(*inputs).shape == (1, 4)


class Words(nn.Module):
    """Reads words, a number beside them, and a table without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, number: Tensor, table: Tensor, scale: float) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embed(words) * number + table)) * scale)


WORDS = (torch.tensor([[4, 2]] * 2), torch.ones(2, 1, 1), torch.zeros(6), 2.0)


def test_latency_is_measured_with_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[Any, ...]] = []

    def call_latency(model: nn.Module, inputs: tuple[Any, ...], min_run_time: float) -> dict[str, float]:
        timed.append(inputs)
        model(*inputs)
        return {"median": float(model.hidden.out_features)}

    monkeypatch.setattr(planning, "call_latency", call_latency)
    plan = plan_pruning(Words(), WORDS, "l1", target_latency=0.5, latency_batch=3)
    assert units(plan) == {"hidden": 4}
    words, number, table, scale = timed[0]
    assert words.tolist() == [[4, 2]] * 3
    assert (number.shape, table.shape, scale) == ((3, 1, 1), (6,), 2.0)
    assert number.std() > 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [(0, "latency_batch must be at least 1, got 0"), (3, "does not run with latency_batch=3")],
)
def test_a_batch_that_cannot_be_timed_is_refused_before_scoring(
    batch: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "score_groups", lambda *_, **__: pytest.fail("scored"))
    model = Words()
    model.embed.register_forward_hook(lambda _, __, output: output.view(2, 2, 6))  # two rows, whatever comes
    with pytest.raises(BudgetError, match=message):
        plan_pruning(model, WORDS, "l1", target_latency=0.5, latency_batch=batch)


@pytest.mark.parametrize("goal", [{"ratio": 0.5}, {"target_params": 0.9}])
def test_a_tied_weight_is_counted_once_and_stays_tied(goal: dict[str, float]) -> None:
    model = Tied()
    dense = sum(p.numel() for p in model.parameters())
    plan = plan_pruning(model, X, "l1", **goal)
    plan.apply(model, (X,))
    assert model.one.weight is model.two.weight
    assert plan.params == (dense, sum(p.numel() for p in model.parameters()))
    assert plan.macs[1] == count(model, (X,))[0]


def test_tied_weights_lose_nothing_to_a_plan_either() -> None:
    model = Tied()
    with pytest.raises(PlanError, match="'one' must not be pruned: 'one.weight' and 'two.weight' are one"):
        Plan(fingerprint(model), IMAGE, (ChannelRemoval("one", (0,)),)).apply(model, (X,))


def test_a_plan_from_a_frozen_network_is_the_same() -> None:
    free, frozen = residual(), residual().requires_grad_(False)
    assert plan_pruning(free, X, ratio=0.5) == plan_pruning(frozen, X, ratio=0.5)
