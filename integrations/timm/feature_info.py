"""The widths of their feature maps that timm's models tell in ``feature_info``, kept true when channels leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Shapes = dict[str, torch.Size]


@contextmanager
def watched(model: nn.Module) -> Iterator[Shapes]:
    """Note the shapes of a model's feature maps in the forward passes to come.

    Args:
        model: of timm's, with ``feature_info`` that names layers; for any other nothing is noted.

    Yields:
        From the names of layers to the shapes of their outputs, filled as they run.
    """
    shapes: Shapes = {}
    layers = dict(model.named_modules())
    with ExitStack() as stack:
        for name in {info["module"] for info in _infos(model)} & layers.keys():
            stack.callback(layers[name].register_forward_hook(partial(_note, shapes, name)).remove)
        yield shapes


def follow_widths(
    model: nn.Module, before: Mapping[str, torch.Size], after: Mapping[str, torch.Size]
) -> None:
    """Bring ``num_chs`` up to date.

    Args:
        model: after the removal.
        before: what :func:`watched` noted of the same inputs before it.
        after: and after it.
    """
    infos = [info | _changed(info, before, after) for info in _infos(model)]
    if infos:
        model.feature_info = infos  # type: ignore[assignment]  # a new list: copies of the model share the old one


def _infos(model: nn.Module) -> list[dict[str, Any]]:
    """Return the entries if there are some and all name a layer; ``features_only`` keeps another object there."""
    infos = getattr(model, "feature_info", None)
    known = isinstance(infos, list) and all(
        isinstance(i, dict) and {"num_chs", "module"} <= i.keys() for i in infos
    )
    return infos if known else []  # type: ignore[return-value]


def _changed(
    info: Mapping[str, Any], before: Mapping[str, torch.Size], after: Mapping[str, torch.Size]
) -> Any:
    """Return the new width: the one size of the map that is another now and was this width."""
    shapes = zip(before.get(info["module"], ()), after.get(info["module"], ()), strict=False)
    widths = [now for then, now in shapes if then != now and then == info["num_chs"]]
    return {"num_chs": widths[0]} if len(widths) == 1 else {}


def _note(shapes: Shapes, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        shapes[name] = output.shape
