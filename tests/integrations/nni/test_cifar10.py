"""The real ResNet-56, pruned through NNI by D-Score, sped up, saved and loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from dscore_plugin import load_pruned, save_pruned
from dscore_plugin.datasets import load_data
from dscore_plugin.integrations.nni import CriterionPruner, removable_layers, set_dependency_groups, speedup
from dscore_plugin.models import create_model, load_weights


@torch.no_grad()
def logits(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    model.eval()
    return torch.cat([model(images) for images, _ in batches])


@pytest.mark.cifar10
def test_resnet56_keeps_its_accuracy_from_the_mask_to_the_loaded_artifact(
    shared: Path, tmp_path: Path
) -> None:
    data = load_data(f"cifar10:{shared / 'data' / 'cifar10'}")
    model = create_model("cifar_resnet56")
    load_weights(model, shared / "weights" / "cifar10" / "resnet56.safetensors")
    inputs = (torch.zeros(1, 3, 32, 32),)
    batches = list(data.test.subset(200).loader(200))
    labels = torch.cat([labels for _, labels in batches])
    config = [{"op_names": removable_layers(model, inputs), "sparse_ratio": 0.3, "criterion": "d_score"}]
    assert len(config[0]["op_names"]) == 27  # the first convolution of every block

    pruner = CriterionPruner(model, set_dependency_groups(model, config, inputs), example_inputs=inputs)
    _, masks = pruner.compress()
    under_mask = logits(model, batches)
    pruner.unwrap_model()
    speedup(model, inputs, masks, say=pytest.fail)
    save_pruned(model, tmp_path / "pruned", input_shape=(3, 32, 32), criterion="d_score")
    loaded = logits(load_pruned(tmp_path / "pruned"), batches)

    assert torch.equal(loaded, logits(model, batches))
    assert (loaded - under_mask).abs().max() <= 1e-4 * loaded.abs().max()
    top1 = (loaded.argmax(1) == labels).float().mean()
    assert torch.equal(loaded.argmax(1), under_mask.argmax(1))
    assert top1 > 0.3  # far above chance, and without any training
    assert model.layer1[0].conv1.out_channels == 12


def test_an_option_a_network_is_masked_whole_and_pruned_where_it_can_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model, inputs = create_model("cifar_resnet20").eval(), (torch.zeros(1, 3, 32, 32),)
    x = torch.randn(2, 3, 32, 32)
    pruner = CriterionPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], example_inputs=inputs)
    _, masks = pruner.compress()
    assert len(masks) == 19
    with torch.no_grad():
        under_mask = model(x)
    pruner.unwrap_model()
    with caplog.at_level(logging.WARNING, "dscore_plugin.nni"):
        speedup(model, inputs, masks)
    with torch.no_grad():
        assert torch.allclose(model(x), under_mask, atol=1e-4 * float(under_mask.abs().max()))
    assert [block.conv1.out_channels for block in model.layer1] == [8, 8, 8]
    assert model.conv1.out_channels == 16
    assert any("8 masked channels of 'conv1' stay, zeroed: its channels" in line for line in caplog.messages)
