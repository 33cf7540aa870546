"""What all runs have in common: where their news go, their folder of checkpoints, the numbers of a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscore_plugin.costs import count
from dscore_plugin.datasets import ImageData
from dscore_plugin.errors import ArtifactError
from dscore_plugin.files import read_json, write_json
from dscore_plugin.report.numbers import latency
from dscore_plugin.selection.processes import Processes
from dscore_plugin.training.config import NO_EFFECT
from dscore_plugin.training.evaluation import evaluate
from dscore_plugin.training.progress import Progress

Say = Callable[[str], None]


def measure(model: nn.Module, data: ImageData, progress: Progress) -> dict[str, Any]:
    """Return ``top1`` on the test images in percent, ``macs``, ``params`` and ``latency_ms``."""
    example = torch.zeros(1, *data.input_shape, device=next(model.parameters()).device)
    macs, params = count(model, (example,))
    top1 = evaluate(model, data.test, progress=progress).top1
    return {"top1": top1, "macs": macs, "params": params, "latency_ms": latency(model, data.input_shape)}


def open_work(work: Path, identity: dict[str, Any], say: Say, *, force: bool, resume: bool) -> None:
    """Make the folder of checkpoints, or go on with it; of several processes the first does.

    Args:
        work: the folder.
        identity: what an interrupted run and its continuation must have in common.
        say: takes a line of news.
        force: start over if there is an unfinished run that ``resume`` cannot or shall not go on with.
        resume: go on with it.

    Raises:
        ArtifactError: if there is an unfinished run and neither is given, or it is another one, or it left no
            note of what it was.
    """
    Processes().once(lambda: _open_work(work, identity, say, force=force, resume=resume))


def _open_work(work: Path, identity: dict[str, Any], say: Say, *, force: bool, resume: bool) -> None:
    note, now = work / "job.json", json.loads(json.dumps(identity))  # tuples are lists there
    if note.exists() and resume:
        before = read_json(note)
        different = [key for key in now if not _agree(before.get(key), now[key])]
        if not different:
            say(f"continuing the run in {work}")
            return
        if not force:
            raise ArtifactError(
                f"{work} holds another run ({', '.join(different)} differ); use the same options, or start over with "
                "--force"
            )
    if work.exists() and any(work.iterdir()):  # a run killed at once leaves an empty folder
        if not force and resume:
            raise ArtifactError(f"{work} does not say which run it holds; start over with --force")
        if not force:
            raise ArtifactError(
                f"{work} holds an unfinished run; go on with --resume, or start over with --force"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(note, now)


def _agree(before: Any, now: Any) -> bool:
    """Compare two identities; older ones also hold the fields of a training that change no weight."""
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() - now.keys() <= set(NO_EFFECT) and all(
            key in before and _agree(before[key], value) for key, value in now.items()
        )
    return bool(before == now)
