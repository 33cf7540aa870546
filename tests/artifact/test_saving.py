"""Save -> load -> the same bits; and nothing but an intact artifact loads."""

from __future__ import annotations

import json
import os
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import dscore_plugin
from dscore_plugin.artifact import load_pruned, read_structure, save_pruned, saving
from dscore_plugin.errors import ArtifactError
from dscore_plugin.models import create_model

Edit = Callable[[dict[str, Any]], None]


def randomise(model: nn.Module) -> nn.Module:
    """Make every value count: fresh networks hide errors behind zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.5 if "running_var" in name else tensor + 0.1 * noise)
    return model.eval()


def prune(model: nn.Module, image: Tensor, ratio: float = 0.3, **options: Any) -> nn.Module:
    pruner = tp.pruner.BasePruner(
        model, (image,), importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=ratio, **options
    )
    pruner.step()
    return model.eval()


def pruned_timm(name: str, size: int = 64, **model_args: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomise(create_model(name, num_classes=10, **model_args)).requires_grad_(True)
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return prune(model, image, ignored_layers=[model.get_classifier()]), image


def pruned_vit(embedding: bool = False) -> tuple[nn.Module, Tensor]:
    """A small ViT whose heads become narrower, with or without its residual stream."""
    torch.manual_seed(0)
    model = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, depth=2))
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    ignored = [model.head] if embedding else [model.head, model.patch_embed, model.norm]
    for block in model.blocks:
        block.attn.fused_attn = False
    prune(model, image, num_heads=heads, prune_head_dims=True, ignored_layers=ignored)
    for block in model.blocks:
        block.attn.head_dim = block.attn.qkv.out_features // 3 // block.attn.num_heads
        block.attn.attn_dim = block.attn.num_heads * block.attn.head_dim
    assert model.blocks[0].attn.head_dim < 64
    return model, image


class Toy(nn.Module):
    """Grouped, depthwise, transposed and 1-d convolutions, three norms, PReLU, an embedding, a stored buffer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.act = nn.PReLU(width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4, bias=False)
        self.norm2 = nn.GroupNorm(4, width)
        self.up = nn.ConvTranspose2d(width, 12, 2, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.sequence = nn.Conv1d(12, 8, 3)
        self.norm3 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("shift", torch.randn(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.stem(x)))
        x = self.depthwise(self.up(self.norm2(self.grouped(x)).relu()))
        x = self.sequence(x.flatten(2)).transpose(1, 2)
        return self.head(self.norm3(x).mean(1)) + self.shift


def pruned_toy() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 8, 8)
    model = randomise(Toy())
    return prune(model, image, ratio=0.5, ignored_layers=[model.head]), image


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet18": lambda: pruned_timm("resnet18"),
    "mobilenetv2_100": lambda: pruned_timm("mobilenetv2_100"),
    "densenet121": lambda: pruned_timm("densenet121"),
    "cifar_vgg16_bn": lambda: pruned_timm("cifar_vgg16_bn", size=32),
    "cifar_resnet20": lambda: pruned_timm("cifar_resnet20", size=32, shortcut="conv"),
    "vit heads": pruned_vit,
    "vit": lambda: pruned_vit(embedding=True),
}


def same_bits(one: nn.Module, other: nn.Module, image: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one(image), other(image))


@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model, image = MODELS[name]()
    save_pruned(model, tmp_path / "a")
    loaded = load_pruned(tmp_path / "a")
    assert not loaded.training
    assert same_bits(model, loaded, image)
    assert read_structure(tmp_path / "a")["modules"]
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_loaded_model_can_be_trained_pruned_and_saved_again(tmp_path: Path) -> None:
    model, image = pruned_timm("resnet18")
    loaded = load_pruned(save_pruned(model, tmp_path / "a")).train()
    loaded(image).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    loaded.zero_grad()
    prune(loaded, image, ratio=0.5, ignored_layers=[loaded.get_classifier()])
    again = load_pruned(save_pruned(loaded, tmp_path / "b"))
    assert again.conv1.out_channels < model.conv1.out_channels
    assert same_bits(loaded, again, image)


def test_custom_model_is_narrowed_in_place(tmp_path: Path) -> None:
    model, image = pruned_toy()
    structure = read_structure(save_pruned(model, tmp_path / "a"))
    assert structure["architecture"] == "custom"
    dense = Toy()
    loaded = load_pruned(tmp_path / "a", model=dense)
    assert loaded is dense
    assert same_bits(model, loaded, image)
    assert loaded.stem.out_channels == 8
    assert loaded.norm3.normalized_shape == model.norm3.normalized_shape
    assert isinstance(loaded.norm3.normalized_shape, tuple)


WITHOUT_PARAMETERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(16, affine=False),
    "LayerNorm": lambda: timm.layers.LayerNorm2d(16, affine=False),
    "BlurPool2d": lambda: timm.layers.BlurPool2d(16),
}


@pytest.mark.parametrize("name", WITHOUT_PARAMETERS)
def test_widths_of_layers_without_parameters_come_back(name: str, tmp_path: Path) -> None:
    def dense() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), WITHOUT_PARAMETERS[name](), nn.ReLU(), nn.Conv2d(16, 4, 3))

    image = torch.randn(2, 3, 8, 8)
    model = dscore_plugin.prune(dense(), image, "l1", ratio=0.5)
    assert model.get_submodule("0").out_channels == 8
    assert same_bits(model, load_pruned(save_pruned(model, tmp_path / "a"), dense()), image)


def test_custom_model_needs_its_dense_form(tmp_path: Path) -> None:
    model, _ = pruned_toy()
    save_pruned(model, tmp_path / "a")
    with pytest.raises(ArtifactError, match="custom model.*model=dense"):
        load_pruned(tmp_path / "a")


def test_custom_model_of_another_width_is_left_alone(tmp_path: Path) -> None:
    model, image = pruned_toy()
    save_pruned(model, tmp_path / "a")
    other = nn.Sequential(nn.Linear(2, 2))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ArtifactError, match="tensors are not those"):
        load_pruned(tmp_path / "a", model=other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_timm_model_loads_into_a_given_model_too(tmp_path: Path) -> None:
    model, image = pruned_timm("resnet18")
    save_pruned(model, tmp_path / "a")
    dense = timm.create_model("resnet18", num_classes=10)
    assert same_bits(model, load_pruned(tmp_path / "a", model=dense), image)


def test_saving_changes_nothing_and_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    model, _ = pruned_timm("resnet18")
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    load_pruned(save_pruned(model, tmp_path / "a"))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_preserved(dtype: torch.dtype, tmp_path: Path) -> None:
    model, image = pruned_timm("resnet18")
    model.to(dtype)
    loaded = load_pruned(save_pruned(model, tmp_path / "a"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.bn1.num_batches_tracked.dtype == torch.int64
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_channels_last_becomes_contiguous(tmp_path: Path) -> None:
    model, image = pruned_timm("resnet18")
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    model.to(memory_format=torch.channels_last)
    loaded = load_pruned(save_pruned(model, tmp_path / "a"))
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model, _ = pruned_timm("resnet18")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("layer1"))
    loaded = load_pruned(save_pruned(model, tmp_path / "a"))
    trainable = {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
    assert trainable == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.mixing = nn.Linear(6, 6)
        self.again = self.mixing
        self.output = nn.Linear(6, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.again(self.mixing(self.embedding(x)).relu()))


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = Tied().eval()
    save_pruned(model, tmp_path / "a")
    assert set(load_file(tmp_path / "a" / "model.safetensors")) == {
        "embedding.weight",
        "mixing.weight",
        "mixing.bias",
    }
    loaded = load_pruned(tmp_path / "a", model=Tied())
    assert loaded.output.weight is loaded.embedding.weight
    assert loaded.again is loaded.mixing
    assert same_bits(model, loaded, torch.arange(7))


def test_views_of_one_storage_are_stored_apart(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    whole = torch.randn(4, 3)
    model[0].weight, model[1].weight = nn.Parameter(whole[:2]), nn.Parameter(whole[2:])
    save_pruned(model, tmp_path / "a")
    loaded = load_pruned(tmp_path / "a", model=nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]))
    assert torch.equal(torch.cat([loaded[0].weight, loaded[1].weight]), whole)


class SharedBuffers(nn.Module):
    """A mask that two layers share, one of them under two names, and a buffer that is a parameter's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.one
        mask = torch.rand(4)
        self.one.register_buffer("mask", mask, persistent=False)
        self.two.register_buffer("mask", mask, persistent=False)
        self.register_buffer("start", self.one.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.two(self.one(x) * self.one.mask) * self.two.mask) @ self.start


def test_shared_buffers_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    model = SharedBuffers().eval()
    save_pruned(model, tmp_path / "a")
    assert len(load_file(tmp_path / "a" / "model.safetensors")) == 5
    loaded = load_pruned(tmp_path / "a", SharedBuffers())
    assert loaded.one.mask is loaded.two.mask
    assert isinstance(loaded.one.weight, nn.Parameter)
    assert loaded.start.data_ptr() == loaded.one.weight.data_ptr()
    assert same_bits(model, loaded, torch.randn(2, 4))


class Caching(nn.Module):
    """Makes a buffer when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self.linear, "table"):
            self.linear.register_buffer("table", torch.randn(4), persistent=False)
        return self.linear(x) * self.linear.table


def test_buffer_that_forward_makes_comes_back(tmp_path: Path) -> None:
    model, x = Caching().eval(), torch.randn(2, 4)
    model(x)
    loaded = load_pruned(save_pruned(model, tmp_path / "a"), Caching())
    assert same_bits(model, loaded, x)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    edit_structure(tmp_path / "a", lambda s: s["buffers"]["linear.table"].update(shape=[5]))
    dense = Caching()
    with pytest.raises(ArtifactError, match=r"'linear.table' is rebuilt with shape \[4\]; expected \[5\]"):
        load_pruned(tmp_path / "a", dense)
    assert not hasattr(dense.linear, "table")


@pytest.mark.parametrize("name", ["levit_128s", "swinv2_cr_tiny_224", "test_vit_relpos"])
def test_buffers_that_nobody_saves_are_rebuilt(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name).eval()
    rebuilt = set(dict(model.named_buffers())) - set(model.state_dict())
    assert rebuilt
    loaded = load_pruned(save_pruned(model, tmp_path / "a"))
    found = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, found[key]) for key, buffer in model.named_buffers())
    assert same_bits(model, loaded, torch.randn(1, *model.pretrained_cfg["input_size"]))


def test_rebuilt_buffers_have_the_saved_dtype(tmp_path: Path) -> None:
    model = timm.create_model("swinv2_cr_tiny_224").to(torch.bfloat16).eval()
    found = dict(load_pruned(save_pruned(model, tmp_path / "a")).named_buffers())
    assert torch.bfloat16 in {buffer.dtype for buffer in model.buffers()}
    for name, buffer in model.named_buffers():
        assert found[name].dtype == buffer.dtype
        assert torch.equal(found[name], buffer)


def test_buffers_without_an_own_initialisation_come_from_a_real_build(tmp_path: Path) -> None:
    @timm.models.register_model
    def net_with_plain_tensors(pretrained: bool = False, width: int = 8, **kwargs: Any) -> nn.Module:
        model = Toy(width)
        model.shift.copy_(torch.arange(5.0))
        model.register_buffer("steps", torch.linspace(0, 1, 5), persistent=False)
        model.table = torch.arange(3.0)
        return model

    model = net_with_plain_tensors().eval()
    save_pruned(model, tmp_path / "a", architecture="net_with_plain_tensors", model_args={"width": 16})
    loaded = load_pruned(tmp_path / "a")
    for name in ("shift", "steps", "table"):
        assert torch.equal(getattr(loaded, name), getattr(model, name))
    assert same_bits(model, loaded, torch.randn(2, 3, 8, 8))


def test_builder_that_cannot_run_on_meta_is_run_for_real(tmp_path: Path) -> None:
    @timm.models.register_model
    def net_with_item(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model = Toy(width=int(torch.linspace(0, 16, 2)[1].item()))
        model.shift.fill_(2)
        return model

    model = net_with_item()
    prune(model, torch.randn(2, 3, 8, 8), ratio=0.5, ignored_layers=[model.head])
    save_pruned(model, tmp_path / "a", architecture="net_with_item", model_args={})
    loaded = load_pruned(tmp_path / "a")
    assert same_bits(model, loaded, torch.randn(2, 3, 8, 8))


def test_buffer_of_changed_shape_is_stored(tmp_path: Path) -> None:
    model = timm.create_model("resnetblur18", num_classes=10).eval()
    blur = next(m for m in model.modules() if type(m).__name__ == "BlurPool2d")
    assert blur.filt.shape[0] == blur.channels
    blur.channels, blur.filt = 5, 2 * blur.filt[:5]
    save_pruned(model, tmp_path / "a")
    structure = read_structure(tmp_path / "a")
    assert [entry["stored"] for entry in structure["buffers"].values()].count(True) == 1
    found = dict(load_pruned(tmp_path / "a").named_buffers())
    assert all(torch.equal(buffer, found[key]) for key, buffer in model.named_buffers())


def test_structure_holds_what_was_asked(tmp_path: Path) -> None:
    model, _ = pruned_timm("resnet18")
    numbers = {"before": {"macs": 2, "params": 20}, "after": {"macs": 1, "params": 10}}
    save_pruned(
        model,
        tmp_path / "a",
        input_shape=(3, 64, 64),
        plan={"made_by": {"ratio": 0.3}, "removals": [{"layer": "conv1", "channels": (1, 2)}]},
        history=[["conv1", True, [1, 2]]],
        criterion="d_score",
        numbers=numbers,
        metrics={"dense": {"top1": 90.0}},
    )
    structure = read_structure(tmp_path / "a")
    assert structure["format_version"] == 1
    assert structure["architecture"] == "resnet18"
    assert structure["model_args"] == {"num_classes": 10}
    assert structure["input_shape"] == [3, 64, 64]
    assert structure["plan"]["removals"] == [{"layer": "conv1", "channels": [1, 2]}]
    assert structure["pruning_history"] == [["conv1", True, [1, 2]]]
    assert (structure["criterion"], structure["numbers"]) == ("d_score", numbers)
    assert structure["versions"]["torch"] == torch.__version__.partition("+")[0]
    entry = structure["modules"]["conv1"]
    assert entry == {
        "class": "Conv2d",
        "attributes": {"out_channels": model.conv1.out_channels},
        "shapes": {"weight": list(model.conv1.weight.shape)},
    }
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics == {"dense": {"top1": 90.0}, "pruned": None, "recalibrated": None, "finetuned": None}


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=10)
    structure = read_structure(save_pruned(model, tmp_path / "a"))
    assert structure["modules"] == {}
    assert (structure["tied"], structure["frozen"], structure["buffers"]) == ({}, [], {})


def test_folder_holds_no_pickle(tmp_path: Path) -> None:
    model, _ = pruned_timm("resnet18")
    save_pruned(model, tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "model.safetensors",
        "pruned_structure.json",
        "metrics.json",
        "report.md",
    }
    for path in (tmp_path / "a").iterdir():
        with pytest.raises((ValueError, IndexError, UnicodeDecodeError)), path.open("rb") as file:
            for _ in pickletools.genops(file):
                pass


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    model, image = pruned_timm("resnet18")
    save_pruned(model, tmp_path / "a")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert same_bits(model, load_pruned(tmp_path / "a"), image)


def test_report_is_the_given_text_or_is_written_from_the_folder(tmp_path: Path) -> None:
    model, _ = pruned_timm("resnet18")
    save_pruned(model, tmp_path / "a", report="# mine\n")
    assert (tmp_path / "a" / "report.md").read_text() == "# mine\n"
    save_pruned(
        model, tmp_path / "b", report=lambda folder: f"{(folder / 'model.safetensors').stat().st_size}"
    )
    assert int((tmp_path / "b" / "report.md").read_text()) > 1_000_000
    save_pruned(model, tmp_path / "c")
    assert "load_pruned" in (tmp_path / "c" / "report.md").read_text()


def test_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    model, _ = pruned_timm("resnet18")
    save_pruned(model, tmp_path / "a")
    before = (tmp_path / "a" / "pruned_structure.json").read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        save_pruned(model, tmp_path / "a", criterion="other")
    assert (tmp_path / "a" / "pruned_structure.json").read_bytes() == before
    save_pruned(model, tmp_path / "a", criterion="other", force=True)
    assert read_structure(tmp_path / "a")["criterion"] == "other"


def test_artifact_can_replace_the_one_it_was_loaded_from(tmp_path: Path) -> None:
    model, image = pruned_timm("resnet18")
    loaded = load_pruned(save_pruned(model, tmp_path / "a"))
    save_pruned(loaded, tmp_path / "a", force=True)
    assert same_bits(model, loaded, image)
    assert same_bits(model, load_pruned(tmp_path / "a"), image)


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(timm.create_model("resnet18"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- models that cannot be saved so that they load again ---


def replaced_activation(model: nn.Module) -> None:
    model.act1 = nn.SiLU()


def replaced_forward(model: nn.Module) -> None:
    model.layer1[0].forward = lambda x: x


def changed_eps(model: nn.Module) -> None:
    model.bn1.eps = 1e-3


def stale_width(model: nn.Module) -> None:
    model.conv1[0].out_channels = 63


def replaced_part_of_forward(model: nn.Module) -> None:
    features = model.forward_features
    model.forward_features = lambda x: 2 * features(x)


def set_what_was_none(model: nn.Module) -> None:
    model.layer2[0].downsample[0].divisor_override = 1


def added_layer(model: nn.Module) -> None:
    model.layer1.add_module("extra", nn.ReLU())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_activation, "module 'act1' is a SiLU, in the dense one a ReLU"),
        (replaced_forward, r"module 'layer1.0' has a replaced forward\(\)"),
        (changed_eps, "module 'bn1' has eps = 0.001, in the dense one 1e-05"),
        (replaced_part_of_forward, r"module '' has a replaced forward_features\(\)"),
        (set_what_was_none, "'layer2.0.downsample.0' has divisor_override = 1, in the dense one None"),
        (stale_width, "weight of Conv2d 'conv1.0' has shape"),
        (added_layer, "module 'layer1.extra' is in only one"),
    ],
)
def test_model_that_a_structure_cannot_express_is_refused(
    change: Callable[[nn.Module], None], message: str, tmp_path: Path
) -> None:
    model = timm.create_model("resnet18d")
    change(model)
    with pytest.raises(ArtifactError, match=message):
        save_pruned(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_hooks_are_left_out_with_a_warning(tmp_path: Path) -> None:
    model, x = timm.create_model("resnet18d").eval(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    model.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match=r"hooks of module 'layer1\.0\.conv1' are not saved"):
        save_pruned(model, tmp_path / "a")
    torch.testing.assert_close(load_pruned(tmp_path / "a")(x), expected)


def test_functions_that_a_builder_puts_into_attributes_are_compared(tmp_path: Path) -> None:
    @timm.models.register_model
    def net_with_functions(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model = Toy()
        model.activation, model.scaling = functional.relu, lambda x: 2 * x
        return model

    model = net_with_functions()
    save_pruned(model, tmp_path / "a", architecture="net_with_functions")
    for name in ("activation", "scaling"):
        changed = net_with_functions()
        setattr(changed, name, functional.gelu)
        with pytest.raises(ArtifactError, match=rf"has a replaced {name}\(\)"):
            save_pruned(changed, tmp_path / "b", architecture="net_with_functions")


def test_training_options_do_not_matter(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", drop_path_rate=0.1)
    model.drop_rate, model.bn1.momentum = 0.3, 0.01
    save_pruned(model, tmp_path / "a", model_args={})
    assert same_bits(model.eval(), load_pruned(tmp_path / "a"), torch.randn(1, 3, 64, 64))


def test_unwrapped_forward_does_not_matter(tmp_path: Path) -> None:
    model = timm.create_model("resnet18")
    model.forward = model.forward  # what accelerate and NNI leave behind
    assert read_structure(save_pruned(model, tmp_path / "a"))["architecture"] == "resnet18"


def test_changed_names_make_a_custom_model_unless_the_architecture_was_given(tmp_path: Path) -> None:
    model = timm.create_model("resnet18")
    model.fc = nn.Sequential(nn.Linear(512, 4))
    assert read_structure(save_pruned(model, tmp_path / "a"))["architecture"] == "custom"
    with pytest.raises(ArtifactError, match=r"missing: 'fc.bias', 'fc.weight'; unexpected: 'fc.0.bias'"):
        save_pruned(model, tmp_path / "b", architecture="resnet18")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "resnet19"}, "'resnet19' is unknown to timm; did you mean"),
        ({"model_args": {"pretrained": True}}, "argument 'pretrained' is refused"),
        ({"model_args": {"num_classes": 10**12}}, "out of range"),
        ({"model_args": {"layers": 3}}, "cannot be built"),
        ({"model_args": {"act_layer": nn.ReLU}}, "expected a plain value"),
        ({"model_args": {"nonsense": 1}}, "cannot be built"),
        ({"input_shape": (3, -1, 8)}, "input_shape"),
        ({"input_shape": (1, 3, 8, 8)}, r"input_shape is \[1, 3, 8, 8\]; expected .* without the batch"),
        ({"metrics": {"dense": {"top1": float("nan")}}}, "plain, finite"),
    ],
)
def test_arguments_that_cannot_be_saved(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        save_pruned(
            timm.create_model("resnet18"), tmp_path / "a", **({"architecture": "resnet18"} | arguments)
        )
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="meta device"):
        save_pruned(nn.Linear(2, 2, device="meta"), tmp_path / "a")

    class WithExtra(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(ArtifactError, match="only tensors are saved without pickle"):
        save_pruned(WithExtra(), tmp_path / "a")


# --- artifacts that must not load ---


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = pruned_timm("resnet18")
    return save_pruned(model, tmp_path_factory.mktemp("intact") / "a", input_shape=(3, 64, 64))


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "a"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        load_pruned(folder)
    assert "\n" not in str(caught.value)


def edit_structure(folder: Path, edit: Edit) -> None:
    path = folder / "pruned_structure.json"
    structure = json.loads(path.read_text())
    edit(structure)
    path.write_text(json.dumps(structure))


def edit_weights(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


STRUCTURES: dict[str, tuple[Edit, str]] = {
    "unknown version": (
        lambda s: s.update(format_version=2),
        "format version 2; this version .* reads version 1",
    ),
    "no version": (lambda s: s.pop("format_version"), "format version None"),
    "unknown field": (lambda s: s.update(weights="../b/model.safetensors"), "field 'weights' is unknown"),
    "missing field": (lambda s: s.pop("tied"), "field 'tied' is missing"),
    "field of another kind": (lambda s: s.update(modules=[]), "field 'modules' is a list"),
    "unknown architecture": (lambda s: s.update(architecture="resnet19"), "'resnet19' is unknown to timm"),
    "hub address": (lambda s: s.update(architecture="hf-hub:a/b"), "'hf-hub:a/b' is unknown"),
    "local folder": (lambda s: s.update(architecture="local-dir:/x"), "'local-dir:/x' is unknown"),
    "pretrained": (lambda s: s["model_args"].update(pretrained=True), "argument 'pretrained' is refused"),
    "checkpoint": (lambda s: s["model_args"].update(checkpoint_path="x"), "'checkpoint_path' is refused"),
    "config": (lambda s: s["model_args"].update(pretrained_cfg={"file": "x"}), "'pretrained_cfg' is refused"),
    "overlay": (lambda s: s["model_args"].update(pretrained_cfg_overlay={}), "is refused"),
    "cache": (lambda s: s["model_args"].update(cache_dir="/x"), "'cache_dir' is refused"),
    "nested argument": (lambda s: s["model_args"].update(a={"file": "x"}), "'file' is refused"),
    "name as argument": (lambda s: s["model_args"].update(name="vgg11"), "'name' is refused"),
    "huge argument": (lambda s: s["model_args"].update(num_classes=10**15), "out of range"),
    "unknown argument": (lambda s: s["model_args"].update(nonsense=1), "cannot be built"),
    "attribute not allowed": (
        lambda s: s["modules"]["conv1"]["attributes"].update(forward=1),
        "attribute 'forward' is not one that pruning changes",
    ),
    "dunder attribute": (
        lambda s: s["modules"]["conv1"]["attributes"].update(__class__=1),
        "attribute '__class__' is not one",
    ),
    "negative size": (
        lambda s: s["modules"]["conv1"]["attributes"].update(out_channels=-4),
        "out_channels = -4 is out of range",
    ),
    "absurd size": (
        lambda s: s["modules"]["conv1"]["attributes"].update(out_channels=10**12),
        "out_channels = 1000000000000 is out of range",
    ),
    "size as text": (lambda s: s["modules"]["conv1"]["attributes"].update(out_channels="8"), "out of range"),
    "size as fraction": (
        lambda s: s["modules"]["conv1"]["attributes"].update(out_channels=8.0),
        "out of range",
    ),
    "size as truth": (
        lambda s: s["modules"]["conv1"]["attributes"].update(out_channels=True),
        "out of range",
    ),
    "list for a number": (
        lambda s: s["modules"]["conv1"]["attributes"].update(out_channels=[8]),
        r"out_channels = \[8\] cannot take the place",
    ),
    "attribute of another layer": (
        lambda s: s["modules"]["conv1"]["attributes"].update(num_heads=3),
        "num_heads = 3 cannot take the place of None",
    ),
    "width that contradicts the weight": (
        lambda s: s["modules"]["conv1"]["attributes"].update(out_channels=3),
        r"weight of Conv2d 'conv1' has shape \(\d+, 3, 7, 7\); its attributes say \(3, 3, 7, 7\)",
    ),
    "groups that do not divide": (
        lambda s: s["modules"]["conv1"]["attributes"].update(groups=2),
        "Conv2d 'conv1' has",
    ),
    "width of a norm": (
        lambda s: s["modules"]["bn1"]["attributes"].update(num_features=3),
        "of BatchNorm2d 'bn1' has shape",
    ),
    "shape": (lambda s: s["modules"]["conv1"]["shapes"].update(weight=[1, 3, 7, 7]), "expected"),
    "negative shape": (lambda s: s["modules"]["conv1"]["shapes"].update(weight=[-1, 3]), "no list of sizes"),
    "entry without shapes": (lambda s: s["modules"]["conv1"].pop("shapes"), "expected exactly class"),
    "entry that is none": (lambda s: s["modules"].update(conv1=3), "expected exactly class"),
    "another class": (
        lambda s: s["modules"]["conv1"].update({"class": "Linear"}),
        "is a Conv2d; .* expects Linear",
    ),
    "unknown module": (
        lambda s: s["modules"].update(conv9=s["modules"]["conv1"]),
        "module 'conv9' .* is not in the dense model",
    ),
    "module no longer listed": (lambda s: s["modules"].pop("conv1"), "tensor 'conv1.weight' has shape"),
    "frozen stranger": (
        lambda s: s["frozen"].append("conv9.weight"),
        "'conv9.weight' .* is not in the dense",
    ),
    "frozen number": (lambda s: s["frozen"].append(3), "something that is no name"),
    "tie to a stranger": (lambda s: s["tied"].update({"conv9.weight": "conv8.weight"}), "contradicts"),
    "tie of a stored tensor": (lambda s: s["tied"].update({"fc.bias": "fc.weight"}), "contradicts"),
    "buffer that is not there": (
        lambda s: s["buffers"].update(a={"shape": [1], "dtype": "float32", "stored": False}),
        "'a' .* is not in the dense model",
    ),
    "buffer below a stranger": (
        lambda s: s["buffers"].update({"a.b": {"shape": [1], "dtype": "float32", "stored": False}}),
        "'a.b' .* is not in the dense model",
    ),
    "buffer with a strange dtype": (
        lambda s: s["buffers"].update(a={"shape": [1], "dtype": "load", "stored": False}),
        "is no shape and dtype",
    ),
    "input shape": (lambda s: s.update(input_shape=[3, "x"]), "input_shape"),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_tampered_structure_is_refused(case: str, folder: Path) -> None:
    edit, message = STRUCTURES[case]
    edit_structure(folder, edit)
    refused(folder, message)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format_version": NaN}', "\0"])
def test_structure_that_is_no_json_object_is_refused(content: str, folder: Path) -> None:
    (folder / "pruned_structure.json").write_text(content)
    refused(folder, "not valid JSON|expected an object")


WEIGHTS: dict[str, tuple[Edit, str]] = {
    "missing tensor": (lambda t: t.pop("fc.bias"), "missing: 'fc.bias'"),
    "extra tensor": (lambda t: t.update(extra=torch.zeros(1)), "unexpected: 'extra'"),
    "another shape": (
        lambda t: t.update({"fc.bias": torch.zeros(3)}),
        r"'fc.bias' has shape \[3\]; expected \[10\]",
    ),
    "another rank": (lambda t: t.update({"fc.bias": torch.zeros(10, 1)}), "'fc.bias' has shape"),
    "integers": (lambda t: t.update({"fc.bias": torch.zeros(10, dtype=torch.int64)}), "dtype I64"),
    "empty": (lambda t: t.clear(), "more than a thousand times as large as the pruned network"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_tampered_weights_are_refused(case: str, folder: Path) -> None:
    edit, message = WEIGHTS[case]
    edit_weights(folder, edit)
    refused(folder, message)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights_are_refused(kept: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(folder, "truncated or no safetensors file")


def test_pickle_in_the_place_of_weights_is_refused(folder: Path) -> None:
    torch.save({"fc.bias": torch.zeros(10)}, folder / "model.safetensors")
    refused(folder, "truncated or no safetensors file")


@pytest.mark.parametrize("name", ["model.safetensors", "pruned_structure.json"])
def test_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    refused(folder, f"{name} is missing")


@pytest.mark.parametrize("name", ["model.safetensors", "pruned_structure.json"])
def test_link_out_of_the_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, "is a link that leaves the folder")
    (folder / name).unlink()
    (folder / name).symlink_to(Path("..") / name)
    refused(folder, "is a link that leaves the folder")


def test_link_to_a_folder_and_inside_it_is_fine(folder: Path, tmp_path: Path) -> None:
    os.rename(folder / "model.safetensors", folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "latest").symlink_to(folder)
    assert isinstance(load_pruned(tmp_path / "latest"), nn.Module)


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no artifact at")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "there is no artifact at")


def test_failed_load_leaves_a_given_model_as_it_was(folder: Path) -> None:
    edit_weights(folder, WEIGHTS["another shape"][0])
    dense = timm.create_model("resnet18", num_classes=10)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    with pytest.raises(ArtifactError):
        load_pruned(folder, model=dense)
    assert dense.conv1.out_channels == 64
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_failed_load_leaves_frozen_parameters_frozen(tmp_path: Path) -> None:
    save_pruned(pruned_toy()[0], tmp_path / "a")
    edit_structure(tmp_path / "a", lambda s: s["buffers"]["shift"].update(dtype="bits8"))
    dense = Toy().requires_grad_(False)
    with pytest.raises(ArtifactError, match="buffer 'shift' cannot become bits8"):
        load_pruned(tmp_path / "a", dense)
    assert dense.stem.out_channels == 16
    assert not any(parameter.requires_grad for parameter in dense.parameters())


def test_dense_network_out_of_all_proportion_is_not_built(tmp_path: Path) -> None:
    def describe_a_giant(structure: dict[str, Any]) -> None:
        arguments = {"embed_dim": 3072, "depth": 1, "num_heads": 1, "weight_init": "bogus"}
        structure.update(architecture="vit_tiny_patch16_224", model_args=arguments)

    save_pruned(create_model("digits_cnn"), tmp_path / "a")
    edit_structure(tmp_path / "a", describe_a_giant)
    refused(tmp_path / "a", r"more than a thousand times .* call load_pruned\(folder, model=dense\)")


def test_loaded_weights_do_not_depend_on_the_file(folder: Path) -> None:
    loaded = load_pruned(folder)
    before = loaded.conv1.weight.clone()
    path = folder / "model.safetensors"
    with path.open("r+b") as file:  # in place, as a copy over it would
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(loaded.conv1.weight, before)


# --- whatever is changed in the files: an ArtifactError, or a model that runs ---

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module", params=["custom", "timm"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact with a frozen parameter."""
    custom = request.param == "custom"
    model, _ = pruned_toy() if custom else pruned_timm("test_resnet", size=32)
    next(model.parameters()).requires_grad_(False)
    return save_pruned(model, tmp_path_factory.mktemp("small") / request.param)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON values that can be replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]


def loads_and_runs_or_is_refused(folder: Path) -> None:
    try:
        model = load_pruned(folder, model=Toy() if folder.name == "custom" else None)
    except ArtifactError:
        return
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5 if folder.name == "custom" else 10)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_of_the_structure_is_harmless(small: Path, data: st.DataObject) -> None:
    path = small / "pruned_structure.json"
    original = path.read_text()
    structure = json.loads(original)
    *parents, last = data.draw(st.sampled_from(places(structure)))
    target = structure
    for key in parents:
        target = target[key]
    target[last] = data.draw(VALUES)
    try:
        path.write_text(json.dumps(structure))
        loads_and_runs_or_is_refused(small)
    finally:
        path.write_text(original)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_of_the_header_is_harmless(small: Path, data: st.DataObject) -> None:
    path = small / "model.safetensors"
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    place = data.draw(st.integers(0, header - 1))
    changed = bytearray(original)
    changed[place] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(changed)
        loads_and_runs_or_is_refused(small)
    finally:
        path.write_bytes(original)
