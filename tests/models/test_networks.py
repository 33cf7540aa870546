"""The package's own networks: their sizes, their names, their heads, their two forms of shortcut."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch_pruning as tp
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from dscore_plugin.errors import ModelError
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.models.cifar_resnet import BasicBlock, CifarResNet, padding_weight

PARAMETERS = {
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_vgg16_bn": 14_724_042,
    "cifar_vgg19_bn": 20_035_018,
    "cifar_vgg16_dscore": 18_927_562,
    "digits_cnn": 61_050,
}
SMALL = ["cifar_resnet20", "cifar_vgg16_bn", "cifar_vgg16_dscore", "digits_cnn"]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give the norms weights, biases and running statistics that hide nothing behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def images_for(model: nn.Module, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *model.pretrained_cfg["input_size"], generator=generator)


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_networks_have_the_published_number_of_parameters(name: str, expected: int) -> None:
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_macs_are_those_of_the_papers() -> None:
    x = torch.randn(1, 3, 32, 32)
    macs = {
        name: tp.utils.count_ops_and_params(create_model(name), x)[0] / 1e6
        for name in ("cifar_resnet20", "cifar_resnet56", "cifar_vgg16_bn")
    }
    assert macs["cifar_resnet20"] == pytest.approx(40.9, abs=0.05)
    assert macs["cifar_resnet56"] == pytest.approx(126.6, abs=0.05)
    assert macs["cifar_vgg16_bn"] == pytest.approx(313, rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_head_follows_timm(name: str) -> None:
    model = randomise(create_model(name, num_classes=7))
    x = images_for(model)
    features = model.forward_features(x)
    embedding = model.forward_head(features, pre_logits=True)
    assert embedding.shape == (4, model.num_features)
    assert model(x).shape == (4, 7)
    torch.testing.assert_close(model.get_classifier()(embedding), model(x))
    named = dict(model.named_modules())[model.pretrained_cfg["classifier"]]
    assert named is model.get_classifier()
    assert model.num_classes == 7
    assert dict(model.named_modules())[model.pretrained_cfg["first_conv"]].in_channels == x.shape[1]

    model.reset_classifier(3)
    assert model(x).shape == (4, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), embedding)
    model.reset_classifier(5, global_pool="avg")
    assert model(x).shape == (4, 5)


@pytest.mark.parametrize("name", SMALL)
def test_without_classes_the_embedding_comes_out(name: str) -> None:
    model = create_model(name, num_classes=0).eval()
    assert model(images_for(model)).shape == (4, model.num_features)


@pytest.mark.parametrize("name", SMALL)
def test_other_numbers_of_channels_and_other_image_sizes_run(name: str) -> None:
    model = create_model(name, in_chans=5).eval()
    assert model(torch.randn(2, 5, 48, 48)).shape == (2, 10)


def test_reset_classifier_fits_a_pruned_network() -> None:
    model = create_model("cifar_resnet20", shortcut="conv").eval()
    x = images_for(model)
    pruner = tp.BasePruner(
        model,
        (x,),
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.linear],
    )
    pruner.step()
    assert model.linear.in_features == 32
    model.reset_classifier(4)
    assert model.num_features == 32
    assert model(x).shape == (4, 4)


def test_dropout_in_front_of_the_classifier_acts_in_training_only() -> None:
    model = create_model("cifar_resnet20", drop_rate=0.5)
    x = images_for(model)
    features = model.forward_features(x)
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    model.eval()
    torch.testing.assert_close(model.forward_head(features), model.forward_head(features), rtol=0, atol=0)


@pytest.mark.parametrize("pooling", ["max", "", "catavgmax"])
def test_other_poolings_are_refused(pooling: str) -> None:
    with pytest.raises(ModelError, match="expected 'avg'"):
        create_model("digits_cnn").reset_classifier(3, global_pool=pooling)


@pytest.mark.parametrize(("name", "convolutions"), [("cifar_vgg16_bn", 13), ("cifar_vgg19_bn", 16)])
def test_vgg_is_numbered_as_in_torchvision(name: str, convolutions: int) -> None:
    import torchvision

    ours = create_model(name).features
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name.removeprefix("cifar_"))().features
    assert [type(m) for m in ours] == [type(m) for m in theirs]
    kernels = [m for m in ours if isinstance(m, nn.Conv2d)]
    assert len(kernels) == convolutions
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, nn.Conv2d):
            assert mine.weight.shape == other.weight.shape
            assert mine.bias is None


def test_dscores_vgg_has_its_hidden_layers_and_dropouts() -> None:
    model = create_model("cifar_vgg16_dscore")
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(512, 4096), (4096, 512), (512, 10)]
    assert [m.p for m in model.features if isinstance(m, nn.Dropout)] == [0.3, *[0.4] * 7]
    assert [m.p for m in model.hidden if isinstance(m, nn.Dropout)] == [0.5] * 3
    assert sum(isinstance(m, nn.BatchNorm1d) for m in model.modules()) == 2


def literal_option_a(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Option A, written out: every second pixel, zeros half in front and half behind."""
    out = torch.zeros(x.shape[0], channels, -(-x.shape[2] // 2), -(-x.shape[3] // 2))
    front = (channels - x.shape[1]) // 2
    for channel in range(x.shape[1]):
        out[:, front + channel] = x[:, channel, 0::2, 0::2]
    return out


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
@pytest.mark.parametrize(("in_channels", "channels"), [(16, 32), (5, 8), (3, 3)])
def test_shortcut_is_option_a(shortcut: str, in_channels: int, channels: int) -> None:
    block = BasicBlock(in_channels, channels, 2, shortcut)
    block.init_shortcut()
    nn.init.zeros_(block.bn2.weight)  # the residual branch falls silent
    x = torch.rand(2, in_channels, 7, 8)
    torch.testing.assert_close(block.eval()(x), literal_option_a(x, channels), rtol=0, atol=0)


def test_padding_weight_is_a_shifted_identity() -> None:
    weight = padding_weight(2, 6)
    expected = torch.zeros(6, 2, 1, 1)
    expected[2, 0] = expected[3, 1] = 1
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet32"])
def test_shortcut_convolution_equals_padding(name: str) -> None:
    padded = randomise(create_model(name))
    convolved = create_model(name, shortcut="conv")
    convolved.load_state_dict(padded.state_dict(), strict=True)
    x = images_for(padded)
    expected = padded(x)
    assert (convolved.eval()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_shortcut_weights_are_filled_in_again_over_rubbish_and_stay_fixed() -> None:
    padded = create_model("cifar_resnet20")
    convolved = copy.deepcopy(create_model("cifar_resnet20", shortcut="conv"))
    for block in (convolved.layer2[0], convolved.layer3[0]):
        nn.init.normal_(block.shortcut.weight)
    convolved.load_state_dict(padded.state_dict(), strict=True)
    torch.testing.assert_close(convolved.layer2[0].shortcut.weight.data, padding_weight(16, 32))
    torch.testing.assert_close(convolved.layer3[0].shortcut.weight.data, padding_weight(32, 64))
    convolved(images_for(padded)).sum().backward()
    assert convolved.layer2[0].shortcut.weight.grad is None
    assert convolved.layer1[0].shortcut is None


def test_shortcut_weights_of_a_pruned_trunk_are_never_guessed() -> None:
    model = create_model("cifar_resnet20", shortcut="conv")
    block = model.layer2[0]
    block.shortcut.weight = nn.Parameter(block.shortcut.weight.data[:20])
    state = model.state_dict()
    model.load_state_dict(state, strict=True)
    del state["layer2.0.shortcut.weight"]
    with pytest.raises(RuntimeError, match="layer2.0.shortcut.weight"):
        model.load_state_dict(state, strict=True)


def test_a_state_dict_with_shortcuts_loads_its_own_values() -> None:
    model = create_model("cifar_resnet20", shortcut="conv")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["layer2.0.shortcut.weight"].fill_(0.25)
    model.load_state_dict(state, strict=True)
    assert (model.layer2[0].shortcut.weight == 0.25).all()


def test_meta_device_building_and_assigning() -> None:
    with torch.device("meta"):
        model = create_model("cifar_resnet20", shortcut="conv")
    source = randomise(create_model("cifar_resnet20"))
    model.load_state_dict(source.state_dict(), strict=True, assign=True)
    x = images_for(source)
    expected = source(x)
    assert (model.eval()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_symbolic_tracing_gives_the_same_network(shortcut: str) -> None:
    model = randomise(create_model("cifar_resnet20", shortcut=shortcut))
    x = images_for(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_padding_is_seen_as_a_pad_of_the_channels() -> None:
    padded: list[tuple[int, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            if function is functional.pad:
                padded.append(tuple(args[1]))
            return function(*args, **(kwargs or {}))

    model = create_model("cifar_resnet20").eval()
    with Watch():
        model(images_for(model))
    assert padded == [(0, 0, 0, 0, 8, 8), (0, 0, 0, 0, 16, 16)]


def test_padding_follows_the_tensors_after_pruning_inside_the_blocks() -> None:
    model = create_model("cifar_resnet20").eval()
    block = model.layer2[0]
    block.conv1.weight = nn.Parameter(block.conv1.weight.data[:7])
    block.bn1 = nn.BatchNorm2d(7).eval()
    block.conv2.weight = nn.Parameter(block.conv2.weight.data[:, :7])
    assert model(images_for(model)).shape == (4, 10)


def test_dependency_graph_can_prune_the_trunk_of_the_convolution_form() -> None:
    model = randomise(create_model("cifar_resnet20", shortcut="conv"))
    x = images_for(model)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=(x,))
    group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[0, 3])
    names = {dep.target.name.split(" ")[0] for dep, _ in group}
    assert {"layer1.2.conv2", "layer2.0.shortcut"} <= names
    group.prune()
    assert model(x).shape == (4, 10)
    assert model.layer2[0].shortcut.weight.shape == (32, 14, 1, 1)


@pytest.mark.parametrize("depth", [2, 9, 21, -4])
def test_depths_that_are_no_6n_plus_2_are_refused(depth: int) -> None:
    with pytest.raises(ModelError, match=r"6n \+ 2"):
        CifarResNet(depth)


@pytest.mark.cifar10
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_trained_weights_load_strictly_in_both_forms(shared: Path, name: str, shortcut: str) -> None:
    path = shared / "weights" / "cifar10" / f"{name}.safetensors"
    model = create_model(f"cifar_{name}", shortcut=shortcut)
    load_weights(model, path)
    for key, value in load_file(path).items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.cifar10
def test_trained_networks_of_both_forms_agree(shared: Path) -> None:
    outputs = []
    for shortcut in ("pad", "conv"):
        model = create_model("cifar_resnet56", shortcut=shortcut).eval()
        load_weights(model, shared / "weights" / "cifar10" / "resnet56.safetensors")
        with torch.inference_mode():
            outputs.append(model(images_for(model, count=16)))
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()
