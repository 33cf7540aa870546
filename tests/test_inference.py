"""Loading a saved network to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dscore_plugin import load_for_inference, load_pruned, prune, save_pruned
from dscore_plugin.errors import ArtifactError, ModelError
from dscore_plugin.models import create_model
from dscore_plugin.surgery.kernels import kernel_masks, prune_kernels
from dscore_plugin.surgery.sparse_execution import SparseExecution
from tests.architectures import randomised

X = torch.randn(2, 3, 32, 32)


def sparse_network() -> nn.Module:
    torch.manual_seed(0)
    model = randomised(create_model("cifar_resnet20")).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][1:]
    return prune_kernels(model, {n: torch.rand(model.get_submodule(n).weight.shape[:2]) > 0.9 for n in names})


def test_kernel_sparse_networks_run_on_measured_backends(tmp_path: Path) -> None:
    save_pruned(sparse_network(), tmp_path / "model", input_shape=(3, 32, 32))
    fast, slow = load_for_inference(tmp_path / "model", rounds=1), load_pruned(tmp_path / "model")
    assert isinstance(fast, SparseExecution)
    assert len(fast.choices) == 18
    with torch.no_grad():
        expected = slow(X)  # another batch size than the one that was timed
        assert (fast(X) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_others_are_loaded_as_they_are(tmp_path: Path) -> None:
    model = prune(create_model("cifar_resnet20"), X[:1], ratio=0.3)
    save_pruned(model, tmp_path / "model")
    loaded = load_for_inference(tmp_path / "model")
    assert not isinstance(loaded, SparseExecution)
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_kernels_without_an_input_shape_cannot_be_timed(tmp_path: Path) -> None:
    save_pruned(sparse_network(), tmp_path / "model")
    dense = create_model("cifar_resnet20")
    with pytest.raises(ArtifactError, match=r"save it with input_shape=\(C, H, W\)"):
        load_for_inference(tmp_path / "model", model=dense)
    with pytest.raises(ModelError, match="batch_size is 0; expected at least 1 image"):
        load_for_inference(tmp_path / "model", model=dense, batch_size=0)
    assert not kernel_masks(dense)
    save_pruned(sparse_network(), tmp_path / "other", input_shape=(4, 32, 32))
    with pytest.raises(ModelError, match="does not run on these inputs"):
        load_for_inference(tmp_path / "other")
