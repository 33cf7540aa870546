"""The training loop: one function, one process or several, interrupted or not, the same weights."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.errors import DataError, TrainingError
from dscore_plugin.training.batches import load_batches, stream_seed
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
from dscore_plugin.training.feed import Feed, ImageStream, Portion, Step, make_feed
from dscore_plugin.training.history import EpochRecord, TrainingResult
from dscore_plugin.training.mixing import Mixer, mixed_targets
from dscore_plugin.training.precision import Precision, choose_device, choose_precision, set_memory_format
from dscore_plugin.training.progress import Advance, NoProgress, Progress
from dscore_plugin.training.regularizer import Regularizer
from dscore_plugin.training.tracking import log_folder, tracked

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet

__all__ = ["EpochRecord", "TrainingConfig", "TrainingResult", "train"]

_EVALUATION_BATCH = 256


def train(
    model: nn.Module,
    train_set: ImageSet | ImageStream,
    validation_set: ImageSet | ImageStream | None,
    config: TrainingConfig,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    logs: Path | None = None,
    regularizer: Regularizer | None = None,
    teacher: nn.Module | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train a classifier in place with stochastic gradient descent.

    Everything that happens in an epoch is a function of ``config.seed``, the epoch and the weights before
    it: a run that was cut off and resumed ends with bit-identical weights on a CPU, and on a GPU as far as
    the model's operations have deterministic forms. Under ``accelerate launch`` or ``torchrun`` (on CPUs with
    ``ACCELERATE_USE_CPU=true``) each process computes its share of every global batch; gradients agree with
    those of one process up to float rounding, except for what depends on the share: batch-norm statistics
    and dropout masks. The same holds for the parts that ``config.accumulate`` divides a share into. A stream is read in
    an order that depends on the number of processes and of loader workers, so resuming it needs the same of both.

    Args:
        model: gives logits ``(B, classes)``. Parameters with ``requires_grad=False`` are not touched.
            Afterwards, also after an exception, it is on the device it came from, in eval mode, contiguous.
        train_set: the images to learn from; of a stream, as many full batches as its length has room for.
        validation_set: evaluated in float32 after every ``config.validate_every``-th and the last epoch.
        config: the run.
        checkpoint: folder that holds the last complete epoch, replaced atomically; None keeps nothing.
        resume: go on from ``checkpoint`` if it is there; without it an existing checkpoint is refused.
        logs: folder for the tracker that ``config.track`` names; None is ``CHECKPOINT.logs`` beside the checkpoint.
        regularizer: acts on the gradients of each step; not together with ``config.ema``, as it sees the weights
            that are trained and not their average.
        teacher: the network whose outputs are learnt, too, where ``config.distill`` or ``distill_features`` is above
            0; it is not changed.
        device: where to compute; None is accelerate's choice, a GPU where there is one, whatever device the model
            comes from. Several processes get theirs from the launcher.
        progress: shows a bar; None shows nothing.

    Returns:
        The history. The last epoch is the result; no better epoch is picked.

    Raises:
        TrainingError: if the configuration, the hardware, the device or the checkpoint does not fit, or a loss or
            a weight is not finite.
        DataError: if a set is empty, or a stream ends too early.
        ModelError: if the model does not give logits for the labels.
    """
    checkpoint = checkpoint and Path(checkpoint).resolve()  # renaming a link would leave its target behind
    _check_inputs(model, train_set, validation_set, checkpoint, resume)
    if config.distils != (teacher is not None):
        raise TrainingError(
            "distillation needs a teacher and a weight: give teacher= and TrainingConfig(distill=...), or neither"
        )
    if config.ema and regularizer:
        raise TrainingError("ema averages weights that the regularizer does not see; leave one of them out")
    folder = log_folder(config, checkpoint, logs)
    accelerator = new_accelerator(log_with=config.track, project_dir=folder and folder.parent)
    place = choose_device(device, accelerator.device, accelerator.num_processes)
    precision = choose_precision(config.precision, place)
    config = replace(config, precision="bfloat16" if precision.bfloat16 else "float32")
    feed = make_feed(train_set, config, accelerator.process_index, accelerator.num_processes)
    saved = load_checkpoint(checkpoint) if checkpoint and resume else None
    if saved:
        check_resumable(saved, config, model, len(train_set), regularizer is not None, feed.readers)
    accelerator.wait_for_everyone()  # no process may write before every one has looked for a checkpoint
    shown = progress if progress and accelerator.is_main_process else NoProgress()
    with _placed(model, precision):
        run = _Run(
            model,
            len(train_set),
            feed,
            validation_set,
            config,
            accelerator,
            precision,
            regularizer,
            shown,
            teacher,
        )
        history = run.restore(saved) if saved else []
        with (
            shown.task("training", (config.epochs - len(history)) * feed.steps) as advance,
            tracked(accelerator, config, folder, len(history)) as log,
        ):
            for epoch in range(len(history), config.epochs):
                history.append(run.epoch(epoch, advance))
                log(history[-1])
                if checkpoint:
                    run.save(checkpoint, history)
        run.finish()
    return TrainingResult(tuple(history))


@dataclass
class _Run:
    """What stays the same from the first to the last step."""

    model: nn.Module
    images: int  # in the training set
    feed: Feed
    validation_set: ImageSet | ImageStream | None
    config: TrainingConfig
    accelerator: Accelerator
    precision: Precision
    regularizer: Regularizer | None
    progress: Progress
    dense: InitVar[nn.Module | None] = None
    teacher: Teacher | None = field(init=False)
    mixer: Mixer | None = field(init=False)
    average: Any = field(init=False)  # timm's moving average of the weights, or None
    wrapped: nn.Module = field(init=False)  # the model, or its distributed wrapper
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self, dense: nn.Module | None) -> None:
        shares = (self.config.distill, self.config.distill_temperature, self.config.distill_features)
        self.teacher = None if dense is None else Teacher(dense, *shares)
        config = self.config
        self.mixer = Mixer(config.mixup, config.cutmix, config.seed) if config.mixes else None
        self.average = _moving_average(self.model, config.ema) if config.ema else None
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
        return self.feed.steps

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated."""
        return self.average.module if self.average else self.model

    def finish(self) -> None:
        """Leave in the model what was evaluated."""
        if self.average:
            self.model.load_state_dict(self.average.module.state_dict())

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
        if self.average:
            self.average.module.load_state_dict(saved.ema)
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
                    images=self.images,
                    history=tuple(history),
                    regularizer=self.regularizer.state_dict() if self.regularizer else None,
                    ema=self.average.module.state_dict() if self.average else None,
                    stream=self.feed.readers,
                ),
            )
        self.accelerator.wait_for_everyone()

    def _pass(self, epoch: int, advance: Advance) -> tuple[float, float]:
        """Take every step of an epoch; gives mean loss and top-1 in percent."""
        set_seed(stream_seed(self.config.seed, epoch, 1 + self.accelerator.process_index))
        self.model.train()
        sums, seen = torch.zeros(2, dtype=torch.float64), 0
        for number, step in enumerate(self.feed.epoch(epoch)):
            sums += self._step(epoch, number, step)
            seen += step.size
            loss, top1 = float(sums[0]) / seen, 100 * float(sums[1]) / seen
            advance(1, epoch=epoch + 1, loss=loss, top1=top1)
        return loss, top1

    def _step(self, epoch: int, number: int, step: Step) -> Tensor:
        """Take one step.

        Args:
            epoch: counted from 0.
            number: of the step, counted from 0 within the epoch.
            step: the global batch, and this process's portions of it.

        Returns:
            The sum of the losses and the number of right guesses in the global batch, shape ``(2,)``.
        """
        found = []
        for part, portion in enumerate(step.portions, start=1):
            # Processes exchange gradients once they have added up those of all their portions.
            last = part == self.config.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                found.append(self._add_gradients(epoch, number, portion, step.size))
        sums = self.accelerator.reduce(torch.stack(found).sum(dim=0), "sum").cpu()
        self._require_finite_loss(float(sums[0]) / step.size, epoch, number)
        if self.regularizer:
            self.regularizer.after_backward(self.model)
        taken = epoch * self.steps + number
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(taken)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.model, step=taken + 1)
        return sums

    def _add_gradients(self, epoch: int, number: int, portion: Portion, size: int) -> Tensor:
        """Run a portion forward and backward.

        Args:
            epoch: counted from 0.
            number: of the step, counted from 0 within the epoch.
            portion: the images.
            size: images in the global batch.

        Returns:
            The sum of the losses and the number of right guesses, shape ``(2,)``.
        """
        counted = portion.counted
        inputs = self.precision.place(portion.images)
        labels = portion.labels.to(self.precision.device, non_blocking=True)
        mixed = self.mixer(inputs, epoch, number) if self.mixer else None
        with self.precision.autocast():
            judgement = self.teacher.judge(self.model, inputs, counted) if self.teacher else None
            with watched(self.model, judgement.layers if judgement else ()) as maps:
                output = self.wrapped(inputs)
        logits = check_logits(output, labels).float()[:counted]
        targets = labels if mixed is None else mixed_targets(mixed, labels, logits.shape[1])
        targets = targets[:counted]
        loss = functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=self.config.label_smoothing
        )
        if judgement:
            loss = judgement.loss(loss, logits, maps)
        self.accelerator.backward(loss * (self.accelerator.num_processes / size))  # processes are averaged
        wanted = targets if mixed is None else targets.argmax(dim=1)
        right = (logits.argmax(dim=1) == wanted).sum()
        return torch.stack([loss.detach(), right.to(loss.dtype)])

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(self.config, step, self.steps)

    def _evaluate(self, images: ImageSet | ImageStream) -> float:
        """Give top-1 in percent, each process looking at its share of the images."""
        seen = 0

        def count(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal seen
            for inputs, labels in batches:
                seen += len(labels)
                yield inputs, labels

        loader, batches = self._evaluation_batches(images)
        with self.progress.task("evaluating", batches) as advance:
            correct = count_correct(self.judged, count(loader), advance)
        counts = torch.tensor([correct, seen], device=self.precision.device)
        right, every = self.accelerator.reduce(counts, "sum").tolist()
        if every == 0:
            raise DataError("the stream to evaluate on gave no image; check its shards")
        return 100 * right / every

    def _evaluation_batches(
        self, images: ImageSet | ImageStream
    ) -> tuple[Iterable[tuple[Tensor, Tensor]], int]:
        """Give this process's share of the images in batches, and how many batches that are, more or less."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        workers = self.config.workers
        if isinstance(images, ImageStream):
            loader = images.evaluation_batches(
                _EVALUATION_BATCH, process=process, processes=processes, workers=workers
            )
            return loader, -(-len(images) // (_EVALUATION_BATCH * processes))
        mine = list(range(len(images)))[process::processes]
        batches = [mine[i : i + _EVALUATION_BATCH] for i in range(0, len(mine), _EVALUATION_BATCH)]
        return load_batches(images, batches, workers=workers), len(batches)

    def _agree_on_buffers(self) -> None:
        """Give every process the main one's buffers, as the distributed forward pass does at each step."""
        if self.accelerator.num_processes > 1:
            for buffer in (*self.model.buffers(), *(self.average.module.buffers() if self.average else ())):
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
    train_set: ImageSet | ImageStream,
    validation_set: ImageSet | ImageStream | None,
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


def _moving_average(model: nn.Module, decay: float) -> Any:
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def new_accelerator(**options: Any) -> Accelerator:
    """Start accelerate and the group of processes; it neither moves a model nor replaces its forward.

    Args:
        **options: further arguments of ``Accelerator``.

    Raises:
        TrainingError: if it already runs with mixed precision, or does not know of the processes that were launched.
    """
    try:
        accelerator = Accelerator(mixed_precision="no", device_placement=False, **options)
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
