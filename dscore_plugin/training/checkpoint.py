"""Training checkpoints: a folder of safetensors and JSON that is either complete or not there.

``weights.safetensors``    the model's state dict
``optimizer.safetensors``  the momentum of every parameter that has one, by name
``ema.safetensors``        the moving average of the state dict, where the run keeps one
``state.json``             everything else, and the digests of the files above

A checkpoint is written into ``.NAME.partial`` beside the folder. Then the folder is renamed to
``.NAME.previous``, the new one takes its place, and the previous one is deleted. Whenever this is cut off,
the folder or, between the two renames, ``.NAME.previous`` is complete; both are looked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dscore_plugin.errors import TrainingError
from dscore_plugin.training.config import NO_EFFECT, TrainingConfig
from dscore_plugin.training.history import EpochRecord

FORMAT_VERSION = 1
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
EMA = "ema.safetensors"
_EXTENDABLE = {"steps", "constant"}  # schedules whose past does not depend on how many epochs follow

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, TrainingError)

Fingerprint = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A run after its last complete epoch.

    Args:
        weights: the model's state dict, on the CPU.
        momentum: momentum buffers by parameter name, on the CPU.
        config: as ``TrainingConfig``, with the precision that was used instead of ``"auto"``.
        fingerprint: what ``describe_parameters`` gave for the model.
        images: size of the training set.
        history: one record per complete epoch.
        regularizer: its state; None where there was none.
        ema: the moving average of the state dict, on the CPU; None where there was none.
        stream: who read the images where they come as a stream: ``processes`` and ``workers``; None where they can be
            read in any order.
    """

    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]
    config: TrainingConfig
    fingerprint: Fingerprint
    images: int
    history: tuple[EpochRecord, ...]
    regularizer: dict[str, Any] | None
    ema: dict[str, Tensor] | None = None
    stream: dict[str, int] | None = None


def describe_parameters(model: nn.Module) -> Fingerprint:
    """Describe a model's parameters: shape, and whether it is trained, by name."""
    return {
        name: {"shape": list(parameter.shape), "trainable": parameter.requires_grad}
        for name, parameter in model.named_parameters()
    }


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in ``folder``; cut off at any moment, the old or the new one can be loaded.

    Args:
        folder: the checkpoint's folder; parents are created.
        checkpoint: what to write.

    Raises:
        TrainingError: if the disk refuses, or the regulariser's state is not finite and JSON-able.
    """
    partial, previous = _sibling(folder, "partial"), _sibling(folder, "previous")
    with _clear_errors(folder), _undone(folder, partial, previous):
        _remove(partial)
        partial.mkdir(parents=True)
        _write(partial, checkpoint)
        if folder.exists():
            _remove(previous)
            folder.rename(previous)
        partial.rename(folder)
        _sync(folder.parent)
        _remove(previous)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the last complete checkpoint.

    Args:
        folder: as given to ``save_checkpoint``.

    Returns:
        The checkpoint, or None where none was completed yet.

    Raises:
        TrainingError: if what is there is corrupt, of another format version, or no checkpoint.
    """
    place = find_checkpoint(folder)
    if place is None:
        return None
    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        version = state["version"]
        if version == FORMAT_VERSION:
            return _parse(place, state)
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise TrainingError(f"checkpoint {folder} is corrupt ({reason}); delete it and train anew") from error
    raise TrainingError(
        f"checkpoint {folder} has format version {version!r}, this release reads {FORMAT_VERSION}; resume "
        f"with the release that wrote it, or train anew"
    )


def find_checkpoint(folder: Path) -> Path | None:
    """Say where the last complete checkpoint of ``folder`` lies.

    Returns:
        ``folder`` itself, or its predecessor if replacing it was cut off; None where there is none.

    Raises:
        TrainingError: if ``folder`` holds something else, which training would overwrite.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / STATE).exists():
            raise TrainingError(f"{folder} is no checkpoint (it has no {STATE}); give it a folder of its own")
        return folder
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; expected the folder of a checkpoint, or a new name")
    previous = _sibling(folder, "previous")
    return previous if (previous / STATE).exists() else None


def check_resumable(
    checkpoint: Checkpoint,
    config: TrainingConfig,
    model: nn.Module,
    images: int,
    regularized: bool,
    stream: dict[str, int] | None = None,
) -> None:
    """Make sure that a run would go on as it began.

    Args:
        checkpoint: where it stands.
        config: how it would go on, with its precision decided.
        model: what would be trained.
        images: size of the training set.
        regularized: whether there is a regulariser.
        stream: who would read the images where they come as a stream.

    Raises:
        TrainingError: naming the first field that differs.
    """
    _check_config(checkpoint.config, config)
    _check_model(checkpoint.fingerprint, describe_parameters(model))
    if checkpoint.images != images:
        raise _differs("the number of training images", checkpoint.images, images)
    if (checkpoint.regularizer is not None) != regularized:
        raise _differs("the use of a regularizer", checkpoint.regularizer is not None, regularized)
    if checkpoint.stream != stream:  # other readers would get the images in another order
        raise _differs("the reading of the stream", checkpoint.stream, stream)


def _check_config(saved: TrainingConfig, wanted: TrainingConfig) -> None:
    for field in fields(TrainingConfig):
        was, now = getattr(saved, field.name), getattr(wanted, field.name)
        if was == now or field.name in NO_EFFECT:
            continue
        if field.name == "epochs" and saved.schedule in _EXTENDABLE and now > was:
            continue
        raise _differs(field.name, was, now)


def _check_model(saved: Fingerprint, wanted: Fingerprint) -> None:
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        was, now = saved.get(name, "absent"), wanted.get(name, "absent")
        if was != now:
            raise _differs(f"parameter {name!r}", was, now)


def _differs(what: str, was: object, now: object) -> TrainingError:
    return TrainingError(
        f"cannot resume: {what} differs (checkpoint: {was}, now: {now}); resume as the run began, "
        f"or train anew"
    )


def _write(partial: Path, checkpoint: Checkpoint) -> None:
    # Clones: safetensors refuses channels_last tensors, and tied ones that share their memory.
    files = {WEIGHTS: checkpoint.weights, OPTIMIZER: checkpoint.momentum}
    if checkpoint.ema is not None:
        files[EMA] = checkpoint.ema
    for name, tensors in files.items():
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, partial / name)
    state = {
        "version": FORMAT_VERSION,
        "epoch": len(checkpoint.history),
        "config": asdict(checkpoint.config),
        "fingerprint": checkpoint.fingerprint,
        "images": checkpoint.images,
        "history": [asdict(record) for record in checkpoint.history],
        "regularizer": checkpoint.regularizer,
        "stream": checkpoint.stream,
        "sha256": {name: _digest(partial / name) for name in files},
    }
    (partial / STATE).write_text(json.dumps(state, indent=2, allow_nan=False), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _sync(path)


def _parse(place: Path, state: dict[str, Any]) -> Checkpoint:
    config = TrainingConfig(**state["config"])
    for name in (WEIGHTS, OPTIMIZER, *([EMA] if config.ema else [])):
        if _digest(place / name) != state["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    history = tuple(EpochRecord(**row) for row in state["history"])
    if state["epoch"] != len(history):
        raise ValueError(f"epoch {state['epoch']} but {len(history)} records")
    return Checkpoint(
        weights=load_file(place / WEIGHTS),
        momentum=load_file(place / OPTIMIZER),
        config=config,
        fingerprint=state["fingerprint"],
        images=state["images"],
        history=history,
        regularizer=state["regularizer"],
        ema=load_file(place / EMA) if config.ema else None,
        stream=state.get("stream"),  # checkpoints from before streams have none
    )


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write checkpoint {folder}: {error}; free space or choose another folder"
        ) from error
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"cannot write checkpoint {folder}: {error}; the regularizer's state must be finite numbers, "
            f"text, lists and dictionaries"
        ) from error


@contextmanager
def _undone(folder: Path, partial: Path, previous: Path) -> Iterator[None]:
    """Leave the previous checkpoint, and nothing else, where an exception (also Ctrl-C) stops the writing."""
    try:
        yield
    except BaseException:
        _undo(folder, partial, previous)
        raise


def _undo(folder: Path, partial: Path, previous: Path) -> None:
    _remove(partial)
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.parent / f".{folder.name}.{kind}"


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can flush a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
