"""Training runs: a dense network, or one on its way to sparsity."""

from __future__ import annotations

import shutil
from typing import Any

from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

from dscore_plugin.datasets import ImageData
from dscore_plugin.files import atomic_folder, write_json
from dscore_plugin.runs import Say, measure, open_work
from dscore_plugin.sparse_training import run_sparse
from dscore_plugin.synaptic_training import run_synaptic
from dscore_plugin.train_jobs import SparsityGoal, TrainJob, train_phase
from dscore_plugin.training.progress import NoProgress, Progress
from dscore_plugin.training.synaptic import SynapticGoal


def run_train(job: TrainJob, progress: Progress | None = None, say: Say = lambda _: None) -> dict[str, Any]:
    """Train a network, dense or towards sparsity, and save it.

    A dense run leaves ``model.safetensors``, ``history.json`` and ``metrics.json``; the others leave an artifact for
    :func:`dscore_plugin.load_pruned`: see :func:`~dscore_plugin.sparse_training.run_sparse` and
    :func:`~dscore_plugin.synaptic_training.run_synaptic`.

    Args:
        job: what to do.
        progress: shows bars.
        say: takes a line of news now and then.

    Returns:
        The content of ``metrics.json``; a dense run's has ``dense``: ``top1`` in percent, ``macs``, ``params`` and
        ``latency_ms``.

    Raises:
        DScoreError: on bad input, before any work starts; or if the work fails, with what was finished kept.
    """
    if isinstance(job.sparsity, SynapticGoal):
        return run_synaptic(job, progress, say)
    if isinstance(job.sparsity, SparsityGoal):
        return run_sparse(job, progress, say)
    job.check()
    data = job.source.load_images()
    model = job.source.build(data)
    open_work(job.work, job.identity(), say, force=job.force, resume=job.resume)
    return _train_dense(job, model, data, progress or NoProgress(), say)


def _train_dense(
    job: TrainJob, model: nn.Module, data: ImageData, progress: Progress, say: Say
) -> dict[str, Any]:
    result = train_phase(job, model, data, "dense", job.training, progress)
    metrics = {"dense": measure(model, data, progress)}
    if PartialState().is_main_process:
        with atomic_folder(job.out, job.force) as folder:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            write_json(folder / "history.json", result.rows())
            write_json(folder / "metrics.json", metrics)
        shutil.rmtree(job.work)
        say(f"saved {job.out}: model.safetensors, history.json, metrics.json")
    return metrics
