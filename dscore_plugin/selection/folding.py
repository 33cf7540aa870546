"""Fold batch norms into the convolutions before them: the same function with fewer passes over memory."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dscore_plugin.errors import ModelError
from dscore_plugin.selection.replay import Uses, replaced_forwards

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # exactly these: a subclass may treat its weight before use
_TOLERANCE = 1e-4  # of the largest output


def fold_batchnorm(model: nn.Module, example: Tensor) -> nn.Module:
    """Fold every batch norm that follows a convolution, and nothing else does, into that convolution.

    All modules keep their names: a folded batch norm becomes an identity, or the activation that it held.

    Args:
        model: left as it is.
        example: a small batch on the model's device, to see what follows what.

    Returns:
        A folded copy in eval mode.

    Raises:
        ModelError: if the copy's output differs by more than 1e-4 of the largest output.
    """
    folded = copy.deepcopy(model).eval()
    with torch.no_grad():
        before = folded(example)
        for convolution, norm in _neighbours(folded, example):
            _put(folded, convolution, _fused(folded.get_submodule(convolution), folded.get_submodule(norm)))
            _put(folded, norm, _rest(folded.get_submodule(norm)))
        difference = (folded(example) - before).abs().max()
    if not difference <= _TOLERANCE * before.abs().max():
        raise ModelError(
            f"folding batch norms changes the output of {type(model).__name__} by {float(difference):.3g}; "
            "measure without fold_batchnorm"
        )
    return folded


def _fused(convolution: nn.Module, norm: nn.Module) -> nn.Module:
    assert isinstance(convolution, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    assert isinstance(norm, _BatchNorm)
    return fuse_conv_bn_eval(convolution, norm)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    around, _, child = name.rpartition(".")
    setattr(model.get_submodule(around), child, module)


def _rest(norm: nn.Module) -> nn.Module:
    """Return what is left of a batch norm: the dropout and the activation of timm's, or nothing."""
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children) if children else nn.Identity()


@dataclass
class _Meeting:
    """A batch norm reads a convolution's output.

    Attributes:
        convolution: what made the tensor.
        norm: what reads it.
        output: the tensor.
        earlier: how many operations had read it before.
        own: how many had when the norm was done.
    """

    convolution: nn.Module
    norm: nn.Module
    output: Tensor
    earlier: int
    own: int = 0


def _neighbours(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Return the names of convolutions and batch norms where the norm alone reads what the convolution gives."""
    meetings: list[_Meeting] = []
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # by id; holding the tensors keeps the ids unique
    calls: Counter[nn.Module] = Counter()
    uses = Uses()

    def making(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[module] += 1
            output = forward(*args, **kwargs)
            uses.forget(output)
            made[id(output)] = (module, output)
            return output

        return call

    def reading(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        @wraps(forward)
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[module] += 1
            if id(x) not in made:
                return forward(x, *args, **kwargs)
            meeting = _Meeting(made[id(x)][0], module, x, uses.of(x))
            meetings.append(meeting)
            output = forward(x, *args, **kwargs)
            meeting.own = uses.of(x)
            return output

        return call

    forwards = {m: making(m) for m in model.modules() if type(m) in _CONVOLUTIONS}
    forwards |= {m: reading(m) for m in model.modules() if _is_foldable(m)}
    with replaced_forwards(forwards), uses:
        model(example)
    names = {module: name for name, module in model.named_modules()}
    return [
        (names[m.convolution], names[m.norm])
        for m in meetings
        if m.earlier == 0 and uses.of(m.output) == m.own and calls[m.convolution] == calls[m.norm] == 1
    ]


def _is_foldable(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None
