from __future__ import annotations

from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

import dscore_plugin
from dscore_plugin import export
from dscore_plugin.artifact import save_pruned
from dscore_plugin.errors import ArtifactError, ModelError
from dscore_plugin.export import export_folder, export_model
from dscore_plugin.models import create_model

X = (torch.zeros(2, 3, 32, 32),)


@pytest.fixture
def pruned() -> nn.Module:
    torch.manual_seed(0)
    return dscore_plugin.prune(
        create_model("cifar_resnet20"), torch.zeros(1, 3, 32, 32), "d_score", 0.5
    ).train()


@pytest.fixture
def folder(pruned: nn.Module, tmp_path: Path) -> Path:
    return save_pruned(pruned, tmp_path / "model", input_shape=(3, 32, 32))


def test_torch_export_gives_the_same_outputs(folder: Path) -> None:
    found = export_folder(folder, form="torch-export", batch=2)
    assert found.path == folder / "model.pt2"
    assert found.difference <= 1e-6
    assert found.size == found.path.stat().st_size
    x = torch.randn(2, 3, 32, 32)
    loaded = torch.export.load(found.path).module()
    assert torch.allclose(loaded(x), dscore_plugin.load_pruned(folder)(x), atol=1e-5)


def test_onnx_gives_the_same_outputs(pruned: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = export_model(pruned, X, tmp_path / "net.onnx")
    assert found.difference <= 1e-4
    assert pruned.training
    x = torch.randn(2, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(found.path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.as_tensor(logits), pruned.eval()(x), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_file_that_computes_something_else_is_not_kept(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> list[Tensor]:
        path.write_bytes(b"wrong")
        return [model(*inputs) * 1.01]

    monkeypatch.setattr(export, "_through_export", wrong)
    with pytest.raises(ModelError, match="differs by 1.0e-02 of the largest output; expected at most 1e-04"):
        export_model(pruned, X, tmp_path / "net.pt2", form="torch-export")
    assert not list(tmp_path.iterdir())


def test_nan_in_any_output_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, 2 * x

    def spoilt(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> list[Tensor]:
        path.write_bytes(b"wrong")
        first, second = model(*inputs)
        return [first, second * torch.nan]

    monkeypatch.setattr(export, "_through_export", spoilt)
    with pytest.raises(ModelError, match="differs by nan"):
        export_model(Two(), X, tmp_path / "net.pt2", form="torch-export")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="Branching cannot be exported by torch.export"):
        export_model(Branching(), X, tmp_path / "net.pt2", form="torch-export")


def test_bad_input_is_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelError, match="'onxx' is unknown; expected one of onnx, torch-export; did you mean"
    ):
        export_folder(folder, form="onxx")
    with pytest.raises(ArtifactError, match="exists already"):
        export_folder(folder, folder / "model.safetensors", form="torch-export")
    with pytest.raises(ArtifactError, match="there is no folder"):
        export_folder(folder, tmp_path / "none" / "x.pt2", form="torch-export")
    with pytest.raises(ModelError, match="batch is 0; expected at least 1 image"):
        export_folder(folder, form="torch-export", batch=0)
    with pytest.raises(ModelError, match="an example input is empty"):
        export_model(nn.ReLU(), (torch.zeros(0, 3),), tmp_path / "x.pt2", form="torch-export")
    with pytest.raises(ModelError, match=r"Linear does not run on inputs of shape \(1, 3\): RuntimeError"):
        export_model(nn.Linear(2, 2), (torch.zeros(1, 3),), tmp_path / "x.pt2", form="torch-export")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"needs onnx, onnxscript, onnxruntime; pip install 'dscore-plugin\[onnx\]'"
    ):
        export_folder(folder)


def test_an_artifact_without_an_input_shape_is_refused(pruned: nn.Module, tmp_path: Path) -> None:
    save_pruned(pruned, tmp_path / "model")
    with pytest.raises(ArtifactError, match="does not say what its inputs look like"):
        export_folder(tmp_path / "model", form="torch-export")


def test_optimisations_that_change_the_result_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = export._run_onnx

    def with_wrong_optimisations(
        path: Path, inputs: tuple[Tensor, ...], optimised: bool = True
    ) -> list[Tensor]:
        return [x + 1.0 if optimised else x for x in run(path, inputs, optimised)]

    monkeypatch.setattr(export, "_run_onnx", with_wrong_optimisations)
    with pytest.raises(ModelError, match="without onnxruntime's graph optimisations it agrees"):
        export_model(nn.ReLU(), (torch.zeros(1, 3),), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_padding_in_front_of_a_pooling_is_exported_right_or_refused(tmp_path: Path) -> None:
    class Padded(
        nn.Module
    ):  # onnxruntime before 1.32 pads with minus infinity where the network pads with zeros
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.max_pool2d(functional.pad(x - 10.0, (1, 1, 1, 1)), 3, 2)

    right = Version(version("onnxruntime")) >= Version("1.32")
    with nullcontext() if right else pytest.raises(ModelError, match="microsoft/onnxruntime#24737"):
        export_model(Padded(), (torch.zeros(1, 3, 8, 8),), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists() == right


def test_the_first_cause_of_a_failed_export_is_told(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x @ x.transpose(-1, -2)).real  # ONNX has no such operator

    with pytest.raises(ModelError, match=r"Broken cannot be exported by ONNX: \w+: .*eig"):
        export_model(Broken(), (torch.zeros(1, 3, 8, 8),), tmp_path / "model.onnx")


def test_attention_over_windows_is_written_out_where_the_exporter_cannot_fuse_it(tmp_path: Path) -> None:
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused_attn = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fused_attn:
                return functional.scaled_dot_product_attention(x, x, x)
            return (x * x.shape[-1] ** -0.5 @ x.transpose(-1, -2)).softmax(dim=-1) @ x

    model = Windowed()
    exported = export_model(model, (torch.zeros(1, 2, 3, 4, 8),), tmp_path / "model.onnx")
    assert exported.difference <= 1e-4
    assert model.fused_attn
