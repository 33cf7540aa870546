"""Images that a network itself has labelled, and networks whose norms have been used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dscore_plugin.datasets import ImageSet
from dscore_plugin.groups import ScoredGroup
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model


class Generated:
    """Random images in memory; augmentation turns them upside down."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def plain(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def augmented(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        return self.images[indices].flip(2)


def labelled_images(model: nn.Module, count: int, shape: tuple[int, ...], *, wrong: int = 0) -> ImageSet:
    """Random images, labelled with what ``model`` sees in them, but for the first ``wrong`` of them.

    The bias of the network's last layer is moved first, so that it sees every class.
    """
    images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.bias -= model(images).mean(dim=0)
        logits = model(images)
    labels = logits.argmax(dim=1)
    labels[:wrong] = logits[:wrong].argmin(dim=1)
    return ImageSet(Generated(images, labels), torch.arange(count))


def used(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a fresh network norms as after training: some scales negative, statistics away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(parameter.clamp(0, 1) + 0.4 * draw(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * draw(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + draw(buffer).square())
    return model.eval()


def network(name: str, seed: int = 0, **arguments: object) -> nn.Module:
    torch.manual_seed(seed)
    return used(create_model(name, **arguments), seed)


def scored_groups(model: nn.Module, shape: tuple[int, ...], seed: int = 0) -> list[ScoredGroup]:
    """Every group that may be pruned, with random scores."""
    groups = PruningGraph(model, (torch.zeros(1, *shape),)).prunable
    generator = torch.Generator().manual_seed(seed)
    return [
        ScoredGroup(group, torch.rand(group.units, generator=generator, dtype=torch.float64))
        for group in groups
    ]


def forwards_are_their_own(model: nn.Module) -> bool:
    """Whether no module has a hook or a replaced forward left."""
    return not any(
        "forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks
        for module in model.modules()
    )
