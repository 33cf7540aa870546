"""The history of a run in TensorBoard or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available

from dscore_plugin.errors import TrainingError
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.history import EpochRecord

PROJECT = "dscore-plugin"  # at Weights & Biases
_AVAILABLE = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
_INSTALL = {"tensorboard": "'dscore-plugin[track]'", "wandb": "wandb"}


class Log(Protocol):
    """Takes the record of an epoch."""

    def __call__(self, record: EpochRecord) -> None:
        """Show it."""
        ...


def log_folder(config: TrainingConfig, checkpoint: Path | None, logs: Path | None) -> Path | None:
    """Say where a run writes its logs.

    Args:
        config: the run.
        checkpoint: the folder of its checkpoint.
        logs: where the user wants them; None is beside the checkpoint, in ``CHECKPOINT.logs``.

    Returns:
        The folder; None where nothing is tracked.

    Raises:
        TrainingError: if there is no place for them, or the tracker is not installed.
    """
    if config.track is None:
        return None
    require_tracker(config)
    if logs is None and checkpoint is None:
        raise TrainingError(f"track={config.track!r} needs a folder; pass logs=FOLDER or checkpoint=FOLDER")
    return Path(logs).resolve() if logs else checkpoint and checkpoint.with_name(checkpoint.name + ".logs")


def require_tracker(config: TrainingConfig) -> None:
    """Make sure that the tracker of a run is installed, if it has one; raise TrainingError if it is not."""
    if config.track is not None and not _AVAILABLE[config.track]():
        raise TrainingError(
            f"track={config.track!r} needs a package that is not installed; pip install {_INSTALL[config.track]}"
        )


@contextmanager
def tracked(
    accelerator: Accelerator, config: TrainingConfig, folder: Path | None, done: int
) -> Iterator[Log]:
    """Open a run's tracker, if it has one, and close it.

    Args:
        accelerator: made with ``log_with=config.track`` and ``project_dir=folder.parent``.
        config: the run; shown beside its curves.
        folder: of the logs; None tracks nothing.
        done: epochs before; what was logged of later ones (by a run that was cut off) is replaced.

    Yields:
        What takes the records.
    """
    if folder is None:
        yield lambda record: None
        return
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    settings = None if done else _plain(asdict(config))
    if config.track == "tensorboard":
        options: dict[str, Any] = {"purge_step": done + 1}
        accelerator.init_trackers(folder.name, settings, {"tensorboard": options})
    else:
        options = {"name": folder.name, "dir": str(folder), "resume": "allow"}
        if accelerator.is_main_process:
            options["id"] = _run_id(folder, anew=done == 0)
        accelerator.init_trackers(PROJECT, settings, {"wandb": options})
    try:
        yield lambda record: accelerator.log(_numbers(record), step=record.epoch)
    finally:
        for tracker in accelerator.trackers:  # end_training() would end the group of processes, too
            tracker.finish()


def _numbers(record: EpochRecord) -> dict[str, float]:
    own = {name: value for name, value in asdict(record).items() if isinstance(value, float)}
    return own | {f"regularizer/{name}": value for name, value in record.regularizer.items()}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Make settings that a tracker takes: numbers and text."""
    return {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()}


def _run_id(folder: Path, *, anew: bool) -> str:
    """Return the name by which Weights & Biases knows the run, so that a resumed one goes on there."""
    note = folder / "wandb_run_id.txt"
    if anew or not note.exists():
        note.write_text(secrets.token_hex(8), encoding="utf-8")
    return note.read_text(encoding="utf-8")
