from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin import get_criterion
from dscore_plugin.datasets import ImageData, ImageSet
from dscore_plugin.errors import ArtifactError, CriterionError, DataError, ModelError
from dscore_plugin.groups import ChannelGroup, removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.models import create_model
from dscore_plugin.plan import ChannelRemoval
from dscore_plugin.planning import plan_pruning, selection_request
from dscore_plugin.selection import greedy_channels
from dscore_plugin.selection.discrimination_aware import DiscriminationAwareSelector
from dscore_plugin.selection.discrimination_run import TuningData
from dscore_plugin.selection.greedy_channels import GreedyOptions, GreedySelection, LayerTask
from dscore_plugin.selection.layer_candidates import candidates
from dscore_plugin.training.batches import stream_seed
from dscore_plugin.training.head_places import find_segments
from dscore_plugin.training.heads import Heads, Losses, tapped, train_heads
from tests.architectures import SMALL, randomised
from tests.selection import dcp_reference as reference
from tests.selection.helpers import Generated, forwards_are_their_own

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (3, 6, 6)
IMAGE = (torch.zeros(1, *SHAPE),)


class Block(nn.Module):
    def __init__(self, width: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + x[:, :, :: self.stride, :: self.stride])


class Toy(nn.Module):
    """Three residual blocks, the inner widths of which differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.blocks = nn.Sequential(Block(5, 6), Block(5, 7, stride=2), Block(5, 4))
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))


class PreActivated(nn.Module):
    """A block whose last convolution goes straight into the sum."""

    def __init__(self, width: int, in_place: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 6, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, width, 3, padding=1, bias=False)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        y = self.conv2(torch.relu(self.bn2(y)))
        if not self.in_place:
            return y + x
        y += x
        return y


def pre_activated(in_place: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), PreActivated(5, in_place), PreActivated(5, in_place),
        nn.BatchNorm2d(5), nn.ReLU(in_place), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip


def plain() -> nn.Module:
    """Four convolutions, one of them depthwise; biases, activations in place, pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip


NETWORKS = {"residual": Toy, "plain": plain}


def network(name: str = "residual") -> nn.Module:
    torch.manual_seed(0)
    return randomised(NETWORKS[name]()).eval()


def batches(count: int = 3, size: int = 8, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, *SHAPE, generator=generator)
    labels = torch.randint(0, 4, (count, size), generator=generator)
    return list(zip(images, labels, strict=True))


def found_in(model: nn.Module, image: tuple[Tensor, ...] = IMAGE) -> Any:
    return candidates(model, image, PruningGraph(model, image).prunable)


def choose(
    model: nn.Module,
    rate: float = 0.5,
    data: Any = None,
    tuning: Any = None,
    work: Path | None = None,
    **options: Any,
) -> dict[str, tuple[int, ...]]:
    """What stays, by the layer that reads it."""
    found = found_in(model)
    keep = {c.group.name: c.group.units - removal_count(rate, c.group.units) for c in found}
    selector = DiscriminationAwareSelector(**{"heads": 1, "head_passes": 2, **options})
    orders = selector.choose(model, IMAGE, found, keep, data or batches(), tuning, work=work)
    return {c.layer: orders[c.group.name] for c in found}


def literal(
    model: nn.Module, data: Any = None, heads: int = 1, **options: Any
) -> tuple[dict[str, Any], nn.Module]:
    """The reference, with the heads that the selector trains."""
    data = data or batches()
    segments = find_segments(model, IMAGE, [c.layer for c in found_in(model)], heads)
    made = Heads(segments, model, IMAGE, seed=0)
    tuning, selector = TuningData.of(data), DiscriminationAwareSelector(head_passes=2)
    config = selector.tuning_config(stream_seed(0, 0))
    train_heads(model, made, tuning.batches, tuning.steps, config, Losses.alone(made))
    layers = [
        reference.Layer(name, segment.end, made.of(segment.end) if segment.end else None)
        for segment in segments
        for name in segment.layers
    ]
    return reference.prune(model, layers, data, **options)


def assert_same(
    actual: dict[str, Any], model: nn.Module, expected: dict[str, Any], pruned: nn.Module
) -> None:
    for name, order in expected.items():
        assert list(actual[name]) == order, name
        torch.testing.assert_close(
            model.get_submodule(name).weight.detach(), pruned.get_submodule(name).weight, atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("reading", ["kernels", "slice"])
@pytest.mark.parametrize("epsilon", [None, 0.01])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_and_weights_are_those_of_the_literal_algorithm(
    name: str, epsilon: float | None, reading: str
) -> None:
    model = network(name)
    expected, pruned = literal(copy.deepcopy(model), reading=reading, rate=0.4, epsilon=epsilon)
    rule = {"adapt": True, "epsilon": epsilon} if epsilon else {}
    actual = choose(model, 0.99 if epsilon else 0.4, reading=reading, **rule)
    assert_same(actual, model, expected, pruned)
    if epsilon:
        assert any(len(order) < model.get_submodule(layer).in_channels for layer, order in actual.items())


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": 0.1}, {"channels_per_step": 3}])
def test_options_are_those_of_the_literal_algorithm(options: dict[str, Any]) -> None:
    model = network()
    theirs = {"at_once" if key == "channels_per_step" else key: value for key, value in options.items()}
    data = [*batches(2), *batches(1, size=5, seed=3)]  # the last batch is smaller
    expected, pruned = literal(copy.deepcopy(model), data, heads=2, **theirs)
    assert_same(choose(model, data=data, heads=2, **options), model, expected, pruned)


def test_it_does_not_matter_what_changes_a_layers_output_in_place() -> None:
    chosen, weights = [], []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = randomised(pre_activated(in_place)).eval()
        chosen.append(choose(model, heads=0))
        weights.append(model[2].conv2.weight.detach())
    assert chosen[0] == chosen[1]
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_what_does_not_fit_into_memory_is_computed_again(share: float) -> None:
    plenty = network()
    expected = choose(plenty)
    little = network()
    limit = max(1, int(share * 3 * 8 * 2 * (2 * 5 * 36 + 7 * 36) * 4))
    assert choose(little, memory_limit=limit) == expected
    for a, b in zip(plenty.parameters(), little.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_network_computes_what_its_removal_leaves() -> None:
    model = network()
    data = image_data()
    plan = DiscriminationAwareSelector(heads=1, head_passes=1).select(
        model, data, selection_request(IMAGE, "channel", "ratio", 0.5)
    )
    assert {row.layer: len(plan.removed(row.layer)) for row in plan.rows} == {
        "blocks.0.conv1": 3, "blocks.1.conv1": 3, "blocks.2.conv1": 2,
    }  # fmt: skip
    assert plan.made_by["criterion"] == "dcp"
    assert plan.made_by["ratio"] == 0.5
    assert forwards_are_their_own(model)
    images = torch.randn(4, *SHAPE)
    with torch.no_grad():
        expected = model(images)
        actual = plan.apply(model)(images)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


class GroupNormed(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].bn1, self.blocks[1] = nn.GroupNorm(2, 6), Block(5, 8)
        self.blocks[1].bn1 = nn.GroupNorm(1, 8)


def group_normed() -> nn.Module:
    torch.manual_seed(0)
    return randomised(GroupNormed()).eval()


def test_a_norm_over_channels_counts_those_that_stay() -> None:
    """The loss in the end is that of the network that removal leaves, the layers before pruned, too."""
    model, data = group_normed(), batches()
    pruned = copy.deepcopy(model)
    heads, options = Heads((), model, IMAGE), GreedyOptions(epsilon=100.0)
    greedy = GreedySelection(model, model, heads, data, options)
    gone: list[tuple[ChannelGroup, list[int]]] = []
    for candidate in sorted(found_in(model), key=lambda c: c.layer):
        task = LayerTask(candidate.layer, candidate.units, "", 1, candidate.group)
        resumed = GreedySelection(model, pruned, heads, data, options, gone=((), list(gone)))
        chosen = greedy.choose(task)
        assert resumed.choose(task).losses == pytest.approx(chosen.losses, rel=1e-5)
        pruned.get_submodule(candidate.layer).weight.data.copy_(chosen.weight)
        gone.append((candidate.group, [u for u in range(candidate.group.units) if u not in chosen.order]))
    removals = [ChannelRemoval(group.name, group.root_channels(units)) for group, units in gone]
    remove_channels(pruned, IMAGE, removals)
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    with (
        torch.no_grad(),
        tapped(model, ["blocks.2.conv2"]) as dense,
        tapped(pruned, ["blocks.2.conv2"]) as left,
    ):
        model(images)
        loss = functional.cross_entropy(pruned(images), labels)
        expected = loss + functional.mse_loss(left["blocks.2.conv2"], dense["blocks.2.conv2"])
    assert chosen.losses[-1] == pytest.approx(float(expected), rel=1e-5)


def image_data(count: int = 40) -> ImageData:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, *SHAPE, generator=generator)
    source = Generated(images, torch.randint(0, 4, (count,), generator=generator))
    sets = [ImageSet(source, torch.arange(count), augmented=augmented) for augmented in (True, False, False)]
    return ImageData("toy", *sets, num_classes=4, input_shape=SHAPE, class_names=("a", "b", "c", "d"))


def test_the_stop_rule_needs_no_goal_and_a_goal_limits_it() -> None:
    info = get_criterion("dcp_adapt")
    fast = {"heads": 0, "head_passes": 1}
    model = network()
    loose = info.build_selector(epsilon=100.0, **fast)
    plan = loose.select(model, image_data(), selection_request(IMAGE, "channel", "adapt", 0.0))
    assert [len(plan.removed(row.layer)) for row in plan.rows] == [row.channels - 1 for row in plan.rows]
    limited = loose.select(network(), image_data(), selection_request(IMAGE, "channel", "ratio", 0.25))
    assert [len(limited.removed(row.layer)) for row in limited.rows] == [
        row.channels // 4 for row in limited.rows
    ]
    strict = info.build_selector(epsilon=0.0, **fast)
    whole = strict.select(network(), image_data(), selection_request(IMAGE, "channel", "adapt", 0.0))
    assert not whole.removals
    with pytest.raises(CriterionError, match="only dcp_adapt knows"):
        get_criterion("dcp").build_selector().select(
            network(), image_data(), selection_request(IMAGE, "channel", "adapt", 0.0)
        )


def test_only_layers_that_alone_read_an_inner_group_are_candidates() -> None:
    assert [c.layer for c in found_in(network())] == ["blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"]
    assert {c.layer for c in found_in(network("plain"))} == {"2", "7"}
    cases = {
        "squeezed": {"expand"},
        "mixed": {"line"},
        "shared": set(),
    }  # the others: read twice, grouped, called twice
    for name, layers in cases.items():
        model = SMALL[name].randomised()
        assert {c.layer for c in found_in(model, SMALL[name].inputs)} == layers


@pytest.mark.parametrize("order", ["single", "stages"])
def test_fine_tuning_with_the_heads(order: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    data = batches(4)
    chosen = choose(model, tuning=TuningData.of(data), head_epochs=2, order=order, data=data)
    assert {layer: len(kept) for layer, kept in chosen.items()} == {
        "blocks.0.conv2": 3, "blocks.1.conv2": 4, "blocks.2.conv2": 2,
    }  # fmt: skip
    assert not torch.equal(model.stem.weight, before["stem.weight"])
    for layer, kept in chosen.items():  # what left in an early stage stays away in the later ones
        weight = model.get_submodule(layer).weight.detach()
        gone = [k for k in range(weight.shape[1]) if k not in kept]
        assert not weight[:, gone].any()
        assert weight[:, list(kept)].abs().sum((0, 2, 3)).gt(0).all()
    assert not model.training
    assert forwards_are_their_own(model)


def test_a_killed_run_goes_on_with_the_same_channels(tmp_path: Path) -> None:
    whole, model = network(), network()
    options: dict[str, Any] = {
        "order": "stages",
        "head_epochs": 1,
        "data": batches(4),
        "tuning": TuningData.of(batches(4)),
    }
    expected = choose(whole, **options)
    killed = subprocess.run(
        [sys.executable, "-m", "tests.selection.killed_dcp", str(tmp_path)], check=False, cwd=ROOT
    )
    assert killed.returncode == -9
    assert (
        len((tmp_path / "dcp" / "layers.jsonl").read_text().splitlines()) == 3
    )  # who, a layer, part of a layer
    assert choose(model, work=tmp_path, **options) == expected
    for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    again = network()
    assert choose(again, work=tmp_path, **options) == expected  # nothing is left to do
    assert torch.equal(again.blocks[1].conv2.weight, whole.blocks[1].conv2.weight)
    with pytest.raises(ArtifactError, match="belongs to another"):
        choose(network(), work=tmp_path, **{**options, "strength": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reading": "kernel"}, "did you mean 'kernels'"),
        ({"order": "stage"}, "did you mean 'stages'"),
        ({"channels_per_step": 0}, "channels_per_step=0"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"head_epochs": 1.5}, "head_epochs=1.5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        DiscriminationAwareSelector(**options)


def test_bad_requests_are_refused_before_the_network_is_touched() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CriterionError, match="channels, not kernels"):
        DiscriminationAwareSelector().select(
            model, image_data(), selection_request(IMAGE, "kernel", "ratio", 0.5)
        )
    with pytest.raises(CriterionError, match="heads=9 cannot be placed"):
        choose(model, heads=9)
    with pytest.raises(DataError, match="head_epochs=1 needs training images"):
        choose(model, head_epochs=1)
    with pytest.raises(ModelError, match="no convolution that alone reads"):
        DiscriminationAwareSelector().choose(model, IMAGE, [], {}, batches())
    half = copy.deepcopy(model).to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"'stem.weight' is torch.bfloat16.*float\(\)"):
        DiscriminationAwareSelector().choose(half, IMAGE, found_in(model), {}, batches())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_hooks_are_gone_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []
    copied = greedy_channels.frozen_copy

    def noted(module: nn.Module) -> Any:
        made.append(copied(module))
        return made[-1]

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no loss")

    monkeypatch.setattr(greedy_channels, "frozen_copy", noted)
    monkeypatch.setattr(greedy_channels, "joint_loss", fail)
    with pytest.raises(RuntimeError, match="no loss"):
        choose(network())
    assert len(made) == 3
    assert all(forwards_are_their_own(module) for module in made)


class Noting(nn.Conv2d):
    """Leaves something in an attribute, which no recording of its output holds."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.note = output.mean()
        return output


class Remembering(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Noting(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 9 * self.stem.note)


def test_what_cannot_be_replayed_is_computed_every_time() -> None:
    torch.manual_seed(0)
    model = randomised(Remembering()).eval()
    layers = [reference.Layer(f"blocks.{block}.conv2") for block in range(3)]
    expected, pruned = reference.prune(model, layers, batches())
    assert_same(choose(model, heads=0), model, expected, pruned)


def test_networks_of_volumes() -> None:
    architecture = SMALL["conv_3d"]
    model = architecture.randomised()
    (candidate,) = found_in(model, architecture.inputs)
    data = [(torch.randn(4, *architecture.shape), torch.arange(4))]
    selector = DiscriminationAwareSelector(heads=0, head_passes=1)
    orders = selector.choose(model, architecture.inputs, [candidate], {candidate.group.name: 3}, data)
    gone = [k for k in range(8) if k not in orders[candidate.group.name]]
    assert model.get_submodule(candidate.layer).weight.abs().sum((0, 2, 3, 4)).gt(0).sum() == 3
    assert not model.get_submodule(candidate.layer).weight[:, gone].any()


@pytest.mark.parametrize("name", ["cifar_preresnet20", "mobilenetv2_035", "resnet10t"])
def test_networks_of_the_paper(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=4)
    size = 32
    image = (torch.zeros(1, 3, size, size),)
    data = [(torch.randn(4, 3, size, size), torch.arange(4))]
    found = candidates(model, image, PruningGraph(model, image).prunable)
    keep = {c.group.name: c.group.units - removal_count(0.3, c.group.units) for c in found}
    selector = DiscriminationAwareSelector(channels_per_step=10_000, head_passes=1)
    orders = selector.choose(model, image, found, keep, data)
    assert {name: len(order) for name, order in orders.items()} == keep
    removals = [
        ChannelRemoval(c.group.name, tuple(sorted(set(range(c.group.units)) - set(orders[c.group.name]))))
        for c in found
    ]
    with torch.no_grad():
        expected = model(data[0][0])
        actual = remove_channels(model, image, removals)(data[0][0])
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.cifar10
def test_resnet20_on_cifar10(shared: Path) -> None:
    from dscore_plugin.datasets import load_data
    from dscore_plugin.models import load_weights
    from dscore_plugin.training.evaluation import evaluate

    data = load_data(f"cifar10:{shared / 'data' / 'cifar10'}")
    image = (torch.zeros(1, 3, 32, 32),)
    chosen, drawn = (create_model("cifar_resnet20") for _ in range(2))
    for model in (chosen, drawn):
        load_weights(model, shared / "weights" / "cifar10" / "resnet20.safetensors")
    selector = DiscriminationAwareSelector(
        selection_images=96, batch_size=32, head_passes=2, channels_per_step=16, heads=1
    )
    plan = selector.select(chosen, data, selection_request(image, "channel", "ratio", 0.3))
    random = plan_pruning(drawn, image, "random", ratio=0.3, layers="inner")
    assert plan.macs == random.macs
    test = data.test.subset(300)
    top1 = [evaluate(p.apply(model), test).top1 for p, model in ((plan, chosen), (random, drawn))]
    assert top1[0] > top1[1] + 10
