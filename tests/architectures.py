"""Networks that dependency graphs find easy, hard or impossible, and weights under which no error can hide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dscore_plugin.models import create_model


@dataclass(frozen=True)
class Architecture:
    """A network, the shape of one input, and the layers that must be protected besides the last."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    protected: tuple[str, ...] = ()

    def randomised(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return randomised(copy.deepcopy(self.build()), seed).eval()

    @property
    def inputs(self) -> tuple[Tensor]:
        return (torch.zeros(1, *self.shape),)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw norm weights (some negative), biases, running statistics and bare scales: zeros hide errors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.InstanceNorm2d):
                if module.weight is not None:
                    module.weight.copy_(normal(module.weight) + 0.7 * normal(module.weight).sign())
                if module.bias is not None:
                    module.bias.copy_(normal(module.bias) / 2)
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.copy_(normal(module.running_mean) / 3)
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            elif getattr(module, "bias", None) is not None and isinstance(module.bias, Tensor):
                module.bias.copy_(normal(module.bias) / 5)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2].startswith(("gamma", "scale")):
                parameter.copy_(normal(parameter))
    return model


class Mixed(nn.Module):
    """Grouped, transposed and 1-d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.bn2 = nn.BatchNorm2d(12)
        self.line = nn.Conv1d(12, 10, 3, padding=1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.grouped(torch.relu(self.bn1(self.stem(x)))))
        return self.head(self.line(torch.sigmoid(self.bn2(self.up(x))).mean(-1)).mean(-1))


class Chain(nn.Module):
    """Layers one after the other, then the mean over all positions and a linear layer."""

    def __init__(self, *layers: nn.Module, width: int, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(2).mean(-1))


class Residual(nn.Module):
    """A stem, and a block whose second convolution is added to it: two producers of the same 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class LayerNormed(nn.Module):
    """Linear layers on tokens, with layer norms over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Linear(12, 16), nn.LayerNorm(16)
        self.expand, self.norm2, self.reduce = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)
        self.norm3, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.reduce(self.norm2(functional.gelu(self.expand(self.norm1(x)))))
        return self.head(self.norm3(x))


class GroupNormed(nn.Module):
    """Convolutions with group norms of four, two and one groups, one of them without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(2, 16, affine=False)
        self.conv3, self.norm3 = nn.Conv2d(16, 12, 3), nn.GroupNorm(1, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = x + torch.relu(self.norm2(self.conv2(x)))
        return self.head(torch.relu(self.norm3(self.conv3(x))).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, a layer norm over the last dimension, a bare scale, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16)
        self.expand, self.reduce = nn.Linear(16, 32), nn.Linear(32, 16)
        self.gamma = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.reduce(functional.gelu(self.expand(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Shared(nn.Module):
    """One activation called four times and one convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.last, self.head = nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.act(self.twice(self.act(self.twice(x))))
        return self.head(self.act(self.last(x)).mean((2, 3)))


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.two.weight = self.one.weight
        self.last, self.head = nn.Conv2d(8, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Flattened(nn.Module):
    """A linear layer that reads every position of every channel, an activation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.act, self.hidden, self.head = nn.ReLU(), nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv2(torch.relu(self.conv1(x))).flatten(1))
        return self.head(torch.relu(self.hidden(x)))


class Windows(nn.Module):
    """Tokens cut into windows, which a linear layer sees as a larger batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.reduce = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        windows = x.reshape(len(x) * 2, x.shape[1] // 2, -1)
        return self.reduce(torch.relu(self.expand(windows))).mean((0, 1))[None]


class Squeezed(nn.Module):
    """Squeeze and excitation: the channels are weighed by a function of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.reduce, self.expand = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Between(nn.Module):
    """Two convolutions, and any operation on the channels between them."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor], inside: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(inside, 6, 3, padding=1)
        self.head, self.operation = nn.Linear(6, 4), operation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.operation(torch.relu(self.conv1(x)), x)
        return self.head(torch.relu(self.conv2(hidden)).mean((2, 3)))


def gated(x: Tensor, _: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    return left * torch.sigmoid(right)


def shuffled(x: Tensor, _: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


def padded(x: Tensor, _: Tensor) -> Tensor:
    return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


class Decoder(nn.Module):
    """A linear layer whose outputs become channels and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.linear = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 6 * 4)
        self.up, self.out = nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.linear(torch.relu(self.encode(x)).mean((2, 3))))
        return self.out(torch.relu(self.up(z.view(-1, 6, 2, 2))))


class SeveralOutputs(nn.Module):
    """Features and logits: the features are an output although a layer reads them, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.conv3, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return {"features": [features], "logits": self.head(torch.relu(self.conv3(features)).mean((2, 3)))}


class Attention(nn.Module):
    """torch's own attention, and a hidden layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(12, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.expand, self.reduce, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.reduce(functional.gelu(self.expand(x)))).mean(1))


def unequal_positions() -> nn.Module:
    """Channels 0..7 of a concatenation lie at 0..5 of the first group of the next layer and 0..1 of the second."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.grouped, self.head = nn.Conv2d(12, 6, 3, groups=2), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(torch.cat([self.wide(x), self.narrow(x)], 1))
            return self.head(torch.relu(self.grouped(x)).mean((2, 3)))

    return Uneven()


def chain(*layers: nn.Module, width: int) -> Callable[[], nn.Module]:
    return partial(Chain, *layers, width=width)


IMAGE = (3, 8, 8)
LARGE = {
    "cifar_resnet56": Architecture(partial(create_model, "cifar_resnet56"), (3, 32, 32), ("conv1",)),
    "cifar_vgg16_bn": Architecture(partial(create_model, "cifar_vgg16_bn"), (3, 32, 32)),
    "resnet18": Architecture(partial(timm.create_model, "resnet18", num_classes=10), (3, 32, 32)),
    "mobilenetv2_100": Architecture(
        partial(timm.create_model, "mobilenetv2_100", num_classes=10), (3, 32, 32)
    ),
    "vgg11_bn": Architecture(partial(timm.create_model, "vgg11_bn", num_classes=10), (3, 32, 32)),
    "densenet121": Architecture(partial(timm.create_model, "densenet121", num_classes=10), (3, 32, 32)),
    "convnext_atto": Architecture(partial(timm.create_model, "convnext_atto", num_classes=10), (3, 32, 32)),
    "resnext50_32x4d": Architecture(
        partial(timm.create_model, "resnext50_32x4d", num_classes=10), (3, 32, 32)
    ),
}
SMALL = {
    "mixed": Architecture(Mixed, IMAGE),
    "residual": Architecture(Residual, IMAGE),
    "layer_norm": Architecture(LayerNormed, (5, 12)),
    "layer_norm_vectors": Architecture(LayerNormed, (12,)),
    "group_norm": Architecture(GroupNormed, IMAGE),
    "convnext_block": Architecture(ConvNeXtBlock, (3, 16, 16)),  # as wide as it has channels
    "shared": Architecture(Shared, IMAGE),
    "flattened": Architecture(Flattened, IMAGE),
    "squeezed": Architecture(Squeezed, IMAGE),
    "windows": Architecture(Windows, (6, 6)),
    "bn_free": Architecture(chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), width=6), IMAGE),
    "conv_3d": Architecture(
        chain(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 6, 3, 2, 1), width=6),
        (3, 4, 4, 4),
    ),
    "prelu": Architecture(
        chain(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 3), nn.PReLU(1), width=6), IMAGE
    ),
    "norms_without_weights": Architecture(
        chain(
            nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
            width=6,
        ),
        IMAGE,
    ),
    "groups_of_four_three_and_two": Architecture(
        chain(
            nn.Conv2d(3, 24, 3), nn.Sigmoid(), nn.Conv2d(24, 24, 3, padding=1, groups=4), nn.GELU(),
            nn.Conv2d(24, 12, 3, padding=1, groups=3), nn.GELU(), nn.Conv2d(12, 6, 1, groups=2), width=6,
        ),
        IMAGE,
    ),
    "depthwise_multiplier": Architecture(
        chain(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 16, 3, groups=8), nn.GELU(), nn.Conv2d(16, 6, 1), width=6),
        IMAGE, ("body.0",),
    ),
    "concatenated_twice": Architecture(partial(Between, lambda x, _: torch.cat([x, x], 1), 32), IMAGE),
}  # fmt: skip
UNMAPPABLE = {
    "gated": Architecture(partial(Between, gated, 8), IMAGE, ("conv1",)),
    "split": Architecture(partial(Between, lambda x, _: sum(x.split(8, 1)), 8), IMAGE, ("conv1",)),
    "sliced": Architecture(partial(Between, lambda x, _: x[:, 4:12], 8), IMAGE, ("conv1",)),
    "shuffled": Architecture(partial(Between, shuffled), IMAGE, ("conv1",)),
    "pixel_shuffled": Architecture(
        partial(Between, lambda x, _: functional.pixel_shuffle(x, 2), 4), IMAGE, ("conv1",)
    ),
    "padded": Architecture(partial(Between, padded, 20), IMAGE, ("conv1",)),
    "behind_the_image": Architecture(
        partial(Between, lambda x, image: torch.cat([image, x], 1), 19), IMAGE, ("conv1",)
    ),
    "behind_its_mean": Architecture(
        partial(Between, lambda x, _: torch.cat([x.mean(1, keepdim=True), x], 1), 17), IMAGE, ("conv1",)
    ),
    "decoder": Architecture(Decoder, IMAGE, ("linear",)),
    "running_statistics": Architecture(
        chain(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True), nn.Conv2d(8, 6, 3), width=6),
        IMAGE, ("body.0",),
    ),
    "several_normalised_dimensions": Architecture(
        chain(nn.Conv2d(3, 8, 3), nn.LayerNorm((8, 6, 6)), nn.Conv2d(8, 6, 3), width=6), IMAGE, ("body.0",)
    ),
    "grouped_transposed": Architecture(
        chain(
            nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.GELU(), nn.Conv2d(8, 6, 1), width=6
        ),
        IMAGE, ("body.0", "body.1"),
    ),
    "attention": Architecture(Attention, (5, 12), ("reduce",)),
    "unequal_positions": Architecture(unequal_positions, IMAGE, ("wide", "narrow")),
    "several_outputs": Architecture(SeveralOutputs, IMAGE, ("conv2",)),
    "tied": Architecture(Tied, IMAGE, ("stem", "one", "two")),
}  # fmt: skip
