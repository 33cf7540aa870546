"""Networks by name: timm's, and those of the papers, which importing this package registers with timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dscore_plugin.errors import ModelError, did_you_mean
from dscore_plugin.models import (
    cifar_cnn_small,
    cifar_densenet,
    cifar_preresnet,
    cifar_resnet,
    cifar_resnet_wide,
    cifar_vgg,
    digits,
)

__all__ = [
    "cifar_cnn_small",
    "cifar_densenet",
    "cifar_preresnet",
    "cifar_resnet",
    "cifar_resnet_wide",
    "cifar_vgg",
    "create_model",
    "digits",
    "load_weights",
]

# They name files or addresses to load from, and not always without pickle.
_REFUSED_ARGUMENTS = frozenset({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"})
_MISMATCHES_SHOWN = 3


def create_model(
    name: str, *, num_classes: int | None = None, in_chans: int | None = None, **model_args: Any
) -> nn.Module:
    """Build a network that timm's registry knows, this package's own among them.

    Args:
        name: e.g. ``"cifar_resnet56"`` or ``"resnet50"``; a tag is allowed (``"resnet50.a1_in1k"``), an
            address on the Hub or a path is not.
        num_classes: outputs; the network's default if None, the embedding if 0.
        in_chans: channels of the images; the network's default if None.
        **model_args: handed to ``timm.create_model``.

    Returns:
        The network in training mode, with fresh weights unless ``pretrained=True`` is among ``model_args``.

    Raises:
        ModelError: if the name is not in the registry, or the network cannot be built with these arguments.
    """
    if not timm.is_model(name):
        raise ModelError(
            f"model {name!r} is unknown{did_you_mean(name, timm.list_models()) or ';'} "
            "expected a name that timm.list_models() gives"
        )
    refused = sorted(_REFUSED_ARGUMENTS & model_args.keys())
    if refused:
        raise ModelError(f"model argument {refused[0]!r} is not accepted; load weights with load_weights()")
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **model_args)
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise ModelError(
            f"model {name!r} cannot be built with these arguments: {_first_line(error)}"
        ) from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a network, strictly; on any error the network is left as it was.

    Args:
        model: the network, built as the one whose weights were saved.
        path: a ``.safetensors`` file. Formats that rest on pickle are refused.

    Raises:
        ModelError: if the file is missing, corrupt or no safetensors, if its tensors are those of another
            architecture, or if they hold NaN or infinity.
    """
    path = Path(path)
    weights = _read_safetensors(path)
    not_finite = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if not_finite:
        raise ModelError(
            f"weights {path} hold NaN or infinity in {_some(not_finite)}; train again, or give other weights"
        )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        model.load_state_dict(before, strict=True)
        raise ModelError(
            f"weights {path} are of another architecture: {_some(_mismatches(before, weights))}; "
            "give the model that they were saved from"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"weights {path} are missing; expected a .safetensors file there")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"weights {path} are corrupt or no safetensors file ({_first_line(error)}); "
            "save them with safetensors.torch.save_file (pickled checkpoints are not loaded)"
        ) from error


def _mismatches(expected: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """Say, tensor by tensor, where two state dicts differ; shapes first, as they say most."""
    shapes = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected.keys() & given.keys()
        if given[key].shape != expected[key].shape
    ]
    missing = [f"{key} is missing" for key in expected.keys() - given.keys()]
    unexpected = [f"{key} is unexpected" for key in given.keys() - expected.keys()]
    return sorted(shapes) + sorted(missing) + sorted(unexpected)


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:_MISMATCHES_SHOWN])
    rest = len(items) - _MISMATCHES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
