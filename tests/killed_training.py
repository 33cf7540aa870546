"""What test_sparse_training.py runs in a process of its own: a sparse training that is killed in its third epoch."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from dscore_plugin.jobs import Source
from dscore_plugin.sparse_training import paper_schedule
from dscore_plugin.train_jobs import SparsityGoal, TrainJob
from dscore_plugin.training.sparsity import DependencyAwareRegularizer
from dscore_plugin.training_runs import run_train


def job(out: Path, *, resume: bool = False) -> TrainJob:
    sparse, retraining = paper_schedule(5, precision="float32")
    goal = SparsityGoal(0.4, sparse, delta=0.01)
    return TrainJob(Source(data="digits", device="cpu"), retraining, out, goal, resume=resume)


def kill_in_epoch(epoch: int) -> None:
    """Kill this process at the end of an epoch (from 0), before its checkpoint is written."""
    whole = DependencyAwareRegularizer.end_epoch

    def end_epoch(self: DependencyAwareRegularizer, model: Any, now: int) -> dict[str, float]:
        if now == epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, model, now)

    DependencyAwareRegularizer.end_epoch = end_epoch  # type: ignore[method-assign]


if __name__ == "__main__":
    kill_in_epoch(2)
    run_train(job(Path(sys.argv[1])))
