from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.groups import ScoredGroup
from dscore_plugin.masking import masked
from dscore_plugin.selection.measurement import silenced_modules
from dscore_plugin.selection.replay import Prefix, Recording, Replay, Uses, replaced_forwards
from tests.selection.helpers import forwards_are_their_own, network, scored_groups

ARCHITECTURES = {
    "cifar_resnet20": (3, 32, 32),
    "resnet18": (3, 64, 64),
    "mobilenetv2_100": (3, 64, 64),
    "densenet121": (3, 64, 64),
    "convnext_atto": (3, 64, 64),
    "vit_tiny_patch16_224": (3, 64, 64),
}
ARGUMENTS = {"vit_tiny_patch16_224": {"img_size": 64, "depth": 3}}


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def prefix_of(replay: Replay, model: nn.Module, item: ScoredGroup) -> Prefix:
    return replay.prefix(silenced_modules(model, item.group))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replayed_masked_passes_have_the_bits_of_full_ones(name: str) -> None:
    shape = ARCHITECTURES[name]
    model = network(name, **ARGUMENTS.get(name, {}))
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    replay = Replay(model, images[:2])
    scored = scored_groups(model, shape)
    scored = scored[:: max(1, len(scored) // 12)]
    steps = sorted(
        ((prefix_of(replay, model, item), item) for item in scored), key=lambda step: step[0].start
    )

    dense, earlier, replaced = run(model, images), None, 0
    for prefix, item in steps:
        recording = replay.record(prefix, images, earlier)
        assert replay.agrees(images, recording, dense)
        with masked(model, [(item.group, item.order[: item.group.units // 2])]), torch.inference_mode():
            full, replayed = model(images), replay.run(images, recording)
        assert torch.equal(replayed, full)
        assert not torch.equal(replayed, dense)
        assert forwards_are_their_own(model)
        earlier, replaced = recording, replaced + len(prefix.replaced)
    assert replaced > 2 * len(steps)


def test_only_what_is_read_is_kept() -> None:
    model = network("cifar_resnet20")
    replay = Replay(model, torch.zeros(2, 3, 32, 32))
    by_name = {item.group.name: item for item in scored_groups(model, (3, 32, 32))}
    prefix = prefix_of(replay, model, by_name["layer1.2.conv1"])

    names = {module: name for name, module in model.named_modules()}
    # bn1 is read by a relu that is no module; nothing reads what layer1.0 and layer1.2.conv1 gave
    assert {names[module] for module in prefix.kept} == {"bn1", "layer1.1", "layer1.2.bn1"}
    assert prefix.bytes_per_image == 3 * 16 * 32 * 32 * 4
    assert names[prefix.stop] == "layer1.2.conv2"

    recording = replay.record(prefix, torch.randn(5, 3, 32, 32))
    memory = sum(output.untyped_storage().nbytes() for output in recording.outputs.values())
    unread = [output for module, output in recording.outputs.items() if module not in prefix.kept]
    assert memory == 5 * prefix.bytes_per_image + 4 * len(unread)
    assert all(output.isnan().all() and len(output) == 5 for output in unread)


def test_prefixes_grow_and_work_shrinks_with_depth() -> None:
    model = network("cifar_resnet20")
    replay = Replay(model, torch.zeros(1, 3, 32, 32))
    work = [prefix_of(replay, model, item).macs_behind for item in scored_groups(model, (3, 32, 32))]
    convolutions = 40_550_000  # of the 20 layers, on one image
    assert work == sorted(work, reverse=True)
    assert 0.85 * convolutions < work[0] < 1.05 * convolutions
    assert work[-1] < 0.1 * convolutions


def test_recording_from_an_earlier_prefix_equals_recording_from_the_start() -> None:
    model = network("densenet121")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    replay = Replay(model, images)
    scored = scored_groups(model, (3, 64, 64))
    prefixes = sorted(
        (prefix_of(replay, model, item) for item in scored[::20]), key=lambda prefix: prefix.start
    )
    first, second = prefixes[1], prefixes[3]
    assert 0 < first.start < second.start
    direct = replay.record(second, images)
    chained = replay.record(second, images, replay.record(first, images))
    assert direct.outputs.keys() == chained.outputs.keys()
    for module in second.kept:
        assert torch.equal(direct.outputs[module], chained.outputs[module])


class InPlace(nn.Module):
    """A shared activation, and changes in place with and without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.gate = nn.Hardtanh(inplace=True)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first(x))
        y = self.norm(self.second(x))
        y += x
        z = self.gate(y)
        z = functional.relu_(z)
        z = self.last(z) + z
        return self.activation(z).mean((2, 3))


class Pair(nn.Module):
    """Gives a tuple; what it contains can still be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.last = Pair(), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.pair(x)
        return self.last(one * two).mean((2, 3))


class Normalising(nn.Module):
    """Normalises the images it is given in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(2)
        return (self.last(self.first(x)) + x.mean()).mean((2, 3))


class Leaky(nn.Module):
    """Leaves a result in an attribute, where a later module finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.first.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.left = args[0].mean()

    def forward(self, x: Tensor) -> Tensor:
        return (self.last(self.first(x)) * self.left).mean((2, 3))


class Hidden(Leaky):
    """Leaves it from within the module's own forward, where a replayed one leaves nothing."""

    def __init__(self) -> None:
        super().__init__()
        outer = self

        class Keeping(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                outer.left = x.mean()
                return super().forward(x)

        self.first = Keeping(3, 4, 3)


class Aliasing(nn.Module):
    """Reads a tensor again after a module has changed it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.activation = nn.Conv2d(3, 4, 3), nn.Tanh()
        self.activation.forward = torch.tanh_  # type: ignore[method-assign]
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.activation(y)
        return (self.last(z) + y).mean((2, 3))


@pytest.mark.parametrize("build", [InPlace, Sums, Normalising])
def test_any_forward_is_replayed_rightly(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    images = torch.randn(3, 3, 8, 8)
    unchanged = images.clone()
    replay = Replay(model, images[:2])
    prefix = replay.prefix([model.last])
    assert prefix.replaced
    recordings = [replay.record(prefix, batch) for batch in (images, -images)]
    for batch, recording in zip((images, -images), recordings, strict=True):
        for _ in range(2):  # what is replayed must survive being replayed
            assert replay.agrees(batch, recording, run(model, batch.clone()))
    assert torch.equal(images, unchanged)


def test_a_module_that_is_called_twice_is_computed() -> None:
    model = InPlace().eval()
    replay = Replay(model, torch.randn(2, 3, 8, 8))
    prefix = replay.prefix([model.last])
    assert model.activation not in prefix.replaced
    assert {model.first, model.second, model.norm, model.gate} == set(prefix.replaced)


@pytest.mark.parametrize(("build", "agrees"), [(Leaky, True), (Hidden, False), (Aliasing, False)])
def test_what_cannot_be_seen_from_outside_is_noticed(build: Callable[[], nn.Module], agrees: bool) -> None:
    torch.manual_seed(0)
    model = build().eval()
    first, second = torch.randn(2, 2, 3, 8, 8)
    replay = Replay(model, first)
    prefix = replay.prefix([model.last])
    full = run(model, first)
    recording = replay.record(prefix, first)
    replay.record(prefix, second)
    with torch.inference_mode():
        assert replay.agrees(first, recording, full) == agrees


class Functional(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.inner = nn.Module()
        self.inner.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.first(x).mean((2, 3)), self.inner.layer.weight)


def test_a_layer_that_is_never_called_begins_with_what_contains_it() -> None:
    model = Functional().eval()
    images = torch.randn(2, 3, 8, 8)
    replay = Replay(model, images)
    prefix = replay.prefix([model.inner.layer])
    assert prefix.replaced == ()
    assert replay.agrees(images, replay.record(prefix, images), run(model, images))


def test_nothing_changed_replays_nothing() -> None:
    model = InPlace().eval()
    images = torch.randn(2, 3, 8, 8)
    replay = Replay(model, images)
    prefix = replay.prefix([])
    assert prefix.replaced == ()
    assert torch.equal(replay.run(images, replay.record(prefix, images)), run(model, images))
    assert torch.equal(replay.run(images, Recording()), run(model, images))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.fails:
            raise RuntimeError("no more")
        return self.last(x)


def test_forwards_come_back_when_a_pass_fails() -> None:
    model = Failing().eval()
    images = torch.randn(2, 3, 8, 8)
    replay = Replay(model, images)
    prefix = replay.prefix([model.last])
    recording = replay.record(prefix, images)
    model.fails = True
    for attempt in (
        lambda: Replay(model, images),
        lambda: replay.prefix([model.last]),
        lambda: replay.record(prefix, images),
        lambda: replay.run(images, recording),
    ):
        with pytest.raises(RuntimeError, match="no more"):
            attempt()
        assert forwards_are_their_own(model)


def test_a_forward_of_the_users_own_comes_back() -> None:
    module = nn.ReLU()

    def own(x: Tensor) -> Tensor:
        return -x

    module.forward = own  # type: ignore[method-assign]
    with replaced_forwards({module: lambda x: 2 * x}):
        assert module(torch.ones(1)) == 2
    assert module.forward is own


def test_uses_are_counted_by_memory() -> None:
    x, y = torch.ones(4), torch.ones(4)
    with Uses() as uses:
        torch.cat([x.view(2, 2), y.view(2, 2)])
        x.add(1)
    assert uses.of(x) == 3
    assert uses.of(y) == 2
    assert uses.of(torch.ones(4)) == 0
