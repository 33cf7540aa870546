from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dscore_plugin.datasets import ImageSet
from dscore_plugin.errors import CriterionError, ModelError
from dscore_plugin.selection.feature_maps import divide, feature_map_sizes, feature_maps
from tests.selection.helpers import Generated, forwards_are_their_own, labelled_images, network

SHAPE = (3, 8, 8)
EXAMPLE = (torch.zeros(1, *SHAPE),)
MODULES = ("layer1.0.bn2", "layer2.0.bn2", "layer3.2.bn2")


def outputs(model: nn.Module, images: ImageSet) -> dict[str, torch.Tensor]:
    """All maps at once, layer by layer."""
    kept: dict[str, torch.Tensor] = {}
    batch = images.source.plain(images.indices)
    for name in MODULES:
        hook = model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: kept.__setitem__(name, output.flatten(1).clone())
        )
        with torch.no_grad():
            logits = model(batch)
        hook.remove()
    return {**kept, "predicted": logits.argmax(dim=1)}


@pytest.mark.parametrize("limit", [2**30, 20 * 4 * 700, 20 * 4 * 90])
def test_slices_make_up_the_maps_and_stay_below_the_limit(limit):
    model = network("cifar_resnet20").train()
    model.eval()
    images = labelled_images(model, 20, SHAPE)
    expected = outputs(model, images)
    model.train()
    sizes = feature_map_sizes(model, EXAMPLE, MODULES)
    assert sizes == {"layer1.0.bn2": 1024, "layer2.0.bn2": 512, "layer3.2.bn2": 256}
    found: dict[str, list[torch.Tensor]] = {}
    for part in feature_maps(model, images, sizes, memory_limit=limit, batch_size=7):
        assert 4 * part.values.numel() <= limit
        assert part.values.shape[1] == part.place.stop - part.place.start
        assert part.place.is_last == (part.place.stop == sizes[part.place.module])
        assert torch.equal(part.predicted, expected["predicted"])
        assert forwards_are_their_own(model)
        found.setdefault(part.place.module, []).append(part.values)
    assert list(found) == list(sizes)
    for name, parts in found.items():
        torch.testing.assert_close(torch.cat(parts, dim=1), expected[name], rtol=1e-4, atol=1e-4)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_types_run_in_float32(dtype):
    model = network("cifar_resnet20").to(dtype)
    same = copy.deepcopy(model).float()
    images = labelled_images(same, 6, SHAPE)
    model.load_state_dict(same.state_dict())
    sizes = feature_map_sizes(model, (EXAMPLE[0].to(dtype),), MODULES[:1])
    (found,), (expected,) = (
        list(feature_maps(m, images, sizes)) for m in (model, copy.deepcopy(model).float())
    )
    assert found.values.dtype == torch.float32
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.predicted, expected.predicted)
    assert next(model.parameters()).dtype == dtype


def test_as_few_passes_as_can_be():
    passes = divide({"a": 5, "b": 7, "c": 1}, images=3, memory_limit=3 * 4 * 6 + 5)
    assert [[(s.module, s.start, s.stop) for s in slices] for slices in passes] == [
        [("a", 0, 5)], [("b", 0, 5)], [("b", 5, 7), ("c", 0, 1)],
    ]  # fmt: skip
    assert divide({}, images=3) == []


def test_hooks_go_and_modes_come_back_when_a_batch_fails():
    model = network("cifar_resnet20")
    sizes = feature_map_sizes(model, EXAMPLE, MODULES)
    model.train()
    wrong = ImageSet(Generated(torch.zeros(4, 5, 8, 8), torch.zeros(4, dtype=torch.int64)), torch.arange(4))
    with pytest.raises(RuntimeError):
        list(feature_maps(model, wrong, sizes))
    assert forwards_are_their_own(model)
    assert all(module.training for module in model.modules())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused, self.pair = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pair(self.layer(self.layer(x)))[0]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("layer", "called more than once"),
        ("unused", "not called in forward"),
        ("pair", "gives a tuple"),
    ],
)
def test_modules_without_a_feature_map(module, message):
    with pytest.raises(ModelError, match=message):
        feature_map_sizes(Twice(), (torch.zeros(2, 4),), [module])


def test_a_limit_without_room():
    with pytest.raises(CriterionError, match="give 400 bytes or more"):
        divide({"a": 5}, images=100, memory_limit=399)
