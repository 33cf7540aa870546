"""Torch-Pruning's own sparse training, with the strength that our controller chooses."""

from __future__ import annotations

from typing import Any

from torch import nn

from dscore_plugin.errors import TrainingError
from dscore_plugin.training.sparsity import Penalty


def pruner_penalty(pruner: Any) -> Penalty:
    """Press channels towards zero with a pruner's ``regularize``, at a strength given from outside.

    Pass it to :class:`~dscore_plugin.training.sparsity.DependencyAwareRegularizer` as ``penalty``: the sparsity is
    then measured as in the paper and lambda steered as in the paper, but what is penalised, and how, is the
    pruner's (``BNScalePruner``: every batch-norm scale that is not ignored; ``GroupNormPruner``: whole groups, in
    proportion to their weights, so that the useful range of lambda is another).

    Args:
        pruner: one of Torch-Pruning's with ``reg`` and ``regularize(model)``, built on the model that is trained.

    Returns:
        A function of the model and lambda that adds the penalty to the gradients.

    Raises:
        TrainingError: if the pruner does not train towards sparsity.
    """
    if not (hasattr(pruner, "reg") and callable(getattr(pruner, "regularize", None))):
        raise TrainingError(
            f"{type(pruner).__name__} has no reg and regularize(); expected BNScalePruner or GroupNormPruner"
        )

    def penalise(model: nn.Module, strength: float) -> None:
        pruner.reg = strength
        pruner.regularize(model)

    return penalise
