from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.errors import CriterionError, ModelError, TrainingError
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model
from dscore_plugin.selection.layer_candidates import candidates
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.head_places import Segment, find_segments
from dscore_plugin.training.heads import Head, Heads, Losses, tapped, train_heads

X = (torch.zeros(1, 3, 32, 32),)


def segments_of(name: str, heads: int | None = None) -> tuple[Segment, ...]:
    model = create_model(name) if name.startswith("cifar") else timm.create_model(name, num_classes=10)
    layers = [c.layer for c in candidates(model, X, PruningGraph(model, X).prunable)]
    return find_segments(model, X, layers, heads)


@pytest.mark.parametrize(
    ("name", "ends", "sizes"),
    [
        (
            "cifar_resnet56",
            ["layer1.6", "layer2.4", "layer3.2", ""],
            [7, 7, 7, 6],
        ),  # blocks 7, 14, 21: the authors'
        ("cifar_vgg19_bn", ["features.22", "features.42", ""], [6, 6, 3]),
        ("cifar_preresnet20", ["layer1.1", "layer2.1", ""], [4, 4, 4]),
        ("resnet18", ["layer2.0", "layer3.1", ""], [3, 3, 2]),  # 3 and 6
        ("resnet50", ["layer2.1", "layer3.2", "layer4.1", ""], [10, 10, 10, 2]),  # 5, 10 and 15
        ("mobilenetv1_100", ["blocks.2.1.bn2.act", "blocks.3.4.bn2.act", ""], [5, 5, 3]),
        ("mobilenetv2_100", ["blocks.2.2", "blocks.4.2", ""], [7, 7, 5]),
    ],
)
def test_heads_stand_where_the_authors_put_them(name: str, ends: list[str], sizes: list[int]) -> None:
    segments = segments_of(name)
    assert [segment.end for segment in segments] == ends
    assert [len(segment.layers) for segment in segments] == sizes
    depths = [segment.depth for segment in segments]
    assert depths == sorted(depths)
    assert depths[-1] == 1.0


def test_places_can_be_named_and_counted() -> None:
    model = create_model("cifar_resnet20")
    layers = [f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in range(3)]
    named = find_segments(model, X, layers, places=["layer2", "layer1"])
    assert [(segment.end, len(segment.layers)) for segment in named] == [
        ("layer1", 3),
        ("layer2", 3),
        ("", 3),
    ]
    assert [segment.end for segment in find_segments(model, X, layers, 0)] == [""]
    eight = find_segments(model, X, layers, 8)
    assert [len(segment.layers) for segment in eight] == [1] * 9
    for bad, message in ({"heads": 9}, "expected 0 to 8"), ({"places": ["layer4"]}, "calls no such module"):
        with pytest.raises(CriterionError, match=message):
            find_segments(model, X, layers, **bad)
    with pytest.raises(CriterionError, match="called once and gives"):
        find_segments(model, X, layers, places=["linear"])
    with pytest.raises(ModelError, match="does not run"):
        find_segments(model, (torch.zeros(1, 4, 32, 32),), layers)


def test_no_head_stands_where_something_passes_by() -> None:
    """Inside a residual block, nothing is a cut, whatever it is called."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(torch.relu(self.a(x))) + x
            y = self.d(torch.relu(self.c(y))) + y
            return self.fc(y.mean((2, 3)))

    segments = find_segments(Nested(), (torch.zeros(1, 3, 4, 4),), ["b", "d"])
    assert [segment.end for segment in segments] == [""]  # the sum between the blocks is no module's output


def test_a_head_is_batch_norm_relu_pooling_and_a_linear_layer() -> None:
    torch.manual_seed(0)
    head = Head(3, 4).eval()
    nn.init.normal_(head.norm.weight)
    head.norm.running_mean.normal_()
    x = torch.randn(2, 3, 5, 4)
    norm = head.norm
    shape = (1, 3, 1, 1)
    normal = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    active = (normal * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)
    torch.testing.assert_close(head(x), active.sum((2, 3)) / 20 @ head.linear.weight.T + head.linear.bias)
    assert Head(3, 4, ndim=3)(torch.randn(2, 3, 5)).shape == (2, 4)


def test_what_is_tapped_is_what_a_module_gave_even_if_it_is_changed_in_place_later() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad(), tapped(model, ["1"]) as features:
        model(x)
        assert torch.equal(features["1"], model[:2](x))


def small() -> tuple[nn.Module, Heads, tuple[Segment, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    example = (torch.zeros(1, 3, 8, 8),)
    segments = find_segments(model, example, ["3", "5"], 1)
    assert [segment.end for segment in segments] == ["4", ""]
    return model, Heads(segments, model, example), segments


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 8, 3, 8, 8, generator=generator)
    return [(x, (x.mean((1, 2, 3)) * 20).clamp(-1, 1).round().long() + 1) for x in images]


CONFIG = TrainingConfig(2, 0.1, nesterov=True, weight_decay=1e-4, schedule="constant", precision="float32")


def train(
    model: nn.Module, heads: Heads, losses: Losses, config: TrainingConfig = CONFIG, **options: object
) -> None:
    data = batches()
    train_heads(model, heads, lambda _: data, len(data), config, losses, **options)


def test_heads_alone_learn_and_leave_the_network_alone() -> None:
    model, heads, _ = small()
    model.train()
    before, images = copy.deepcopy(model.state_dict()), batches()
    loss = float(sum(loss_of_head(model, heads, *batch) for batch in images))
    train(model, heads, Losses.alone(heads), TrainingConfig(20, 0.1, precision="float32"))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert float(sum(loss_of_head(model, heads, *batch) for batch in images)) < 0.95 * loss
    assert not model.training
    assert not heads.training
    assert all(p.grad is None for p in model.parameters())


def loss_of_head(model: nn.Module, heads: Heads, images: Tensor, labels: Tensor) -> Tensor:
    model.eval()
    heads.eval()
    with torch.no_grad(), tapped(model, heads.ends) as features:
        model(images)
        return functional.cross_entropy(heads.logits(features)[0], labels)


def test_every_batch_takes_a_step_on_each_loss() -> None:
    """The same by hand: both gradients at the same weights, then one step on each, the shared momentum between."""
    model, heads, segments = small()
    theirs, their_heads = copy.deepcopy(model).train(), copy.deepcopy(heads).train()
    losses = Losses.by_depth(segments)
    assert losses.weights == (0.25, 1.0)
    parameters = [*their_heads.parameters(), *theirs.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1 / 1.25, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for _ in range(2):
        for images, labels in batches():
            feature = theirs[:5](images)
            found = []
            for weight, logits in ((0.25, their_heads.heads[0](feature)), (1.0, theirs[5:](feature))):
                optimizer.zero_grad()
                (weight * functional.cross_entropy(logits, labels)).backward(retain_graph=True)
                found.append([p.grad for p in parameters])
            for gradients in found:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
    train(model, heads, losses)
    for (name, a), b in zip(theirs.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(
        their_heads.heads[0].linear.weight, heads.heads[0].linear.weight, atol=1e-5, rtol=1e-4
    )


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    whole = small()
    train(*whole[:2], Losses.equal(whole[1]))
    part = small()

    def stopping(epoch: int) -> list[tuple[Tensor, Tensor]]:
        if epoch == 1:
            raise KeyboardInterrupt
        return batches()

    with pytest.raises(KeyboardInterrupt):
        train_heads(*part[:2], stopping, 3, CONFIG, Losses.equal(part[1]), checkpoint=tmp_path / "heads")
    rest = small()
    train(*rest[:2], Losses.equal(rest[1]), checkpoint=tmp_path / "heads")
    for a, b in zip(whole[0].state_dict().values(), rest[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = TrainingConfig(2, 0.2, nesterov=True, weight_decay=1e-4, schedule="constant", precision="float32")
    with pytest.raises(TrainingError, match="learning_rate differs"):
        train(*small()[:2], Losses.equal(rest[1]), other, checkpoint=tmp_path / "heads")


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model, heads, _ = small()
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(model, heads, Losses.equal(heads))


def test_an_epoch_without_batches_is_an_error() -> None:
    model, heads, _ = small()
    once = iter(batches())
    with pytest.raises(TrainingError, match="epoch 2 has no batches"):
        train_heads(model, heads, lambda _: once, 3, CONFIG, Losses.equal(heads))
