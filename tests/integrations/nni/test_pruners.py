"""The criteria as NNI pruners: scores, ratios, schedules, masks that reach the consumers."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from nni.compression.pruning import AGPPruner, L1NormPruner, LinearPruner

from dscore_plugin.errors import CriterionError, DScoreError, ModelError
from dscore_plugin.integrations import nni as face
from dscore_plugin.integrations.nni import CriterionPruner
from dscore_plugin.masking import masked
from dscore_plugin.registry import CriterionInfo, get_criterion, list_criteria
from tests.architectures import IMAGE, SMALL, chain
from tests.integrations.nni.helpers import (
    CONVS,
    INNER,
    INPUTS,
    SCORING,
    evaluator,
    reference,
    residual,
    taken,
)  # fmt: skip

X = torch.randn(3, *IMAGE, generator=torch.Generator().manual_seed(1))
NAMES = [info.name for info in SCORING]


def make(
    model: nn.Module, info: CriterionInfo, config: list[dict[str, Any]], **options: Any
) -> CriterionPruner:
    entries = [{"criterion": info.name, "granularity": "out_channel", **entry} for entry in config]
    given = evaluator(model, mode=False) if info.needs_data else None
    return CriterionPruner(model, entries, given, example_inputs=INPUTS, training_steps=4, **options)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_torch_pruning_face_and_the_lowest_are_masked(name: str) -> None:
    info, model = get_criterion(name), residual()
    expected = reference(residual(), info, ["stem", "conv1", "conv2"])
    state = copy.deepcopy(model.state_dict())
    pruner = make(model, info, CONVS)
    metrics: dict[str, Any] = {}
    score = pruner._calculate_metrics
    pruner._calculate_metrics = lambda data: metrics.setdefault("seen", score(data))  # type: ignore[method-assign]
    _, masks = pruner.compress()
    for layer, scores in expected.items():
        metric = metrics["seen"][layer]["weight"]
        assert metric.shape == (len(scores), 1, 1, 1)
        assert torch.allclose(metric.flatten(), scores, rtol=1e-4, atol=0)
        count = len(scores) // 2
        assert taken(masks[layer]["weight"]) == count
        lowest = torch.argsort(metric.flatten(), stable=True)[:count]
        assert not masks[layer]["weight"][lowest].any()
    assert set(expected) == set(masks) == {"stem", "conv1", "conv2"}
    pruner.unwrap_model()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sorted(model.state_dict()) == sorted(state)


@pytest.mark.parametrize("schedule", [AGPPruner, LinearPruner])
@pytest.mark.parametrize("name", NAMES)
def test_schedules_reach_the_ratio(name: str, schedule: type) -> None:
    info, model = get_criterion(name), residual()
    pruner = make(model, info, CONVS)
    seen: list[int] = []
    update = pruner.update_masks
    pruner.update_masks = lambda masks: (update(masks), seen.append(taken(masks["conv1"]["weight"])))  # type: ignore[method-assign]
    scheduled = schedule(pruner, interval_steps=2, total_times=3, evaluator=evaluator(model))
    _, masks = scheduled.compress(7, None)
    assert [taken(masks[layer]["weight"]) for layer in ("stem", "conv1", "conv2")] == [4, 6, 4]
    assert seen == {AGPPruner: [4, 5, 6], LinearPruner: [2, 4, 6]}[schedule]
    assert torch.equal(masks["stem"]["weight"][:, 0, 0, 0], masks["conv2"]["weight"][:, 0, 0, 0])
    under_mask = outputs(model)
    scheduled.unwrap_model()
    assert not model.conv1._forward_pre_hooks
    assert "forward" not in model.conv1.__dict__
    expected = removed_by_mask(model, masks)
    assert torch.allclose(under_mask, expected, atol=1e-5)


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(X)


def removed_by_mask(model: nn.Module, masks: dict[str, Any], inputs: tuple[Tensor, ...] = INPUTS) -> Tensor:
    """The outputs when the units that the masks take from every producer are silenced by masking.py."""
    from dscore_plugin.integrations.torch_pruning.graph import PruningGraph

    silenced = []
    for group in PruningGraph(model, inputs).prunable:
        root = masks.get(group.name, {}).get("weight")
        if root is not None:
            gone = (root.flatten(1).sum(dim=1) == 0).nonzero().flatten().tolist()
            silenced.append((group, group.units_of(gone)))
    with masked(model, silenced):
        return outputs(model)


def test_every_criterion_that_scores_has_a_class_and_the_others_name_the_command() -> None:
    assert {"DScorePruner", "DStepPruner", "DependencyAwarePruner", "L1Pruner"} <= set(dir(face))
    for info in list_criteria():
        name = "".join(part.capitalize() for part in info.name.split("_")) + "Pruner"
        if info.kind == "selector":
            assert not hasattr(face, name)
            with pytest.raises(CriterionError, match=f"dscore prune --criterion {info.name}"):
                CriterionPruner(residual(), [{"criterion": info.name, **INNER[0]}], example_inputs=INPUTS)
        else:
            assert getattr(face, name).criterion == info.name
    model = residual()
    _, masks = face.DStepPruner(model, INNER, example_inputs=INPUTS).compress()
    _, other = make(residual(), get_criterion("d_step"), INNER).compress()
    assert torch.equal(masks["conv1"]["weight"], other["conv1"]["weight"])


def test_example_inputs_are_found_where_none_are_given() -> None:
    _, masks = CriterionPruner(residual(), CONVS).compress()
    _, given = CriterionPruner(residual(), CONVS, example_inputs=INPUTS).compress()
    assert all(torch.equal(masks[layer]["weight"], given[layer]["weight"]) for layer in given)


def test_entries_may_have_criteria_and_options_of_their_own() -> None:
    model, alone = residual(), residual()
    config = [
        {"op_names": ["conv1"], "sparse_ratio": 0.5, "criterion": "l1"},
        {"op_names": ["conv2"], "sparse_ratio": 0.5, "criterion_options": {"group_reduction": "first"}},
    ]
    _, masks = CriterionPruner(model, config, example_inputs=INPUTS).compress()
    from dscore_plugin.criteria.d_score import d_score

    lowest = torch.argsort(d_score(alone.conv2.weight), stable=True)[:4]  # conv2 is its group's root
    assert (
        sorted(lowest.tolist())
        == (masks["conv2"]["weight"].flatten(1).sum(1) == 0).nonzero().flatten().tolist()
    )
    scores = reference(alone, get_criterion("l1"), ["conv1"])["conv1"]
    assert not masks["conv1"]["weight"][torch.argsort(scores)[:6]].any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sparse_ratio": 0.9, "max_sparse_ratio": 0.34}, [2, 4, 2]),
        ({"sparse_ratio": 0.1, "min_sparse_ratio": 0.5}, [4, 6, 4]),
        ({"sparse_threshold": 0.5}, None),
        ({"sparse_ratio": 0.5, "global_group_id": "all"}, None),
        ({"sparse_ratio": 0.9, "global_group_id": "all", "max_sparse_ratio": 0.5}, [4, 6, 4]),
        ({"sparse_ratio": 0.1, "global_group_id": "all", "min_sparse_ratio": 0.5}, [4, 6, 4]),
    ],
)
def test_nnis_own_settings_hold(settings: dict[str, Any], expected: list[int] | None) -> None:
    model = residual()
    _, masks = CriterionPruner(
        model, [{"op_types": ["Conv2d"], **settings}], example_inputs=INPUTS
    ).compress()
    counts = [taken(masks[layer]["weight"]) for layer in ("stem", "conv1", "conv2")]
    scores = reference(residual(), get_criterion("d_score"), ["stem", "conv1", "conv2"])
    if expected is None and "sparse_threshold" in settings:
        expected = [int((scores[layer] < 0.5).sum()) for layer in ("stem", "conv1", "conv2")]
    if expected is not None:
        assert counts == expected
        return
    masked_scores, kept_scores = (
        torch.cat([scores[layer][masks[layer]["weight"].flatten(1).any(1) == kept] for layer in scores])
        for kept in (False, True)
    )
    assert masked_scores.max() < kept_scores.min()
    weights = sum(int((mask["weight"] == 0).sum()) for mask in masks.values())
    assert (
        0.5 * 1944 - (27 + 108) < weights <= 0.5 * 1944
    )  # the next unit, of the residual sum, would be too much
    assert torch.equal(masks["stem"]["weight"][:, 0, 0, 0], masks["conv2"]["weight"][:, 0, 0, 0])


def test_excluded_layers_and_aligned_biases() -> None:
    model = SMALL["flattened"].randomised()
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "exclude_op_names_re": ["head"]}]
    _, masks = CriterionPruner(model, config, example_inputs=INPUTS).compress()
    assert set(masks) == {"conv1", "conv2", "hidden"}
    for of_layer in masks.values():
        assert torch.equal(of_layer["bias"], (of_layer["weight"].flatten(1).sum(1) > 0).float())


def test_old_entries_that_exclude() -> None:
    config = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv1"], "exclude": True}]
    _, masks = CriterionPruner(residual(), config, example_inputs=INPUTS).compress()
    assert {layer: taken(mask["weight"]) for layer, mask in masks.items()} == {"stem": 4, "conv2": 4}


def test_inputs_are_masked_by_the_scores_of_the_channels_they_read() -> None:
    model = residual()
    config = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    pruner = CriterionPruner(model, config, example_inputs=INPUTS)
    _, masks = pruner.compress()
    scores = reference(residual(), get_criterion("d_score"), ["conv1"])["conv1"]
    lowest = torch.argsort(scores, stable=True)[:6]
    assert not masks["conv2"]["weight"][:, lowest].any()
    assert int((masks["conv2"]["weight"].sum((0, 2, 3)) == 0).sum()) == 6
    assert int((masks["conv1"]["weight"].sum((0, 2, 3)) == 0).sum()) == 4


@pytest.mark.parametrize("ratio", [0.3, 0.4, 0.6])
def test_a_grouped_layer_loses_whole_units(ratio: float) -> None:
    model = SMALL["mixed"].randomised()
    config = [{"op_names": ["stem"], "sparse_ratio": ratio}]  # 16 channels: 4 units of 4, for 4 groups
    _, masks = CriterionPruner(model, config, example_inputs=INPUTS).compress()
    by_unit = masks["stem"]["weight"][:, 0, 0, 0].view(4, 4)
    assert torch.equal(by_unit, by_unit[:1].expand(4, 4))
    assert taken(masks["stem"]["weight"]) == 4 * int(ratio * 4)


@pytest.mark.parametrize("name", ["residual", "layer_norm", "group_norm"])
def test_training_under_the_mask_is_training_what_remains(name: str) -> None:
    architecture = SMALL[name]
    model = architecture.randomised()
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.4, "exclude_op_names": ["fc", "head"]}]
    pruner = CriterionPruner(model, config, example_inputs=architecture.inputs)
    _, masks = pruner.compress()
    x = torch.randn(3, *architecture.shape, generator=torch.Generator().manual_seed(1))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = model(x)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), trained)
    pruner.unwrap_model()
    with torch.no_grad():
        assert torch.equal(copied(x), trained)  # the copy has hooks of its own
        assert not torch.allclose(model(x), trained, atol=1e-3)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    face.speedup(model, architecture.inputs, masks, say=pytest.fail)
    with torch.no_grad():
        assert (model(x) - trained).abs().max() <= 1e-4 * trained.abs().max()


def test_a_loaded_state_and_new_masks_are_followed() -> None:
    model = residual()
    pruner = CriterionPruner(model, INNER, example_inputs=INPUTS)
    dense = outputs(model)
    _, masks = pruner.compress()
    under_mask = outputs(model)
    state = copy.deepcopy(model.state_dict())
    everything = {
        "conv1": {name: torch.ones_like(mask) for name, mask in masks["conv1"].items() if mask is not None}
    }
    pruner.update_masks(everything)
    assert torch.equal(outputs(model), dense)
    model.load_state_dict(state)
    assert torch.equal(outputs(model), under_mask)
    assert not torch.allclose(under_mask, dense)


def test_one_compressor_goes_on_from_another() -> None:
    model = residual()
    first = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.25}])
    first.compress()
    second = CriterionPruner.from_compressor(first, CONVS[:0] + [{"op_names": ["conv2", "stem"], "sparse_ratio": 0.5}],
                                             example_inputs=INPUTS)  # fmt: skip
    second.update_masks(second.generate_masks())
    masks = second.get_masks()
    assert [taken(masks[layer]["weight"]) for layer in ("stem", "conv1", "conv2")] == [4, 3, 4]
    under_mask = outputs(model)
    second.unwrap_model()
    assert torch.allclose(under_mask, removed_by_mask(model, masks), atol=1e-5)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_two_pruners_compress_together() -> None:
    model = residual()
    first = CriterionPruner(model, INNER, evaluator(model), example_inputs=INPUTS)
    first.interval_steps = 2
    second = CriterionPruner.from_compressor(
        first,
        [{"op_names": ["conv2", "stem"], "sparse_ratio": 0.5, "criterion": "taylor"}],
        example_inputs=INPUTS,
    )
    second.interval_steps = 3
    _, masks = second.compress(4, None)
    assert [taken(masks[layer]["weight"]) for layer in ("stem", "conv1", "conv2")] == [4, 6, 4]


def test_a_new_config_that_is_wrong_leaves_the_first_compressor_on() -> None:
    model = residual()
    first = CriterionPruner(model, INNER, example_inputs=INPUTS)
    first.compress()
    before = outputs(model)
    with pytest.raises(CriterionError, match="matches no layer"):
        CriterionPruner.from_compressor(first, [{"op_types": ["Conv9d"], "sparse_ratio": 0.5}])
    assert torch.equal(outputs(model), before)
    assert hasattr(model.conv1, "_nni_wrapper")


class Conv2dSame(nn.Conv2d):
    """A subclass, as timm has them."""


def test_subclasses_of_layers_are_masked() -> None:
    model = chain(Conv2dSame(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), width=6)()
    _, masks = CriterionPruner(
        model, [{"op_types": ["Conv2dSame"], "sparse_ratio": 0.5}], example_inputs=INPUTS
    ).compress()
    assert taken(masks["body.0"]["weight"]) == 4


def test_gradients_are_gathered_without_a_trace() -> None:
    model = residual().train()
    given = evaluator(model, rate=0.5)
    before = copy.deepcopy(model.state_dict())
    pruner = CriterionPruner(model, [{"criterion": "taylor", **CONVS[0]}], given, training_steps=3)
    pruner.compress()
    assert model.training
    pruner.unwrap_model()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"criterion": "d_scor"}, r"criterion 'd_scor' is unknown; did you mean 'd_score'"),
        ({"criterion_options": {"p": 3}}, r"criterion 'd_score' cannot take the options \{'p': 3\}"),
        ({"criterion_options": ["p"]}, "criterion_options must be a dict"),
        ({"criterion": "taylor"}, r"criterion 'taylor' needs images; pass evaluator=TorchEvaluator"),
        ({"granularity": [1, 1, -1, -1]}, r"cannot serve the granularity \[1, 1, -1, -1\] of 'conv1'"),
        ({"granularity": [2, -1, -1, -1]}, "it can serve: in_channel, out_channel"),
        ({"op_types": ["Conv9d"]}, r"matches no layer of Residual \(.*\); its layers are of the types Conv2d, Linear"),
        ({"sparsity_ratio": 0.5}, "entry 0 of the config list is not valid: .*sparsity_ratio"),
        ({"op_names": ["bn1"]}, "'bn1', a BatchNorm2d, cannot be scored"),
        ({"sparse_ratio": None, "target_settings": {"bias": {"sparse_ratio": 0.5}}}, "'bias' of 'conv1' cannot have"),
        ({"op_names": ["stem"], "granularity": "in_channel"}, "no criterion scores the inputs of 'stem'"),
        ({"op_names": ["fc"], "criterion": "dependency_aware"}, "cannot score 'fc': its channels are an output"),
        ({"exclude": True}, "names nothing to mask"),
        ({"sparse_ratio": None, "sparse_threshold": 0.5, "dependency_group_id": "a"}, "group 'a', which NNI masks by"),
        ({"op_names": ["stem", "conv2"], "dependency_group_id": "a", "criterion": "synaptic_strength"},
         r"cannot mask 'stem' and 'conv2' alike, .* of the shapes \(8, 3, 1, 1\) and \(8, 12, 1, 1\)"),
    ],
)  # fmt: skip
def test_bad_config_is_refused_before_anything_is_wrapped(entry: dict[str, Any], message: str) -> None:
    model = residual()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    tables = {name: dict(module._parameters) for name, module in model.named_modules()}
    config = {key: value for key, value in {**INNER[0], **entry}.items() if value is not None}
    with pytest.raises(DScoreError, match=message) as caught:
        CriterionPruner(model, [config], example_inputs=INPUTS)
    assert "\n" not in str(caught.value)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    for name, module in model.named_modules():
        assert [id(p) for p in module._parameters.values()] == [id(p) for p in tables[name].values()]


def test_other_misuse_is_refused() -> None:
    model = residual()
    with pytest.raises(CriterionError, match="the config list names nothing to mask"):
        CriterionPruner(model, [])
    with pytest.raises(CriterionError, match="entry 1 of the config list is not valid: Wrong key 'exclude'"):
        CriterionPruner(model, [*CONVS, {"op_names": ["conv1"], "exclude": True}])
    with pytest.raises(
        CriterionError, match="this pruner's criterion is 'd_score', but an entry asks for 'l1'"
    ):
        face.DScorePruner(model, [{**INNER[0], "criterion": "l1"}], example_inputs=INPUTS)
    pruner = CriterionPruner(model, INNER, example_inputs=INPUTS)
    with pytest.raises(ModelError, match="'conv1' wears a wrapper of NNI's; call unwrap_model"):
        CriterionPruner(model, INNER, example_inputs=INPUTS)
    pruner.unwrap_model()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"'conv1.weight' holds NaN"):
        CriterionPruner(model, INNER, example_inputs=INPUTS)


def test_a_training_function_without_steps_is_refused() -> None:
    model = residual()
    given = evaluator(model)
    given.training_func = lambda *_: None
    pruner = CriterionPruner(model, [{"criterion": "taylor", **INNER[0]}], given, example_inputs=INPUTS)
    with pytest.raises(CriterionError, match="no gradients were gathered"):
        pruner.compress()
    assert hasattr(model.conv1, "_nni_wrapper")


def test_without_nni_the_package_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['nni'] = None\n"
        "import dscore_plugin\n"
        "from dscore_plugin.errors import DScoreError\n"
        "try: import dscore_plugin.integrations.nni\n"
        "except DScoreError as error: assert isinstance(error, ImportError); print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "dscore-plugin[nni]"' in done.stdout
    assert done.stdout.count("\n") == 1
