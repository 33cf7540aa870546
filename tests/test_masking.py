from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from dscore_plugin.errors import PlanError
from dscore_plugin.groups import ChannelGroup, Member, Role
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.masking import Masks, masked
from tests.architectures import IMAGE, SMALL, randomised


class LayerNorm2d(nn.LayerNorm):
    """As torchvision writes it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def group(width: int, *layers: tuple[str, Role]) -> ChannelGroup:
    positions = torch.arange(width)
    return ChannelGroup(
        "root", width, 1, tuple(Member(name, role, positions, positions, width) for name, role in layers)
    )


def taken(tensor: Tensor | None, kept: list[int]) -> Tensor | None:
    return None if tensor is None else nn.Parameter(tensor.detach()[kept])


GONE, KEPT, WIDTH = [1, 2, 7], [0, 3, 4, 5, 6], 8
NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "layer_norm_without_weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer_norm_without_bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "torchvision_layer_norm_2d": lambda: LayerNorm2d(WIDTH),
    "timm_layer_norm_2d": lambda: timm.layers.LayerNorm2d(WIDTH),
    "timm_layer_norm": lambda: timm.layers.LayerNorm(WIDTH),
    "group_norm": lambda: nn.GroupNorm(1, WIDTH),
    "timm_group_norm": lambda: timm.layers.GroupNorm1(WIDTH),
    "group_norm_without_weights": lambda: nn.GroupNorm(1, WIDTH, affine=False),
}
FIRST = {name for name in NORMS if "2d" in name or "group" in name}  # channels in dim 1


def narrowed(norm: nn.Module) -> nn.Module:
    small = copy.deepcopy(norm)
    small.weight, small.bias = taken(norm.weight, KEPT), taken(norm.bias, KEPT)
    if isinstance(small, nn.LayerNorm):
        small.normalized_shape = (len(KEPT),)
    else:
        small.num_channels = len(KEPT)
    return small


@pytest.mark.parametrize("size", [(2, 3), (WIDTH, WIDTH), (3, WIDTH)])
@pytest.mark.parametrize("name", NORMS)
def test_norms_leave_what_is_gone_out_of_their_statistics(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    norm = randomised(NORMS[name]()).eval()
    dim = 1 if name in FIRST else -1
    x = torch.randn(4, WIDTH, *size) if name in FIRST else torch.randn(4, *size, WIDTH)
    kept = torch.tensor(KEPT)
    expected = narrowed(norm)(x.index_select(dim, kept))
    model = nn.Sequential(norm)
    with masked(model, [(group(WIDTH, ("0", Role.NORM)), GONE)]):
        assert torch.allclose(model(x).index_select(dim, kept), expected, atol=1e-5)
    assert torch.equal(model(x), norm(x))
    assert "forward" not in norm.__dict__


def test_two_groups_of_a_group_norm_keep_their_own_statistics() -> None:
    torch.manual_seed(0)
    norm, x = randomised(nn.GroupNorm(2, 8)), torch.randn(3, 8, 4, 4)
    small = nn.GroupNorm(2, 6)
    kept = [0, 2, 3, 4, 6, 7]
    small.weight, small.bias = taken(norm.weight, kept), taken(norm.bias, kept)
    with masked(nn.Sequential(norm), [(group(8, ("0", Role.NORM)), [1, 5])]):
        assert torch.allclose(norm(x)[:, kept], small(x[:, kept]), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 3), (2, 8)),
        (nn.Linear(8, 3), (2, 8, 8)),
        (nn.Conv1d(8, 3, 3), (2, 8, 8)),
        (nn.Conv2d(8, 3, 3), (2, 8, 8, 8)),
        (nn.Conv2d(8, 4, 3, groups=2), (2, 8, 8, 8)),
        (nn.ConvTranspose2d(8, 3, 3), (2, 8, 8, 8)),
        (nn.Conv3d(8, 3, 3), (2, 8, 8, 8, 8)),
    ],
)
def test_consumers_receive_zeros(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    silent = x.clone()
    silent.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)[GONE] = 0
    with masked(nn.Sequential(layer), [(group(8, ("0", Role.CONSUMER)), GONE)]):
        assert torch.equal(layer(x), layer(silent)) or torch.allclose(layer(x), layer(silent))
    assert not torch.allclose(layer(x), layer(silent))


def test_producers_norms_by_channel_and_activations_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.randn(2, *IMAGE)
    whole, expected = group(8, ("0", Role.PRODUCER), ("1", Role.NORM), ("2", Role.PASSING)), model(x)
    with masked(model, [(whole, GONE)]):
        assert torch.equal(model(x), expected)


def test_several_groups_meet_in_one_consumer() -> None:
    layer = nn.Linear(8, 3)
    low = ChannelGroup("a", 4, 1, (Member("0", Role.CONSUMER, torch.arange(4), torch.arange(4), 8),))
    high = ChannelGroup("b", 4, 1, (Member("0", Role.CONSUMER, torch.arange(4, 8), torch.arange(4), 8),))
    x = torch.randn(2, 8)
    silent = x.clone()
    silent[:, [1, 6]] = 0
    with masked(nn.Sequential(layer), [(low, [1]), (high, [2])]):
        assert torch.allclose(layer(x), layer(silent.detach()), atol=1e-6)


def hooks(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__]


def test_nothing_is_left_behind_when_something_raises() -> None:
    architecture = SMALL["convnext_block"]
    model = architecture.randomised()
    chosen = [(group, [0, 3]) for group in PruningGraph(model, architecture.inputs).prunable]
    with pytest.raises(KeyError, match="on purpose"), masked(model, chosen):
        raise KeyError("on purpose" if len(hooks(model)) >= 4 else "no hooks were set")
    assert not hooks(model)
    with pytest.raises(RuntimeError), masked(model, chosen):
        model(torch.randn(1, 5, 8, 8))
    assert not hooks(model)


def test_a_group_that_does_not_fit_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    fitting = group(8, ("0", Role.CONSUMER), ("1", Role.NORM))
    with (
        pytest.raises(AttributeError),
        masked(model, [(fitting, [0]), (group(8, ("9", Role.CONSUMER)), [0])]),
    ):
        pass
    assert not hooks(model)


def test_a_wrapped_norm_stays_wrapped() -> None:
    norm = nn.LayerNorm(8)
    wrapped = norm.forward = lambda x: nn.LayerNorm.forward(norm, x) + 1  # type: ignore[method-assign]
    model = nn.Sequential(norm)
    with masked(model, [(group(8, ("0", Role.NORM)), GONE)]):
        assert norm.forward is not wrapped
    assert norm.forward is wrapped


def test_masks_can_be_nested_and_trained_under() -> None:
    architecture = SMALL["residual"]
    model, x = architecture.randomised(), torch.randn(3, *IMAGE)
    groups = {group.name: group for group in PruningGraph(model, architecture.inputs).prunable}
    both = [(groups["conv1"], [0, 1]), (groups["conv2"], [2])]
    with masked(model, both):
        together = model(x)
    with masked(model, both[:1]), masked(model, both[1:]):
        assert torch.allclose(model(x), together, atol=1e-6)
        model(x).sum().backward()
    assert model.fc.weight.grad[:, 2].abs().max() == 0
    assert model.conv2.weight.grad[:, [0, 1]].abs().max() == 0
    assert model.conv2.weight.grad[:, 2:].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masks_take_the_type_of_what_they_silence(dtype: torch.dtype) -> None:
    architecture = SMALL["group_norm"]
    model = architecture.randomised()
    chosen = [(group, [0]) for group in PruningGraph(model, architecture.inputs).prunable]
    model.to(dtype)
    with masked(model, chosen):
        assert model(torch.randn(2, *IMAGE, dtype=dtype)).dtype == dtype


def test_no_units_silence_nothing() -> None:
    architecture = SMALL["layer_norm"]
    model, x = architecture.randomised(), torch.randn(2, *architecture.shape)
    expected = model(x)
    with masked(model, [(group, []) for group in PruningGraph(model, architecture.inputs).prunable]):
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_where_all_are_silenced_the_consumers_receive_zeros(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(WIDTH, 3, 1) if name in FIRST else nn.Linear(WIDTH, 3)
    model, x = nn.Sequential(NORMS[name](), layer), torch.randn(2, WIDTH, WIDTH, WIDTH)
    everything = [(group(WIDTH, ("0", Role.NORM), ("1", Role.CONSUMER)), range(WIDTH))]
    expected = layer(torch.zeros_like(x))
    with masked(model, everything):
        assert torch.allclose(model(x), expected)
    with Masks(model) as masks:
        masks.silence(everything)
        assert torch.allclose(model(x), expected)


@pytest.mark.parametrize("name", SMALL)
def test_switched_masks_give_what_masks_give_and_leave_every_bit_as_it_was(name: str) -> None:
    architecture = SMALL[name]
    model, x = architecture.randomised(), torch.randn(3, *architecture.shape)
    groups = PruningGraph(model, architecture.inputs).prunable
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense = model(x)
    every_third = [(group, range(0, group.units - 1, 3)) for group in groups]
    last = [(groups[-1], [groups[-1].units - 1])]
    with Masks(model) as masks:
        for silenced in (every_third, last, every_third):
            with masked(model, silenced):
                expected = model(x)
            masks.silence(silenced)
            assert masks.changed
            assert torch.allclose(model(x), expected, atol=1e-5 * expected.abs().max().item())
            masks.clear()
            assert torch.equal(model(x), dense)
        masks.silence(every_third)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not hooks(model)


def test_a_weight_that_is_shared_or_treated_before_use_is_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Doubled(8, 8))
    model[1].weight = model[0].weight
    x = torch.randn(4, 8)
    silenced = [(group(8, ("1", Role.CONSUMER), ("2", Role.CONSUMER)), GONE)]
    with masked(model, silenced):
        expected = model(x)
    with Masks(model) as masks:
        weights = [layer.weight.clone() for layer in model]
        masks.silence(silenced)
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True))
        assert torch.equal(model(x), expected)
    assert not hooks(model)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_silenced_kernels_are_zero_and_no_others(groups: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)).to(memory_format=layout)
    dense, inputs = model[0].weight.detach().clone(), 4 // groups
    places = torch.tensor([0, 3, 4 * inputs + 1])
    expected = dense.clone()
    for place in places.tolist():
        expected[place // inputs, place % inputs] = 0
    with Masks(model) as masks:
        masks.silence(kernels={"0": torch.tensor([1, 2])})
        masks.silence(kernels={"0": places})
        assert torch.equal(model[0].weight, expected)
        assert masks.changed == (model[0],)
    assert torch.equal(model[0].weight, dense)


def test_kernels_that_are_not_there_are_refused_and_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(4, 4))
    before = [p.clone() for p in model.parameters()]
    for kernels, message in (
        ({"0": torch.tensor([1]), "1": torch.tensor([0])}, "'1' is a Linear"),
        ({"0": torch.tensor([24])}, "0..23; got 24"),
    ):
        with pytest.raises(PlanError, match=message), Masks(model) as masks:
            masks.silence(kernels=kernels)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
