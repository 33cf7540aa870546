"""From masks to smaller networks: what removal computes is what the extended mask computes."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner, LevelPruner
from nni.compression.speedup import ModelSpeedup

from dscore_plugin.errors import ModelError, PlanError
from dscore_plugin.integrations.nni import CriterionPruner, plan_from_masks, speedup
from dscore_plugin.integrations.torch_pruning.counting import count
from dscore_plugin.masking import masked
from dscore_plugin.registry import list_criteria
from tests.architectures import IMAGE, LARGE, SMALL, Architecture, chain, randomised
from tests.integrations.nni.helpers import CONVS, INNER, INPUTS, residual

NAMES = ("cifar_resnet56", "cifar_vgg16_bn", "resnet18", "mobilenetv2_100", "vgg11_bn", "densenet121")
SMALLER = ("residual", "mixed", "group_norm", "layer_norm", "flattened", "squeezed", "bn_free", "concatenated_twice",
           "depthwise_multiplier", "shared", "conv_3d", "convnext_block")  # fmt: skip
X = torch.randn(3, *IMAGE, generator=torch.Generator().manual_seed(1))


def config(model: nn.Module, ratio: float = 0.4) -> list[dict[str, Any]]:
    kinds = ("Conv1d", "Conv2d", "Conv3d", "Linear")
    last = [name for name, module in model.named_modules() if type(module).__name__ in kinds][-1]
    criterion = (
        "l1" if sum(p.numel() for p in model.parameters()) > 1e8 else "d_score"
    )  # which takes 10 s there
    return [
        {"op_types": list(kinds), "sparse_ratio": ratio, "exclude_op_names": [last], "criterion": criterion}
    ]


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*NAMES, *SMALLER])
def test_removal_computes_what_the_extended_masks_compute(name: str) -> None:
    architecture: Architecture = (LARGE | SMALL)[name]
    model = architecture.randomised()
    x = torch.randn(2, *architecture.shape, generator=torch.Generator().manual_seed(1))
    dense, macs = outputs(model, x), count(model, architecture.inputs)[0]
    pruner = CriterionPruner(model, config(model), example_inputs=architecture.inputs)
    _, masks = pruner.compress()
    under_mask = outputs(model, x)
    pruner.unwrap_model()
    assert torch.equal(outputs(model, x), dense)
    plan = plan_from_masks(model, architecture.inputs, masks) if name in SMALL else None
    lines: list[str] = []
    speedup(model, architecture.inputs, masks, say=lines.append)
    removed = outputs(model, x)
    assert (removed - under_mask).abs().max() <= 1e-4 * removed.abs().max()
    assert not torch.allclose(removed, dense, rtol=1e-2)
    assert count(model, architecture.inputs)[0] < macs
    if plan is not None:
        assert count(model, architecture.inputs) == (plan.macs[1], plan.params[1])
    assert not [line for line in lines if "not silent" in line or "some of the layers" in line]


@pytest.mark.parametrize("name", ["residual", "group_norm", "layer_norm"])
def test_a_layer_that_is_masked_whole_computes_the_same_before_and_after(name: str) -> None:
    architecture = SMALL[name]
    model = architecture.randomised()
    x = torch.randn(2, *architecture.shape, generator=torch.Generator().manual_seed(1))
    pruner = CriterionPruner(model, config(model, 1.0), example_inputs=architecture.inputs)
    _, masks = pruner.compress()
    under_mask = outputs(model, x)
    pruner.unwrap_model()
    lines: list[str] = []
    speedup(model, architecture.inputs, masks, say=lines.append)
    assert torch.isfinite(under_mask).all()
    assert torch.equal(outputs(model, x), under_mask)
    assert lines
    assert all("are masked and stay, zeroed; a layer needs one at least" in line for line in lines)


def test_nnis_own_speedup_agrees_where_it_works() -> None:
    ours, theirs = residual(), residual()
    pruner = CriterionPruner(ours, CONVS, example_inputs=INPUTS)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    plain = {layer: {"weight": of["weight"]} for layer, of in masks.items()}
    graph = torch.fx.symbolic_trace(theirs)
    logger = logging.getLogger("quiet")
    logger.setLevel(logging.ERROR)
    ModelSpeedup(theirs, INPUTS[0], copy.deepcopy(plain), graph_module=graph, logger=logger).speedup_model()
    speedup(ours, INPUTS, plain)
    one, other = outputs(ours, X), outputs(theirs, X)
    assert ours.conv1.out_channels == theirs.conv1.out_channels == 6
    assert ours.stem.out_channels == theirs.stem.out_channels == 4
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_foreign_masks_are_removed_and_what_was_not_silent_is_named() -> None:
    model = residual()
    pruner = L1NormPruner(model, INNER)
    _, masks = pruner.compress()
    under_mask = outputs(model, X)
    pruner.unwrap_model()
    extended = copy.deepcopy(model)
    group = next(g for g in _groups(extended) if g.name == "conv1")
    gone = (masks["conv1"]["weight"].flatten(1).sum(1) == 0).nonzero().flatten().tolist()
    with masked(extended, [(group, gone)]):
        expected = outputs(extended, X)
    lines: list[str] = []
    speedup(model, INPUTS, masks, say=lines.append)
    assert len(lines) == 1
    assert (
        "the masked channels of 'conv1' were not silent: they change what 'conv2' computes by up to"
        in lines[0]
    )
    assert torch.allclose(outputs(model, X), expected, atol=1e-5)
    assert not torch.allclose(under_mask, expected, atol=1e-2)


def _groups(model: nn.Module) -> Any:
    from dscore_plugin.integrations.torch_pruning.graph import PruningGraph

    return PruningGraph(model, INPUTS).prunable


def test_silent_foreign_masks_are_not_complained_about() -> None:
    architecture = SMALL["bn_free"]  # NNI masks the bias too, and nothing else could speak
    model = architecture.randomised()
    pruner = L1NormPruner(model, [{"op_names": ["body.0"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    speedup(model, architecture.inputs, masks, say=pytest.fail)
    assert model.body[0].out_channels == 4


def test_what_stays_is_zeroed_and_explained() -> None:
    model = residual()
    half = torch.ones(8, 1, 1, 1)
    half[:3] = 0
    masks = {
        "conv2": {"weight": half},  # the stem, which adds to it, keeps them
        "fc": {"weight": torch.tensor([1.0, 0, 1, 1]).view(4, 1)},
        "conv1": {"weight": torch.zeros(12, 1, 1, 1)},
        "bn2": {"weight": half.flatten()},
    }
    lines: list[str] = []
    before = [p.shape for p in model.parameters()]
    speedup(model, INPUTS, masks, say=lines.append)
    assert [p.shape for p in model.parameters()] == before
    assert not model.conv2.weight[:3].any()
    assert not model.fc.weight[1].any()
    said = "\n".join(lines)
    assert (
        "3 of the 8 channels of 'conv2' are masked in some of the layers that share them (conv2, stem)"
        in said
    )
    assert "all 12 channels of 'conv1' are masked and stay, zeroed" in said
    assert "1 masked channels of 'fc' stay, zeroed: its channels are an output of the network" in said
    assert "the mask of bn2.weight is not carried out" in said
    assert len(lines) == 4


def test_single_weights_stay_and_are_explained() -> None:
    model = residual()
    pruner = LevelPruner(model, INNER)
    _, masks = pruner.compress()
    under_mask = outputs(model, X)
    pruner.unwrap_model()
    lines: list[str] = []
    speedup(model, INPUTS, masks, say=lines.append)
    assert any("the mask of 'conv1' takes single weights" in line for line in lines)
    assert torch.allclose(outputs(model, X), under_mask, atol=1e-6)


def test_inputs_that_nothing_reads_leave() -> None:
    model = residual()
    pruner = CriterionPruner(
        model,
        [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": "in_channel"}],
        example_inputs=INPUTS,
    )
    _, masks = pruner.compress()
    under_mask = outputs(model, X)
    pruner.unwrap_model()
    speedup(model, INPUTS, masks, say=pytest.fail)
    assert model.conv1.out_channels == model.conv2.in_channels == 6
    assert torch.allclose(outputs(model, X), under_mask, atol=1e-5)


def test_foreign_masks_of_inputs_are_silent_unless_a_norm_averages_over_them() -> None:
    for norm, expected in ((nn.BatchNorm2d(8), []), (nn.GroupNorm(1, 8), ["'body.1' averages over them"])):
        model = randomised(chain(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 6, 3), width=6)()).eval()
        entry = {"op_names": ["body.3"], "sparse_ratio": 0.5, "granularity": "in_channel"}
        pruner = L1NormPruner(model, [entry])
        _, masks = pruner.compress()
        under_mask = outputs(model, X)
        pruner.unwrap_model()
        lines: list[str] = []
        speedup(model, INPUTS, masks, say=lines.append)
        assert model.body[0].out_channels == 4
        assert torch.allclose(outputs(model, X), under_mask, atol=1e-5) == (not expected)
        assert len(lines) == len(expected)
        assert all(part in line for part, line in zip(expected, lines, strict=True))


def test_masks_from_a_file(tmp_path: Path) -> None:
    model, other = residual(), residual()
    _, masks = L1NormPruner(other, INNER).compress()
    torch.save(dict(masks), tmp_path / "masks.pth")
    speedup(model, INPUTS[0], tmp_path / "masks.pth", say=lambda _: None)
    assert model.conv1.out_channels == 6
    (tmp_path / "broken.pth").write_bytes(b"no masks")
    with pytest.raises(PlanError, match="no masks can be read from"):
        speedup(model, INPUTS, tmp_path / "broken.pth")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"conv9": {"weight": torch.zeros(8, 1, 1, 1)}}, "another model: Residual has no layer 'conv9'"),
        (
            {"conv1": {"weight": torch.zeros(8, 1, 1, 1)}},
            r"conv1.weight is \(12, 8, 3, 3\), its mask \(8, 1, 1, 1\)",
        ),
        ({"conv1": torch.zeros(12)}, "expected masks as"),
    ],
)
def test_masks_of_another_model_are_refused(masks: Any, message: str) -> None:
    model = residual()
    before = copy.deepcopy(model.state_dict())
    for call in (speedup, plan_from_masks):
        with pytest.raises(PlanError, match=message):
            call(model, INPUTS, masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_wrapped_model_is_refused() -> None:
    model = residual()
    _, masks = CriterionPruner(model, INNER, example_inputs=INPUTS).compress()
    with pytest.raises(ModelError, match=r"wears a wrapper of NNI's; call unwrap_model\(\)"):
        speedup(model, INPUTS, masks)


class Stubborn(nn.Module):
    """Runs at full width only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), width=6)()

    def forward(self, x: Tensor) -> Tensor:
        if self.body.body[0].out_channels != 8:
            raise RuntimeError("eight channels, or none")
        return self.body(x)  # type: ignore[no-any-return]


def test_a_removal_that_fails_leaves_the_weights_unmasked() -> None:
    model = Stubborn().eval()
    before = copy.deepcopy(model.state_dict())
    mask = torch.ones(8, 1, 1, 1)
    mask[2] = 0
    with pytest.raises(ModelError, match="eight channels, or none"):
        speedup(model, INPUTS, {"body.body.0": {"weight": mask}}, say=lambda _: None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


KERNELS = [info.name for info in list_criteria() if info.kernel_scores]


@pytest.mark.parametrize("name", KERNELS)
def test_single_kernels_leave(name: str) -> None:
    model = residual()
    entry = {
        "criterion": name,
        "op_names": ["conv1", "conv2"],
        "sparse_ratio": 0.4,
        "granularity": [1, 1, -1, -1],
    }
    pruner = CriterionPruner(model, [entry], example_inputs=INPUTS)
    _, masks = pruner.compress()
    assert int((masks["conv1"]["weight"].sum((2, 3)) == 0).sum()) == int(0.4 * 96)
    under_mask = outputs(model, X)
    pruner.unwrap_model()
    size = sum(p.numel() for p in model.parameters())
    lines: list[str] = []
    speedup(model, INPUTS, masks, say=lines.append)
    assert all("masked in some of the layers" in line for line in lines)  # of filters without kernels
    assert torch.allclose(outputs(model, X), under_mask, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < size
