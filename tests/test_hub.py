from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

import dscore_plugin
from dscore_plugin.artifact import save_pruned
from dscore_plugin.errors import ArtifactError, ModelError
from dscore_plugin.hub import create_model, push_to_hub, save_for_hub
from dscore_plugin.models import create_model as dense

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NUMBERS = {"before": {"macs": 4000, "params": 200}, "after": {"macs": 1000, "params": 100}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = dscore_plugin.prune(dense("cifar_resnet20", num_classes=4), X[:1], "d_score", 0.5)
    top1 = {"top1": 91.25, "macs": 1000, "params": 100, "latency_ms": None}
    return save_pruned(
        model, tmp_path_factory.mktemp("hub") / "model", input_shape=(3, 32, 32), criterion="d_score",
        numbers=NUMBERS, metrics={"pruned": top1},
    )  # fmt: skip


class Hub:
    """A hub that is a folder, and a cache that keeps links, as the real one does."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def HfApi(self, token: str | None = None, **_: Any) -> Hub:  # noqa: N802
        return self

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        self.calls.append((repository, private))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / "files" / repo_id)

    def snapshot_download(
        self, repository: str, *, revision: str | None, allow_patterns: list[str], **_: Any
    ) -> str:
        self.calls.append((repository, revision))
        if not (self.root / "files" / repository).exists():
            raise OSError(f"404 {repository}")
        snapshot = self.root / "cache" / str(len(self.calls))
        snapshot.mkdir(parents=True)
        for name in allow_patterns:
            if (self.root / "files" / repository / name).exists():
                (snapshot / name).symlink_to(self.root / "files" / repository / name)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.HfApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def same(one: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(one(X), other(X))


def test_a_folder_is_loaded_by_its_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dscore_plugin.load_pruned(folder)
    assert same(create_model(folder), expected)
    assert same(create_model(f"local-dir:{folder}"), expected)
    monkeypatch.chdir(folder.parent)
    assert same(create_model("model"), expected)


def test_the_path_of_a_folder_may_hold_a_colon(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a:b")
    assert same(create_model(f"local-dir:{tmp_path / 'a:b'}"), create_model(tmp_path / "a:b"))


def test_what_is_pushed_can_be_had_again(folder: Path, hub: Hub) -> None:
    assert (
        push_to_hub(folder, "someone/small-resnet", private=True)
        == "https://huggingface.co/someone/small-resnet"
    )
    assert hub.calls == [("someone/small-resnet", True)]
    expected = dscore_plugin.load_pruned(folder)
    assert same(create_model("someone/small-resnet"), expected)
    assert same(create_model("hf-hub:someone/small-resnet@v1"), expected)
    assert hub.calls[1:] == [("someone/small-resnet", None), ("someone/small-resnet", "v1")]


def test_a_repository_follows_the_conventions(folder: Path, tmp_path: Path) -> None:
    out = save_for_hub(folder, tmp_path / "repository", name="someone/small-resnet")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "metrics.json", "model.safetensors", "pruned_structure.json",
    ]  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("cifar_resnet20", 4)
    assert config["pretrained_cfg"] == {"input_size": [3, 32, 32]}
    assert config["dscore_plugin"]["numbers"] == NUMBERS
    card = (out / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: dscore-plugin\npipeline_tag: image-classification\ntags:\n- image-class"
    )
    assert "91.25" in card
    assert "dscore_plugin.create_model('someone/small-resnet')" in card
    assert "load_pruned" not in card
    assert str(tmp_path) not in card


def test_addresses_that_lead_nowhere(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"'cifar_resnet56' is neither .* dscore_plugin\.models\.create_model\)"
    ):
        create_model("cifar_resnet56")
    with pytest.raises(ModelError, match="is neither a folder nor a repository"):
        create_model("x" * 300)
    with pytest.raises(ModelError, match="'someone/none' cannot be downloaded from the Hub: 404"):
        create_model("someone/none")
    with pytest.raises(ArtifactError, match="there is no artifact at"):
        create_model(f"local-dir:{tmp_path / 'none'}")
    (tmp_path / "files" / "someone" / "dense").mkdir(parents=True)
    with pytest.raises(
        ArtifactError, match="has no pruned_structure.json; dense networks are loaded with timm"
    ):
        create_model("someone/dense")
    with pytest.raises(ModelError, match="'small' is no repository; expected 'owner/name'"):
        push_to_hub(tmp_path, "small")


def test_a_damaged_artifact_is_not_laid_out(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "model"))
    (damaged / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="model.safetensors is missing"):
        save_for_hub(damaged, tmp_path / "out")
    (damaged / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ArtifactError, match="truncated or no safetensors file"):
        save_for_hub(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.json"])
def test_links_out_of_an_artifact_are_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    linked = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.move(linked / name, tmp_path / name)
    (linked / name).symlink_to(tmp_path / name)
    with pytest.raises(ArtifactError, match=f"{name} is a link that leaves the folder"):
        save_for_hub(linked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_custom_model_cannot_be_shared(tmp_path: Path) -> None:
    save_pruned(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "model")
    with pytest.raises(ArtifactError, match="holds a custom model"):
        save_for_hub(tmp_path / "model", tmp_path / "out")
