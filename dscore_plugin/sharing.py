"""Parameters that several layers share: what leaves one of them would leave the others."""

from __future__ import annotations

from torch import nn


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Find the parameters that a network holds under several names.

    A module that is called or registered several times has its parameters once.

    Returns:
        For every name of such a parameter, another of its names.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
    return {
        name: next(other for other in several if other != name)
        for several in names.values()
        if len(several) > 1
        for name in several
    }
