"""Paper-faithful pruning criteria for Torch-Pruning, NNI and timm.

The names below are imported when they are first used: ``import dscore_plugin`` alone loads none of the tools.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dscore_plugin.artifact import load_pruned, save_pruned
    from dscore_plugin.hub import create_model, push_to_hub
    from dscore_plugin.inference import load_for_inference
    from dscore_plugin.integrations.torch_pruning.discrimination_aware import (
        DiscriminationAwareImportance,
        DiscriminationAwarePruner,
    )
    from dscore_plugin.integrations.torch_pruning.importance import (
        DependencyAwareImportance,
        DScoreImportance,
        DStepGMImportance,
        DStepImportance,
    )
    from dscore_plugin.integrations.torch_pruning.synaptic import SynapticStrengthImportance
    from dscore_plugin.plan import Plan
    from dscore_plugin.planning import plan_pruning, prune
    from dscore_plugin.registry import CriterionInfo, get_criterion, list_criteria
    from dscore_plugin.selection.sensitivity import Sensitivity, sensitivity_analysis

__version__ = "0.1.0"

# A checkout keeps integrations/ beside this folder, an installed package has it inside. Python started in a checkout's
# root finds this folder before the installed package; then the integrations beside it belong to it.
_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "integrations")):
    __path__.append(os.path.dirname(_here))

_IMPORTANCE = "dscore_plugin.integrations.torch_pruning.importance"
_HOME = {
    "CriterionInfo": "dscore_plugin.registry",
    "DScoreImportance": _IMPORTANCE,
    "DependencyAwareImportance": _IMPORTANCE,
    "DStepGMImportance": _IMPORTANCE,
    "DStepImportance": _IMPORTANCE,
    "Plan": "dscore_plugin.plan",
    "DiscriminationAwareImportance": "dscore_plugin.integrations.torch_pruning.discrimination_aware",
    "DiscriminationAwarePruner": "dscore_plugin.integrations.torch_pruning.discrimination_aware",
    "create_model": "dscore_plugin.hub",
    "get_criterion": "dscore_plugin.registry",
    "list_criteria": "dscore_plugin.registry",
    "load_for_inference": "dscore_plugin.inference",
    "load_pruned": "dscore_plugin.artifact",
    "plan_pruning": "dscore_plugin.planning",
    "prune": "dscore_plugin.planning",
    "push_to_hub": "dscore_plugin.hub",
    "save_pruned": "dscore_plugin.artifact",
    "Sensitivity": "dscore_plugin.selection.sensitivity",
    "SynapticStrengthImportance": "dscore_plugin.integrations.torch_pruning.synaptic",
    "sensitivity_analysis": "dscore_plugin.selection.sensitivity",
}

__all__ = [
    "CriterionInfo",
    "DependencyAwareImportance",
    "DScoreImportance",
    "DStepGMImportance",
    "DStepImportance",
    "DiscriminationAwareImportance",
    "DiscriminationAwarePruner",
    "Plan",
    "Sensitivity",
    "SynapticStrengthImportance",
    "create_model",
    "get_criterion",
    "list_criteria",
    "load_for_inference",
    "load_pruned",
    "plan_pruning",
    "prune",
    "push_to_hub",
    "save_pruned",
    "sensitivity_analysis",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
