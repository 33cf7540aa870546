"""Accuracy in float32, and batch-norm statistics taken anew after surgery."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dscore_plugin.errors import DataError, ModelError
from dscore_plugin.modes import in_eval_mode, modes_kept
from dscore_plugin.training.batches import load_batches
from dscore_plugin.training.progress import Advance, NoProgress, Progress

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet


@dataclass(frozen=True)
class Evaluation:
    """How often the first guess was right.

    Args:
        top1: percent.
        images: how many were looked at.
    """

    top1: float
    images: int


def evaluate(
    model: nn.Module, images: ImageSet, *, batch_size: int = 256, progress: Progress | None = None
) -> Evaluation:
    """Measure top-1 accuracy in float32, on the device of the model.

    Args:
        model: classifier giving logits ``(B, classes)``; its train / eval modes are restored afterwards.
        images: the set, as it comes (pass ``images.plain()`` to leave augmentation out).
        batch_size: images at a time.
        progress: shows a bar; None shows nothing.

    Returns:
        The accuracy. Under several processes each one that calls this looks at the whole set.

    Raises:
        DataError: if the set is empty.
        ModelError: if the model does not give logits for the labels of the set.
    """
    require_images(images)
    loader = images.loader(batch_size)
    with (progress or NoProgress()).task("evaluating", len(loader)) as advance:
        correct = count_correct(model, loader, advance)
    return Evaluation(top1=100 * correct / len(images), images=len(images))


def count_correct(model: nn.Module, loader: Iterable[Any], advance: Advance) -> int:
    """Count the images of a loader that the model classifies rightly, in float32.

    Args:
        model: as for ``evaluate``.
        loader: gives ``(images (B, C, H, W), labels (B,))``.
        advance: called once per batch.

    Returns:
        The count; 0 for an empty loader.

    Raises:
        ModelError: as for ``evaluate``.
    """
    correct = 0
    with _preserved(model, []), torch.inference_mode(), _float32(model) as device:
        model.eval()
        for inputs, labels in loader:
            labels = labels.to(device)
            logits = check_logits(model(inputs.to(device)), labels)
            correct += int((logits.argmax(dim=1) == labels).sum())
            advance(1)
    return correct


def recalibrate_batchnorm(
    model: nn.Module, images: ImageSet, *, count: int = 2048, batch_size: int = 128, seed: int = 0
) -> None:
    """Take the running statistics of every batch norm anew, from training images.

    Give the images in the form that the network was trained on (:func:`images_of_statistics`): those of another
    form have other statistics, which costs accuracy even without any pruning. The running mean and variance become
    the averages of the batches' means and (unbiased) variances, each batch weighted by its size. Only batch norms
    run in train mode, so dropout stays off. Modes and momenta are restored. A model without running statistics is
    left alone.

    Args:
        model: changed in place, on its own device.
        images: training images; at most ``count`` of them are used, chosen by ``seed``. An augmented set shows them
            as in its first epoch, whichever it is in.
        count: how many.
        batch_size: the largest batch; the images are spread evenly over the batches.
        seed: of the choice.

    Raises:
        DataError: if the set is empty or ``count`` or ``batch_size`` is less than 1.
    """
    norms = _running_norms(model)
    require_images(images)
    if count < 1 or batch_size < 1:
        raise DataError(f"count={count} and batch_size={batch_size} are not valid; expected numbers >= 1")
    if not norms:
        return
    chosen = _as_at_first(images, count, seed)
    # Shuffled, because a set stored class by class would give batches of one class, and too small a variance.
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    batches = order.tensor_split(math.ceil(len(chosen) / batch_size))
    loader = load_batches(chosen, [batch.tolist() for batch in batches])
    with _preserved(model, norms), torch.no_grad(), _float32(model) as device:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        seen = 0
        for inputs, _ in loader:
            seen += len(inputs)
            for norm in norms:
                norm.momentum = len(inputs) / seen  # the average so far keeps the rest
            model(inputs.to(device))


def _running_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _as_at_first(images: ImageSet, count: int, seed: int) -> ImageSet:
    """Return so many of the images, in the form of the first epoch."""
    chosen = images.subset(min(count, len(images)), seed=seed)
    chosen.set_epoch(0)
    return chosen


class _SeenError(BaseException):
    """Leaves a pass behind the first norm; no Exception, so that no forward() takes it for one of its own."""


def images_of_statistics(model: nn.Module, images: ImageSet, *, count: int = 256, seed: int = 0) -> ImageSet:
    """Find out on which form of the training images a network's batch-norm statistics were taken.

    What the first batch norm reads depends on little but the images. Its running mean and variance are compared
    with those of augmented and of plain images.

    Args:
        model: with the statistics of its training; not changed.
        images: the training images, augmented.
        count: how many of them to look at.
        seed: of the choice.

    Returns:
        ``images``, or ``images.plain()`` where that comes closer; ``images`` for a model without running statistics.

    Raises:
        DataError: if the set is empty.
    """
    norms = _running_norms(model)
    require_images(images)
    if not norms:
        return images
    augmented, plain = (_distance(model, norms, form, count, seed) for form in (images, images.plain()))
    return images.plain() if plain < augmented else images


def _distance(
    model: nn.Module, norms: Sequence[_BatchNorm], images: ImageSet, count: int, seed: int
) -> float:
    """Say how far the statistics of images are from those that the first norm has, in standard deviations."""
    seen: list[tuple[_BatchNorm, Tensor]] = []

    def note(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, _BatchNorm)
        seen.append((norm, inputs[0]))
        raise _SeenError

    chosen = _as_at_first(images, count, seed)
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        with in_eval_mode(model), torch.no_grad(), _float32(model) as device, suppress(_SeenError):
            model(chosen.__getitems__(range(len(chosen)))[0].to(device))
    finally:
        for handle in handles:
            handle.remove()
    if not seen:  # none of its norms is used
        return 0.0
    norm, inputs = seen[0]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dims = [dim for dim in range(inputs.dim()) if dim != 1]
    mean, variance = inputs.mean(dims), inputs.var(dims)
    own = (norm.running_var + norm.eps).sqrt()
    shift = ((mean - norm.running_mean) / own).abs().mean()
    return float(shift + (((variance + norm.eps).sqrt() / own).log().abs().mean()))


def check_logits(logits: object, labels: Tensor) -> Tensor:
    """Make sure that a model's output scores the classes of a batch.

    Args:
        logits: what the model gave.
        labels: shape ``(B,)``.

    Returns:
        ``logits``, shape ``(B, classes)``.

    Raises:
        ModelError: if it is no tensor of that shape, or a label is beyond its classes.
    """
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model gave a {type(logits).__name__}; expected one tensor of logits (batch, classes)"
        )
    if logits.dim() != 2 or len(logits) != len(labels):
        raise ModelError(
            f"the model gave shape {tuple(logits.shape)}; expected logits ({len(labels)}, classes): "
            f"use a classifier"
        )
    highest = int(labels.max())
    if highest >= logits.shape[1]:
        raise ModelError(
            f"the model has {logits.shape[1]} outputs but the data has a label {highest}; "
            f"build it with num_classes={highest + 1} or more"
        )
    return logits


def require_images(images: Sized) -> None:
    """Make sure that a set is not empty.

    Raises:
        DataError: if it is.
    """
    if len(images) == 0:
        raise DataError("the set of images is empty; expected at least one: check the data and its split")


@contextmanager
def _float32(model: nn.Module) -> Iterator[torch.device]:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with torch.autocast(device.type, enabled=False):
        yield device


@contextmanager
def _preserved(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Put back, module by module, the train / eval modes and the given norms' momenta."""
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        with modes_kept(model):
            yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
