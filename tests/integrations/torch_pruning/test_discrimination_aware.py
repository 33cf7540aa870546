from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

import dscore_plugin
from dscore_plugin import DiscriminationAwareImportance, DiscriminationAwarePruner
from dscore_plugin.criteria.discrimination_aware import channel_scores
from dscore_plugin.errors import BudgetError, CriterionError, DataError
from dscore_plugin.integrations.torch_pruning import register
from dscore_plugin.training.head_places import find_segments
from dscore_plugin.training.heads import Heads
from tests.architectures import SMALL
from tests.selection.helpers import forwards_are_their_own
from tests.selection.test_discrimination_aware import IMAGE, batches, choose, network

ROOT = Path(__file__).resolve().parents[3]


def groups_of(model: nn.Module, image: tuple[Tensor, ...] = IMAGE) -> dict[str, tp.dependency.Group]:
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, image)
    return {names[group[0].dep.target.module]: group for group in graph.get_all_groups()}


def heads_of(model: nn.Module) -> Heads:
    segments = find_segments(model, IMAGE, [f"blocks.{block}.conv2" for block in range(3)], 1)
    assert segments[0].end == "blocks.1"
    return Heads(segments, model, IMAGE, seed=3).eval()


def test_the_gradient_is_that_of_the_head_behind_the_layer_summed_over_images() -> None:
    model = network()
    heads, data = heads_of(model), batches()
    importance = DiscriminationAwareImportance()
    importance.watch(model, IMAGE, heads)
    model.stem.weight.requires_grad_(False)
    for images, labels in data:
        importance.update(images, labels)
    assert forwards_are_their_own(model)
    assert not model.stem.weight.requires_grad
    model.stem.weight.requires_grad_(True)
    assert all(p.grad is None for p in model.parameters())
    images, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    feature = model.blocks[:2](torch.relu(model.bn(model.stem(images))))
    early = functional.cross_entropy(heads.heads[0](feature), labels, reduction="sum")
    late = functional.cross_entropy(model(images), labels, reduction="sum")
    groups = groups_of(model)
    for block, loss in ((0, early), (1, early), (2, late)):
        weight = model.blocks[block].conv2.weight
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        expected = channel_scores(gradient)
        scores = importance(groups[f"blocks.{block}.conv1"])
        torch.testing.assert_close(scores.float(), expected, atol=1e-5, rtol=1e-4)
        assert len(set(scores.tolist())) == len(scores)


def test_the_size_of_the_batches_does_not_matter_and_reset_forgets() -> None:
    model = network()
    group = groups_of(model)["blocks.0.conv1"]
    one, many = DiscriminationAwareImportance("slice"), DiscriminationAwareImportance("slice")
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    for importance, sizes in ((one, (24,)), (many, (5, 12, 7))):
        importance.watch(model, IMAGE)
        importance.update(torch.randn(4, 3, 6, 6), labels[:4])
        importance(group)  # what was computed is computed again after more images
        importance.reset()
        for x, y in zip(images.split(sizes), labels.split(sizes), strict=True):
            importance.update(x, y)
    torch.testing.assert_close(one(group), many(group), atol=1e-6, rtol=1e-5)


def test_without_a_network_it_reads_grad_as_taylor_does() -> None:
    model = network()
    group = groups_of(model)["blocks.1.conv1"]
    with pytest.raises(CriterionError, match="call loss.backward"):
        DiscriminationAwareImportance()(group)
    functional.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    scores = DiscriminationAwareImportance()(group)
    torch.testing.assert_close(scores.float(), channel_scores(model.blocks[1].conv2.weight.grad))
    watching = DiscriminationAwareImportance()
    with pytest.raises(CriterionError, match=r"call watch\("):
        watching.update(*batches()[0])
    watching.watch(model, IMAGE)
    with pytest.raises(CriterionError, match="no image has been seen"):
        watching(group)


@pytest.mark.parametrize("name", ["residual", "mixed", "flattened", "groups_of_four_three_and_two"])
def test_layers_of_every_kind_are_scored_by_their_own_gradient(name: str) -> None:
    """A channel's weight in every reader, times t, has the derivative that the score is made of."""
    model = SMALL[name].randomised()
    images, labels = torch.randn(6, *SMALL[name].shape), torch.randint(0, 4, (6,))
    functional.cross_entropy(model(images), labels).backward()
    for group in groups_of(model, SMALL[name].inputs).values():
        scores = DiscriminationAwareImportance("slice")(group)
        if scores is None:
            continue
        norms = torch.zeros(len(scores), dtype=torch.float64)
        for item in group:
            if item.dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels):
                gradient = full_gradient(item.dep.target.module)
                for position, root in zip(item.idxs, item.root_idxs, strict=True):
                    norms[root] += gradient[:, position].norm().double()
        torch.testing.assert_close(scores, norms, atol=1e-7, rtol=1e-4)


def full_gradient(module: nn.Module) -> Tensor:
    """The gradient with inputs along dim 1, zero where a group does not read them."""
    gradient = module.weight.grad
    if isinstance(module, nn.Linear):
        return gradient
    if module.transposed:
        return gradient.transpose(0, 1)
    full = gradient.new_zeros(module.out_channels, module.in_channels, *gradient.shape[2:])
    outputs, inputs = module.out_channels // module.groups, module.in_channels // module.groups
    for g in range(module.groups):
        rows = slice(g * outputs, (g + 1) * outputs)
        full[rows, g * inputs : (g + 1) * inputs] = gradient[rows]
    return full


def test_torch_prunings_own_pruner_takes_it() -> None:
    register()
    assert tp.importance.DiscriminationAwareImportance is DiscriminationAwareImportance
    model = network()
    functional.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    pruner = tp.pruner.BasePruner(
        model, IMAGE, DiscriminationAwareImportance(), pruning_ratio=0.5, ignored_layers=[model.fc]
    )
    pruner.step()
    assert model.blocks[0].conv2.in_channels == 3
    assert model(IMAGE[0]).shape == (1, 4)


def test_gradients_of_a_wider_network_are_refused_until_they_are_taken_anew() -> None:
    model = network()
    importance = DiscriminationAwareImportance()
    importance.watch(model, IMAGE)
    importance.update(*batches()[0])
    pruner = tp.pruner.BasePruner(
        model, IMAGE, importance, pruning_ratio=0.6, iterative_steps=3, ignored_layers=[model.fc]
    )
    pruner.step()
    with pytest.raises(CriterionError, match=r"taken of a wider network.*reset\(\)"):
        pruner.step()
    with pytest.raises(CriterionError, match=r"reset\(\)"):
        importance.update(*batches()[0])
    importance.reset()
    importance.update(*batches()[0])
    for name, group in groups_of(model).items():
        if name.startswith("blocks") and name.endswith("conv1"):
            reader = name.replace("conv1", "conv2")
            expected = channel_scores(importance.compute()[reader])
            torch.testing.assert_close(importance(group), expected.double(), atol=1e-7, rtol=1e-5)
    pruner.step()
    assert model(IMAGE[0]).shape == (1, 4)


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    script = "tests.integrations.torch_pruning.dcp_processes"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-m", script, str(tmp_path), str(rank)], cwd=ROOT, env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    from tests.integrations.torch_pruning.dcp_processes import scores

    expected = scores(batches())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_pruner_removes_what_the_selector_leaves_out() -> None:
    model, same = network(), network()
    kept = choose(same, 0.4)
    pruner = DiscriminationAwarePruner(model, IMAGE[0], batches(), pruning_ratio=0.4, heads=1, head_passes=2)
    before = copy.deepcopy(model)
    pruner.step()
    for removal in pruner.removals:
        layer = removal.layer.replace("conv1", "conv2")
        assert set(removal.channels) == set(range(same.get_submodule(layer).in_channels)) - set(kept[layer])
    assert [model.blocks[i].conv2.in_channels for i in range(3)] == [4, 5, 3]
    images = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(images), same(images), atol=1e-5, rtol=1e-4)
    tp.DependencyGraph().build_dependency(before, IMAGE).load_pruning_history(pruner.pruning_history())
    assert [p.shape for p in before.parameters()] == [p.shape for p in model.parameters()]


class Loader(torch.utils.data.DataLoader):
    """Counts how often it is read."""

    read = 0

    def __iter__(self) -> Iterator[Any]:
        self.read += 1
        return super().__iter__()


def test_training_images_are_read_once_an_epoch() -> None:
    images, labels = (torch.cat(parts) for parts in zip(*batches(2), strict=True))
    loader = Loader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    options = {"heads": 0, "head_epochs": 3}
    DiscriminationAwarePruner(network(), IMAGE, batches(1), training=loader, **options).step()
    assert loader.read == 3
    with pytest.raises(DataError, match="anew for every epoch"):
        DiscriminationAwarePruner(network(), IMAGE, batches(1), training=iter(batches()), **options)
    with pytest.raises(DataError, match="no batch"):
        DiscriminationAwarePruner(network(), IMAGE, batches(1), training=[], **options).step()


def test_the_pruner_leaves_ignored_layers_alone_and_refuses_bad_options() -> None:
    model = network()
    pruner = DiscriminationAwarePruner(
        model,
        IMAGE,
        batches(),
        ignored_layers=[model.blocks[0]],
        heads=0,
        head_epochs=1,
        training=batches(2, seed=9),
    )
    pruner.step()
    assert [model.blocks[i].conv2.in_channels for i in range(3)] == [6, 4, 2]
    with pytest.raises(BudgetError, match="pruning_ratio"):
        DiscriminationAwarePruner(model, IMAGE, batches(), pruning_ratio=1.0)
    with pytest.raises(CriterionError, match="cannot take the options"):
        DiscriminationAwarePruner(model, IMAGE, batches(), lambda_=1)
    assert {"DiscriminationAwareImportance", "DiscriminationAwarePruner"} <= set(dscore_plugin.__all__)
