"""NNI 3.0: criteria as pruners, dependency groups from DepGraph, and a removal that works on current PyTorch.

There is a class for every criterion that scores (``DScorePruner``, ``DStepPruner``, ...), made from the registry when
it is first asked for; :class:`CriterionPruner` reads the criterion from the config list instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dscore_plugin.errors import DScoreError

if TYPE_CHECKING:
    from dscore_plugin.integrations.nni.dependency import removable_layers, set_dependency_groups
    from dscore_plugin.integrations.nni.pruners import CriterionPruner
    from dscore_plugin.integrations.nni.removal import plan_from_masks, speedup


class NniMissingError(DScoreError, ImportError):
    """NNI is not installed."""


try:
    import nni.compression.pruning  # noqa: F401
except ImportError as error:
    raise NniMissingError(
        f'NNI cannot be imported ({error}); install it with: pip install "dscore-plugin[nni]"'
    ) from error

_HOME = {
    "CriterionPruner": "pruners",
    "plan_from_masks": "removal",
    "removable_layers": "dependency",
    "set_dependency_groups": "dependency",
    "speedup": "removal",
}

__all__ = [
    "CriterionPruner",
    "NniMissingError",
    "plan_from_masks",
    "removable_layers",
    "set_dependency_groups",
    "speedup",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        from dscore_plugin.integrations.nni.pruners import named_pruners

        found = named_pruners().get(name)
        if found is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    from dscore_plugin.integrations.nni.pruners import named_pruners

    return sorted({*globals(), *__all__, *named_pruners()})
