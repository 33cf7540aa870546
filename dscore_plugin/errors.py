"""What can go wrong, each with a one-line message: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DScoreError(Exception):
    """Base of every error that this package raises on bad input; the command line exits with code 2."""


class CriterionError(DScoreError):
    """A criterion is unknown, or its input (weights, options, data) cannot be scored."""


class ModelError(DScoreError):
    """A model is unknown, cannot be traced, or its weights are missing, corrupt or of another architecture."""


class DataError(DScoreError):
    """A data set is unknown, lies in no known layout, or is empty."""


class BudgetError(DScoreError):
    """A ratio or a compute budget is out of range or cannot be reached."""


class PlanError(DScoreError):
    """A plan does not fit the model, or names channels that are not there."""


class ArtifactError(DScoreError):
    """An artifact folder is missing, truncated, tampered with or of an unknown version, or exists already."""


class TrainingError(DScoreError):
    """A training configuration or a checkpoint cannot be used."""


class BenchError(DScoreError):
    """A benchmark's protocol or its results cannot be read, or do not fit each other."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Name the nearest known spellings, as the end of a sentence; case and hyphens do not count.

    Args:
        name: what was asked for.
        choices: what is known.

    Returns:
        ``"; did you mean 'd_score'?"``, or an empty string where nothing is near.
    """
    known = {_plain(choice): choice for choice in choices}
    near = [known[n] for n in difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
