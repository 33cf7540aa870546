"""Distillation: a network that learns from a larger one's outputs, and from where that one looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.errors import ModelError
from dscore_plugin.modes import in_eval_mode

SEEN = 1e-6  # keeps the gradient of a norm finite where a feature map is all zeros


class Teacher:
    """A frozen network, and how much its pupil listens.

    The pupil's loss is ``(1 - weight) cross-entropy + weight T^2 KL(teacher / T || pupil / T)``, plus ``features``
    times the squared distance of the normalised attention maps of the layers in :attr:`layers`. An attention map is
    the sum over channels of the squared feature map, so that it exists whatever the pupil's width.

    Args:
        model: the teacher; used in eval mode and without gradients, its modes are restored after each use.
        weight: of the soft targets, in ``[0, 1]``.
        temperature: ``T``, above 0; a higher one shows more of what the teacher thinks of the wrong classes.
        features: weight of the attention maps; 0 leaves them out.

    Attributes:
        layers: names of the layers whose attention is matched: the last module of each spatial size; known after
            the first batch.

    Source: Hinton et al., arXiv 1503.02531, sec. 2 (soft targets); Zagoruyko and Komodakis, arXiv 1612.03928,
    sec. 3.1 (attention transfer).
    """

    def __init__(
        self, model: nn.Module, weight: float = 0.9, temperature: float = 4.0, features: float = 0.0
    ) -> None:
        self.model = model
        self.weight = weight
        self.temperature = temperature
        self.features = features
        self.layers: tuple[str, ...] | None = None

    def judge(self, pupil: nn.Module, images: Tensor, counted: int) -> Judgement:
        """Look at a batch.

        Args:
            pupil: only layers that it has as well are looked at.
            images: shape ``(B, C, H, W)``, as the pupil gets them.
            counted: how many of them, from the first on, count.

        Raises:
            ModelError: if attention is to be matched and no layer gives a feature map.
        """
        self.model.to(images.device)
        with torch.no_grad(), in_eval_mode(self.model):
            if self.features and self.layers is None:
                self.layers = _attended_layers(self.model, pupil, images[:1])
            layers = self.layers or () if self.features else ()
            with watched(self.model, layers) as maps:
                logits = self.model(images)
        return Judgement(self, logits.float()[:counted], [_attention(maps[name], counted) for name in layers])


class Judgement:
    """What a teacher makes of one batch.

    Args:
        teacher: who.
        logits: shape ``(B, classes)``.
        attention: for each layer, shape ``(B, H W)``.
    """

    def __init__(self, teacher: Teacher, logits: Tensor, attention: Sequence[Tensor]) -> None:
        self._teacher, self._logits, self._attention = teacher, logits, attention

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that the pupil's attention is compared at."""
        return self._teacher.layers or () if self._attention else ()

    def loss(self, hard: Tensor, logits: Tensor, maps: dict[str, Tensor]) -> Tensor:
        """Return the pupil's loss, summed over the images.

        Args:
            hard: its cross-entropy, summed over the images.
            logits: its logits, shape ``(B, classes)``.
            maps: its feature maps at :attr:`layers`.

        Raises:
            ModelError: if its feature maps have other sizes than the teacher's.
        """
        t = self._teacher.temperature
        soft = t**2 * functional.kl_div(
            functional.log_softmax(logits / t, dim=1),
            functional.log_softmax(self._logits / t, dim=1),
            reduction="sum",
            log_target=True,
        )
        total = (1 - self._teacher.weight) * hard + self._teacher.weight * soft
        for name, wanted in zip(self.layers, self._attention, strict=True):
            found = _attention(maps[name], len(logits))
            if found.shape != wanted.shape:
                raise ModelError(
                    f"the feature map of {name!r} has {found.shape[1]} places, the teacher's {wanted.shape[1]}; "
                    "distil without features"
                )
            total = total + self._teacher.features * (found - wanted).square().sum()
        return total


@contextmanager
def watched(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of some layers in a dictionary for as long as the context lasts."""
    maps: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: maps.__setitem__(name, output)

    with ExitStack() as stack:
        for name in layers:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        yield maps


def _attention(feature_map: Tensor, counted: int) -> Tensor:
    energy = feature_map[:counted].float().square().sum(dim=1).flatten(1)
    return energy / (energy.norm(dim=1, keepdim=True) + SEEN)


def _attended_layers(model: nn.Module, pupil: nn.Module, images: Tensor) -> tuple[str, ...]:
    """The last module of each spatial size that gives a feature map, of those that the pupil has, too."""
    shared = {name for name, _ in pupil.named_modules() if name}
    last: dict[tuple[int, ...], str] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                last[tuple(output.shape[2:])] = name

        return see

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in shared:
                stack.callback(module.register_forward_hook(note(name)).remove)
        model(images)
    if not last:
        raise ModelError(
            f"no layer of {type(model).__name__} gives a feature map (B, C, H, W); distil without features"
        )
    return tuple(last.values())
