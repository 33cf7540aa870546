"""Building by name and loading weights: what is refused, and in which words."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dscore_plugin.errors import ModelError
from dscore_plugin.models import create_model, load_weights


def test_timms_networks_can_be_built_too() -> None:
    model = create_model("resnet18", num_classes=3, in_chans=1)
    assert model.fc.out_features == 3
    assert model.conv1.in_channels == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar_resnet57", "did you mean 'cifar_resnet56'"),
        ("resnet81", "did you mean"),
        ("hf-hub:timm/resnet18.a1_in1k", "model 'hf-hub:timm/resnet18.a1_in1k' is unknown"),
        ("local-dir:/tmp/model", "is unknown"),
        ("timm:resnet18", "is unknown"),
        ("./resnet18", "is unknown"),
        ("", "model '' is unknown"),
        ("resnet18.no_such_tag", "no_such_tag"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ModelError, match="cannot be built|is unknown") as caught:
        create_model(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shortcut": "none"}, "expected 'pad' or 'conv'"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"depth": 20}, "depth"),
        ({"pretrained": True}, "No pretrained weights"),
        ({"in_chans": -3}, "cannot be built"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model("cifar_resnet20", **arguments)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_arguments_that_name_files_are_refused(argument: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=f"'{argument}' is not accepted"):
        create_model("cifar_resnet20", **{argument: str(tmp_path / "weights.pth")})
    assert not (tmp_path / "exploded").exists()


def test_saved_weights_come_back(tmp_path: Path) -> None:
    source = create_model("digits_cnn")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = create_model("digits_cnn")
    load_weights(target, tmp_path / "w.safetensors")
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_half_precision_weights_load_into_a_float32_network(tmp_path: Path) -> None:
    half = {
        k: v.half() if v.is_floating_point() else v
        for k, v in create_model("digits_cnn").state_dict().items()
    }
    save_file(half, tmp_path / "w.safetensors")
    model = create_model("digits_cnn")
    load_weights(model, tmp_path / "w.safetensors")
    assert model.classifier.weight.dtype == torch.float32
    assert torch.equal(model.classifier.weight, half["classifier.weight"].float())


def _missing(path: Path) -> None:
    path.unlink()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pickled(path: Path) -> None:
    torch.save(create_model("digits_cnn").state_dict(), path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "are missing; expected a .safetensors file"),
        (_directory, "are missing; expected a .safetensors file"),
        (_truncated, "are corrupt or no safetensors file"),
        (_cut_in_the_header, "are corrupt or no safetensors file"),
        (_empty, "are corrupt or no safetensors file"),
        (_pickled, "pickled checkpoints are not loaded"),
    ],
)
def test_files_that_cannot_be_read_are_refused(damage, message: str, tmp_path: Path) -> None:  # noqa: ANN001
    path = tmp_path / "w.safetensors"
    save_file(create_model("digits_cnn").state_dict(), path)
    damage(path)
    with pytest.raises(ModelError, match=message) as caught:
        load_weights(create_model("digits_cnn"), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("cifar_resnet32", "layer1.3.bn1.bias is unexpected, .* and .* more"),
        ("digits_cnn", "bn1.bias is missing"),
    ],
)
def test_weights_of_another_architecture_leave_the_network_as_it_was(
    other: str, message: str, tmp_path: Path
) -> None:
    save_file(create_model(other).state_dict(), tmp_path / "w.safetensors")
    model = create_model("cifar_resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    save_file(create_model("cifar_resnet20", num_classes=100).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"linear.bias is \(100,\), expected \(10,\)"):
        load_weights(create_model("cifar_resnet20"), tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    state = create_model("digits_cnn").state_dict()
    state["features.3.weight"][0] = value
    save_file(state, tmp_path / "w.safetensors")
    model = create_model("digits_cnn")
    with pytest.raises(ModelError, match=r"NaN or infinity in features\.3\.weight"):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
