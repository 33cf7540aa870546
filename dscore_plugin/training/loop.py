"""The training loop: one function, one process or several, interrupted or not, the same weights."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.errors import TrainingError
from dscore_plugin.training.batches import count_steps, load_batches, share_of, shuffled_batches, stream_seed
from dscore_plugin.training.checkpoint import (
    Checkpoint,
    check_resumable,
    describe_parameters,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dscore_plugin.training.config import TrainingConfig, learning_rate_at
from dscore_plugin.training.distillation import Teacher, watched
from dscore_plugin.training.evaluation import check_logits, count_correct, require_images
from dscore_plugin.training.history import EpochRecord, TrainingResult
from dscore_plugin.training.precision import Precision, choose_precision, set_memory_format
from dscore_plugin.training.progress import Advance, NoProgress, Progress
from dscore_plugin.training.regularizer import Regularizer

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet

__all__ = ["EpochRecord", "TrainingConfig", "TrainingResult", "train"]

_EVALUATION_BATCH = 256


def train(
    model: nn.Module,
    train_set: ImageSet,
    validation_set: ImageSet | None,
    config: TrainingConfig,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    regularizer: Regularizer | None = None,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train a classifier in place with stochastic gradient descent.

    Everything that happens in an epoch is a function of ``config.seed``, the epoch and the weights before
    it: a run that was cut off and resumed ends with bit-identical weights on a CPU, and on a GPU as far as
    the model's operations have deterministic forms. Under ``accelerate launch`` or ``torchrun`` (on CPUs with
    ``ACCELERATE_USE_CPU=true``) each process computes its share of every global batch; gradients agree with
    those of one process up to float rounding, except for what depends on the share: batch-norm statistics
    and dropout masks.

    Args:
        model: gives logits ``(B, classes)``. Parameters with ``requires_grad=False`` are not touched.
            Afterwards, also after an exception, it is on the device it came from, in eval mode, contiguous.
        train_set: the images to learn from.
        validation_set: evaluated in float32 after every ``config.validate_every``-th and the last epoch.
        config: the run.
        checkpoint: folder that holds the last complete epoch, replaced atomically; None keeps nothing.
        resume: go on from ``checkpoint`` if it is there; without it an existing checkpoint is refused.
        regularizer: acts on the gradients of each step.
        teacher: the network whose outputs are learnt, too, where ``config.distill`` or ``distill_features`` is above
            0; it is not changed.
        progress: shows a bar; None shows nothing.

    Returns:
        The history. The last epoch is the result; no better epoch is picked.

    Raises:
        TrainingError: if the configuration, the hardware or the checkpoint does not fit, or a loss or a
            weight is not finite.
        DataError: if a set is empty.
        ModelError: if the model does not give logits for the labels.
    """
    checkpoint = checkpoint and Path(checkpoint).resolve()  # renaming a link would leave its target behind
    _check_inputs(model, train_set, validation_set, checkpoint, resume)
    if config.distils != (teacher is not None):
        raise TrainingError(
            "distillation needs a teacher and a weight: give teacher= and TrainingConfig(distill=...), or neither"
        )
    accelerator = _new_accelerator()
    precision = choose_precision(config.precision, accelerator.device)
    config = replace(config, precision="bfloat16" if precision.bfloat16 else "float32")
    saved = load_checkpoint(checkpoint) if checkpoint and resume else None
    if saved:
        check_resumable(saved, config, model, len(train_set), regularizer is not None)
    accelerator.wait_for_everyone()  # no process may write before every one has looked for a checkpoint
    shown = progress if progress and accelerator.is_main_process else NoProgress()
    with _placed(model, precision):
        run = _Run(
            model, train_set, validation_set, config, accelerator, precision, regularizer, shown, teacher
        )
        history = run.restore(saved) if saved else []
        with shown.task("training", (config.epochs - len(history)) * run.steps) as advance:
            for epoch in range(len(history), config.epochs):
                history.append(run.epoch(epoch, advance))
                if checkpoint:
                    run.save(checkpoint, history)
    return TrainingResult(tuple(history))


@dataclass
class _Run:
    """What stays the same from the first to the last step."""

    model: nn.Module
    train_set: ImageSet
    validation_set: ImageSet | None
    config: TrainingConfig
    accelerator: Accelerator
    precision: Precision
    regularizer: Regularizer | None
    progress: Progress
    dense: InitVar[nn.Module | None] = None
    teacher: Teacher | None = field(init=False)
    wrapped: nn.Module = field(init=False)  # the model, or its distributed wrapper
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self, dense: nn.Module | None) -> None:
        shares = (self.config.distill, self.config.distill_temperature, self.config.distill_features)
        self.teacher = None if dense is None else Teacher(dense, *shares)
        optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=self.config.learning_rate,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
            nesterov=self.config.nesterov,
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch."""
        return count_steps(len(self.train_set), self.config.batch_size)

    def epoch(self, epoch: int, advance: Advance) -> EpochRecord:
        """Run one epoch, counted from 0, and evaluate it."""
        began = time.perf_counter()
        loss, top1 = self._pass(epoch, advance)
        numbers = self.regularizer.end_epoch(self.model, epoch) if self.regularizer else {}
        self._agree_on_buffers()
        self._require_finite_weights(epoch)
        due = (epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.config.epochs
        return EpochRecord(
            epoch=epoch + 1,
            loss=loss,
            train_top1=top1,
            validation_top1=self._evaluate(self.validation_set) if due and self.validation_set else None,
            learning_rate=self._learning_rate((epoch + 1) * self.steps - 1),
            seconds=time.perf_counter() - began,
            regularizer=numbers,
        )

    def restore(self, saved: Checkpoint) -> list[EpochRecord]:
        """Go back to where a checkpoint was taken; gives its history."""
        self.model.load_state_dict(saved.weights)
        named = dict(self.model.named_parameters())
        for name, momentum in saved.momentum.items():
            # On the device and in the memory layout of the parameter, as the optimiser would have made it.
            buffer = torch.empty_like(named[name]).copy_(momentum)
            self.optimizer.state[named[name]]["momentum_buffer"] = buffer
        if self.regularizer and saved.regularizer is not None:
            self.regularizer.load_state_dict(saved.regularizer)
        return list(saved.history)

    def save(self, folder: Path, history: list[EpochRecord]) -> None:
        """Write a checkpoint (the main process does, the others wait)."""
        if self.accelerator.is_main_process:
            momenta = {
                name: self.optimizer.state[parameter].get("momentum_buffer")
                for name, parameter in self.model.named_parameters()
                if parameter in self.optimizer.state
            }
            save_checkpoint(
                folder,
                Checkpoint(
                    weights=self.model.state_dict(),
                    momentum={name: buffer for name, buffer in momenta.items() if buffer is not None},
                    config=self.config,
                    fingerprint=describe_parameters(self.model),
                    images=len(self.train_set),
                    history=tuple(history),
                    regularizer=self.regularizer.state_dict() if self.regularizer else None,
                ),
            )
        self.accelerator.wait_for_everyone()

    def _pass(self, epoch: int, advance: Advance) -> tuple[float, float]:
        """Take every step of an epoch; gives mean loss and top-1 in percent."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        set_seed(stream_seed(self.config.seed, epoch, 1 + process))
        self.train_set.set_epoch(epoch)
        self.model.train()
        batches = shuffled_batches(len(self.train_set), self.config.batch_size, self.config.seed, epoch)
        shares = [share_of(batch, process, processes) for batch in batches]
        mine = [indices for indices, _ in shares]
        loader = load_batches(self.train_set, mine, workers=self.config.workers)
        sums, seen = torch.zeros(2, dtype=torch.float64), 0
        for step, (inputs, labels) in enumerate(loader):
            size = len(batches[step])
            sums += self._step(epoch, step, inputs, labels, counted=shares[step][1], size=size)
            seen += size
            loss, top1 = float(sums[0]) / seen, 100 * float(sums[1]) / seen
            advance(1, epoch=epoch + 1, loss=loss, top1=top1)
        return loss, top1

    def _step(
        self, epoch: int, step: int, inputs: Tensor, labels: Tensor, *, counted: int, size: int
    ) -> Tensor:
        """Take one step.

        Args:
            epoch: counted from 0.
            step: counted from 0 within the epoch.
            inputs: this process's share of the images, shape ``(B, C, H, W)``.
            labels: shape ``(B,)``.
            counted: how many of them count; the rest only fills the share.
            size: images in the global batch.

        Returns:
            The sum of the losses and the number of right guesses in the global batch, shape ``(2,)``.
        """
        inputs, labels = self.precision.place(inputs), labels.to(self.accelerator.device, non_blocking=True)
        with self.precision.autocast():
            judgement = self.teacher.judge(self.model, inputs, counted) if self.teacher else None
            with watched(self.model, judgement.layers if judgement else ()) as maps:
                output = self.wrapped(inputs)
        logits = check_logits(output, labels).float()[:counted]
        labels = labels[:counted]
        loss = functional.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self.config.label_smoothing
        )
        if judgement:
            loss = judgement.loss(loss, logits, maps)
        self.accelerator.backward(loss * (self.accelerator.num_processes / size))  # processes are averaged
        right = (logits.argmax(dim=1) == labels).sum()
        sums = self.accelerator.reduce(torch.stack([loss.detach(), right.to(loss.dtype)]), "sum").cpu()
        self._require_finite_loss(float(sums[0]) / size, epoch, step)
        if self.regularizer:
            self.regularizer.after_backward(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(epoch * self.steps + step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(self.config, step, self.steps)

    def _evaluate(self, images: ImageSet) -> float:
        """Give top-1 in percent, each process looking at its share of the images."""
        mine = list(range(len(images)))[self.accelerator.process_index :: self.accelerator.num_processes]
        batches = [mine[i : i + _EVALUATION_BATCH] for i in range(0, len(mine), _EVALUATION_BATCH)]
        with self.progress.task("evaluating", len(batches)) as advance:
            loader = load_batches(images, batches, workers=self.config.workers)
            correct = count_correct(self.model, loader, advance)
        counts = torch.tensor([correct], device=self.accelerator.device)
        return 100 * int(self.accelerator.reduce(counts, "sum")) / len(images)

    def _agree_on_buffers(self) -> None:
        """Give every process the main one's buffers, as the distributed forward pass does at each step."""
        if self.accelerator.num_processes > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _require_finite_loss(self, loss: float, epoch: int, step: int) -> None:
        if not torch.isfinite(torch.tensor(loss)):
            raise TrainingError(
                f"the loss is {loss} at epoch {epoch + 1}, step {step + 1} of {self.steps}; lower "
                f"learning_rate={self.config.learning_rate} or add warmup_epochs"
            )

    def _require_finite_weights(self, epoch: int) -> None:
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"{name!r} holds NaN or infinity after epoch {epoch + 1}, step {self.steps} of "
                    f"{self.steps}; lower learning_rate={self.config.learning_rate} or add warmup_epochs"
                )


def _check_inputs(
    model: nn.Module,
    train_set: ImageSet,
    validation_set: ImageSet | None,
    checkpoint: Path | None,
    resume: bool,
) -> None:
    require_images(train_set)
    if validation_set is not None:
        require_images(validation_set)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "the model has no trainable parameter; set requires_grad on what is to be trained"
        )
    if resume and checkpoint is None:
        raise TrainingError("resume=True needs the folder of a checkpoint; pass checkpoint=FOLDER")
    if checkpoint and not resume and find_checkpoint(checkpoint):
        raise TrainingError(
            f"{checkpoint} holds the checkpoint of an earlier run; pass resume=True to go on with it, "
            f"or delete it"
        )


def _new_accelerator() -> Accelerator:
    """Start accelerate without its mixed precision: that would replace the model's forward."""
    try:
        accelerator = Accelerator(mixed_precision="no")
    except ValueError as error:
        raise TrainingError(
            "accelerate already runs here with mixed precision, which replaces the model's forward; start "
            "it with mixed_precision='no' and choose TrainingConfig.precision instead"
        ) from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:  # each would train alone, and all write the same checkpoint
        raise TrainingError(
            f"{launched} processes were launched but accelerate works with {accelerator.num_processes}; "
            f"on CPUs set ACCELERATE_USE_CPU=true before accelerate starts"
        )
    return accelerator


@contextmanager
def _placed(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Hold a model on the device and in the layout of a run, with deterministic convolutions."""
    home = next(model.parameters()).device
    deterministic = torch.backends.cudnn.deterministic
    try:
        model.to(precision.device)
        set_memory_format(model, precision.memory_format)
        torch.backends.cudnn.deterministic = True
        yield
    finally:
        torch.backends.cudnn.deterministic = deterministic
        model.zero_grad(set_to_none=True)
        set_memory_format(model, torch.contiguous_format)
        vars(model).pop("_is_accelerate_prepared", None)  # else a second run would go unwrapped
        model.to(home).eval()
