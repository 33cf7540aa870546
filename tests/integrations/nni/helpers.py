"""A small residual network, NNI evaluators for it, and the Torch-Pruning face's scores of its groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.groups import Role
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.planning import score_groups
from dscore_plugin.registry import CriterionInfo, list_criteria
from tests.architectures import IMAGE, SMALL, Residual

INPUTS = (torch.zeros(1, *IMAGE),)
INNER = [{"op_names": ["conv1"], "sparse_ratio": 0.5}]
CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
SCORING = [info for info in list_criteria() if info.kind != "selector" and "channel" in info.granularity]


def residual(seed: int = 0) -> Residual:
    model = SMALL["residual"].randomised(seed)
    assert isinstance(model, Residual)
    return model


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, *IMAGE, generator=generator), torch.randint(4, (6,), generator=generator))
        for _ in range(count)
    ]


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels, reduction="sum")


def evaluator(model: nn.Module, *, mode: bool = True, rate: float = 1e-3, **options: Any) -> TorchEvaluator:
    """Train on four batches, over and over."""

    def training_func(
        model: nn.Module, optimizers: Any, step: Callable[..., Tensor], schedulers: Any = None,
        max_steps: int | None = None, max_epochs: int | None = None,
    ) -> None:  # fmt: skip
        model.train(mode)
        data = batches()
        for position in range(max_steps or len(data) * (max_epochs or 1)):
            optimizers.zero_grad()
            step(data[position % len(data)], model).backward()
            optimizers.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=rate)
    return TorchEvaluator(training_func, optimizer, training_step, **options)


def reference(model: nn.Module, info: CriterionInfo, layers: list[str]) -> dict[str, Tensor]:
    """The Torch-Pruning face's scores, at the places of each layer's filters."""
    graph = PruningGraph(model, INPUTS)
    found = {}
    for item in score_groups(graph, info, batches=batches()):
        for member in item.group.roles(Role.PRODUCER):
            if member.module in layers:
                found[member.module] = torch.zeros(member.width, dtype=torch.float64)
                found[member.module][member.index] = item.scores[member.unit]
    return found


def taken(mask: Tensor) -> int:
    """How many filters a mask takes."""
    return int((mask.flatten(1).sum(dim=1) == 0).sum())
