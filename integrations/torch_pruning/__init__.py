"""Torch-Pruning: DepGraph's groups, the importance classes and the removal of channels."""

from __future__ import annotations


def register() -> None:
    """Make the importance classes reachable as ``torch_pruning.importance.DScoreImportance`` and so on."""
    from torch_pruning import importance as torch_pruning_importance

    from dscore_plugin.integrations.torch_pruning import discrimination_aware, importance, synaptic

    for name in importance.__all__:
        setattr(torch_pruning_importance, name, getattr(importance, name))
    torch_pruning_importance.DiscriminationAwareImportance = (
        discrimination_aware.DiscriminationAwareImportance
    )
    torch_pruning_importance.SynapticStrengthImportance = synaptic.SynapticStrengthImportance
