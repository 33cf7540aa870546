"""Artifacts of networks that have lost layers and kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dscore_plugin import plan_pruning
from dscore_plugin.artifact import load_pruned, read_structure, save_pruned
from dscore_plugin.errors import ArtifactError
from dscore_plugin.models import create_model
from dscore_plugin.surgery.kernels import kernel_masks, prune_kernels
from dscore_plugin.surgery.layers import find_branches, remove_branches, removed_branches
from tests.architectures import randomised

IMAGE = (3, 32, 32)


def sparse(model: nn.Module, keep: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    shapes = {name: model.get_submodule(name).weight.shape[:2] for name in convolutions}
    return prune_kernels(model, {n: torch.rand(s, generator=generator) < keep for n, s in shapes.items()})


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet18", "cifar_preresnet20"])
def test_layers_channels_and_kernels_come_back(name: str, custom: bool, tmp_path: Path) -> None:
    model = randomised(create_model(name)).eval()
    remove_branches(model, [branch.name for branch in find_branches(model)][1:4:2])
    plan_pruning(model, torch.zeros(1, *IMAGE), "l1", ratio=0.25).apply(model)
    sparse(model)
    model.get_submodule("conv1").weight.requires_grad_(False)
    save_pruned(model, tmp_path / "a", architecture="custom" if custom else None)
    loaded = load_pruned(tmp_path / "a", create_model(name) if custom else None)
    x = torch.randn(2, *IMAGE)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert removed_branches(loaded) == removed_branches(model)
    masks = kernel_masks(model)
    assert kernel_masks(loaded).keys() == masks.keys()
    assert all(torch.equal(kernel_masks(loaded)[n], mask) for n, mask in masks.items())
    assert not loaded.get_submodule("conv1").weight.requires_grad
    save_pruned(loaded, tmp_path / "b", architecture="custom" if custom else None)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (
        tmp_path / "a" / "model.safetensors"
    ).read_bytes()


def test_zeros_in_place_of_dense_layers_keep_their_width(tmp_path: Path) -> None:
    model = randomised(create_model("cifar_densenet40")).eval()
    plan_pruning(model, torch.zeros(1, *IMAGE), "l1", ratio=0.5).apply(model)
    remove_branches(model, [find_branches(model)[1].name])
    save_pruned(model, tmp_path / "a", architecture="custom")
    loaded = load_pruned(tmp_path / "a", create_model("cifar_densenet40"))
    x = torch.randn(2, *IMAGE)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg16_bn"])
def test_the_file_follows_the_sparsity(name: str, tmp_path: Path) -> None:
    model = create_model(name).eval()
    save_pruned(model, tmp_path / "dense")
    save_pruned(sparse(model), tmp_path / "sparse")
    dense, small = (sum(f.stat().st_size for f in (tmp_path / n).iterdir()) for n in ("dense", "sparse"))
    assert small <= 0.2 * dense


def test_half_precision_kernels_stay_half(tmp_path: Path) -> None:
    model = sparse(create_model("cifar_resnet20").eval()).to(torch.bfloat16)
    save_pruned(model, tmp_path / "a")
    loaded = load_pruned(tmp_path / "a")
    assert loaded.layer1[0].conv1.weight.dtype is torch.bfloat16
    assert torch.equal(loaded.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


def test_artifacts_from_before_surgery_load(tmp_path: Path) -> None:
    model = create_model("cifar_resnet20").eval()
    save_pruned(model, tmp_path / "a")
    path = tmp_path / "a" / "pruned_structure.json"
    structure = json.loads(path.read_text())
    del structure["surgery"]
    path.write_text(json.dumps(structure))
    assert read_structure(tmp_path / "a")["surgery"] == []
    load_pruned(tmp_path / "a")


LAYER = "layer1.0.conv1"
Edit = Callable[[dict[str, Any]], object]


def kernels_of(structure: dict[str, Any]) -> dict[str, Any]:
    layers: dict[str, Any] = structure["surgery"][-1]["layers"]
    return layers


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update(surgery=[3]), "is no entry"),
        (lambda s: s["surgery"][0].update(type="pickle"), "is not one that can be done"),
        (lambda s: s["surgery"].reverse(), "expected layers, then kernels"),
        (lambda s: s["surgery"][0].update(layers=["layer9"]), "layers cannot be removed: 'layer9'"),
        (lambda s: kernels_of(s).update({LAYER: [10**9, 16, 3, 3]}), "is not one that can be done"),
        (lambda s: kernels_of(s).update({LAYER: [16, 16, 1, 1]}), "do not make a weight of shape"),
        (lambda s: kernels_of(s).update({LAYER: [16, 64, 3, 3]}), "do not make a weight of shape"),
        (lambda s: kernels_of(s).update({LAYER: [4, 64, 3, 3]}), r"has shape \[4, 64, 3, 3\]; expected"),
        (lambda s: kernels_of(s).update({"bn1": [16, 16, 3, 3]}), "the kernels of 'bn1' are missing"),
    ],
)
def test_tampered_surgery_is_refused(edit: Edit, message: str, tmp_path: Path) -> None:
    model = sparse(remove_branches(create_model("cifar_resnet20").eval(), ["layer1.1"]))
    save_pruned(model, tmp_path / "a")
    path = tmp_path / "a" / "pruned_structure.json"
    structure = json.loads(path.read_text())
    edit(structure)
    path.write_text(json.dumps(structure))
    with pytest.raises(ArtifactError, match=message):
        load_pruned(tmp_path / "a")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.update({f"{LAYER}.weight.kernels": t[f"{LAYER}.weight.kernels"][1:]}),
            "not as many places",
        ),
        (lambda t: t[f"{LAYER}.weight.kernel_bits"].zero_(), "not as many places"),
        (lambda t: t.pop(f"{LAYER}.weight.kernel_bits"), "are missing"),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(1)}), "whole weight is there"),
    ],
)
def test_kernels_that_contradict_their_places_are_refused(
    edit: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    save_pruned(sparse(create_model("cifar_resnet20").eval()), tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    dense = create_model("cifar_resnet20")
    with pytest.raises(ArtifactError, match=message):
        load_pruned(tmp_path / "a", dense)
    assert not kernel_masks(dense)


def test_a_custom_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    model = remove_branches(create_model("cifar_resnet20").eval(), ["layer1.1"])
    save_pruned(sparse(model), tmp_path / "a", architecture="custom")
    other = create_model("cifar_resnet32", num_classes=7)
    with pytest.raises(ArtifactError):
        load_pruned(tmp_path / "a", other)
    assert removed_branches(other) == []
    assert other(torch.zeros(1, *IMAGE)).shape == (1, 7)
