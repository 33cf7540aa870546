"""The ResNet-18 of the Synaptic Strength paper's CIFAR experiments."""

from __future__ import annotations

import torch

from dscore_plugin.models import create_model
from dscore_plugin.surgery.layers import find_branches


def test_resnet18_for_small_images() -> None:
    model = create_model("cifar_resnet18").eval()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert len(find_branches(model)) == 8
    assert create_model("cifar_resnet18", num_classes=100, in_chans=1).fc.out_features == 100
