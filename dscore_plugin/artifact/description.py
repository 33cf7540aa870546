"""What a pruned model is, and how it differs from the dense one: the saving half of an artifact's structure."""

from __future__ import annotations

import json
import platform
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.artifact.fit import all_modules, build_dense, check_names, plain_value, split_name
from dscore_plugin.artifact.structure import (
    ATTRIBUTES,
    CUSTOM,
    REFUSED_ARGUMENTS,
    check_arguments,
    is_attribute,
    short,
)
from dscore_plugin.artifact.surgery import Surgery, remove_layers, without_masks
from dscore_plugin.errors import ArtifactError
from dscore_plugin.surgery.kernel_masks import dense_class

# What may differ from the dense architecture without a trace in the outputs of eval mode.
_TRAINING_ONLY = re.compile(r"training|p|momentum|inplace|grad_checkpointing|.*drop.*")
_OPAQUE = object()  # stands for tensors, caches and whatever else cannot be compared
_CODE = (CodeType, BuiltinFunctionType)


def read_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without masks of kernels, if every entry is a dense tensor that lives somewhere."""
    state = without_masks(model, model.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArtifactError(
                f"{name!r} is a {type(value).__name__}; only tensors are saved without pickle"
            )
        if value.is_meta or value.layout is not torch.strided or value.is_quantized:
            raise ArtifactError(
                f"{name!r} is on the meta device, sparse or quantised; expected a dense tensor"
            )
    return state


def find_dense(
    model: nn.Module,
    state: Mapping[str, Tensor],
    surgery: Surgery,
    architecture: str | None,
    model_args: dict[str, Any] | None,
) -> tuple[str, dict[str, Any], nn.Module | None]:
    """Name and build (on the meta device) the architecture that was pruned, without the layers that the model has lost.

    The model is None if it is custom.
    """
    name = architecture or _own_architecture(model)
    if name is None or name == CUSTOM:
        return CUSTOM, model_args or {}, None
    arguments = model_args if model_args is not None else _own_arguments(model)
    try:
        check_arguments(arguments, "model_args")
        arguments = json.loads(json.dumps(arguments))  # build with what the file will hold: lists, not tuples
        dense = build_dense(name, arguments)
        remove_layers(dense, surgery)
        check_names(dense.state_dict().keys(), state.keys(), f"{name!r} with {arguments}")
    except ArtifactError:
        if architecture is None:
            return CUSTOM, {}, None
        raise
    return name, arguments, dense


def _own_architecture(model: nn.Module) -> str | None:
    """The name under which timm built the model, as far as the model knows it."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return config.get("architecture") if isinstance(config, dict) else None


def _own_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments that timm noted in the model, and its present number of classes."""
    noted = getattr(model, "_model_args", {})
    arguments = {key: value for key, value in noted.items() if not REFUSED_ARGUMENTS.fullmatch(key)}
    num_classes = getattr(model, "num_classes", None)
    return arguments | ({"num_classes": num_classes} if isinstance(num_classes, int) else {})


def describe_modules(
    model: nn.Module, state: Mapping[str, Tensor], dense: nn.Module | None
) -> dict[str, dict[str, Any]]:
    """What differs from the dense model, by module; without a dense model, what every layer is."""
    dense_shapes = {} if dense is None else {name: t.shape for name, t in dense.state_dict().items()}
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, tensor in state.items():
        if name not in dense_shapes or dense_shapes[name] != tensor.shape:
            module_name, leaf = split_name(name)
            shapes.setdefault(module_name, {})[leaf] = list(tensor.shape)
    if dense is None:
        attributes = {name: _widths(module) for name, module in all_modules(model)}
    else:
        attributes = _changed_attributes(model, dense)
    return {
        name: {
            "class": dense_class(module).__name__,
            "attributes": attributes.get(name, {}),
            "shapes": shapes.get(name, {}),
        }
        for name, module in all_modules(model)
        if attributes.get(name) or shapes.get(name)
    }


def _widths(module: nn.Module) -> dict[str, Any]:
    """All attributes of a module that pruning may change."""
    found = {key: plain_value(value) for key, value in vars(module).items() if key in ATTRIBUTES}
    return {key: value for key, value in found.items() if is_attribute(key, value)}


def _changed_attributes(model: nn.Module, dense: nn.Module) -> dict[str, dict[str, Any]]:
    """The attributes by which the modules differ from the dense ones.

    Raises:
        ArtifactError: if something differs that pruning does not change, so that it would be lost.
    """
    twins = dict(all_modules(dense))
    ours = dict(all_modules(model))
    for name in sorted(ours.keys() ^ twins.keys()):
        if not _is_inert((ours | twins)[name]):
            raise _lost(name, "is in only one of the model and its dense architecture")
    return {name: _differences(name, module, twins[name]) for name, module in ours.items() if name in twins}


def _differences(name: str, module: nn.Module, twin: nn.Module) -> dict[str, Any]:
    if dense_class(module).__name__ != type(twin).__name__:
        if _is_inert(module) and _is_inert(twin):
            return {}
        raise _lost(name, f"is a {type(module).__name__}, in the dense one a {type(twin).__name__}")
    if _number_of_hooks(module) != _number_of_hooks(twin):
        warnings.warn(
            f"the forward hooks of module {name!r} are not saved; if they change what it computes, "
            "the loaded network computes something else",
            stacklevel=2,
        )
    changed = {}
    for key in _keys(module, twin):
        before, now = _content(twin, key), _content(module, key)
        if now == before or before is _OPAQUE or (before is None and now is _OPAQUE):
            continue
        if isinstance(before, _CODE):
            raise _lost(name, f"has a replaced {key}()")
        if key in ATTRIBUTES and before is not None and is_attribute(key, now):
            changed[key] = now
        elif not _TRAINING_ONLY.fullmatch(key):
            ours, theirs = short(_attribute(module, key)), short(_attribute(twin, key))
            raise _lost(name, f"has {key} = {ours}, in the dense one {theirs}")
    return changed


def _number_of_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _keys(module: nn.Module, twin: nn.Module) -> list[str]:
    """The attributes of the dense module, and what of its class the module overrides."""
    public = {key for key in vars(twin) if not key.startswith("_")}
    kind = dense_class(module)
    overridden = {key for key in vars(module) if hasattr(kind, key) and not hasattr(nn.Module, key)}
    return sorted(public | overridden | {"forward"})


def _attribute(module: nn.Module, key: str) -> Any:
    """An attribute of a module, be it its own or its class's; masks of kernels do not count."""
    return vars(module).get(key, getattr(dense_class(module), key, None))


def _content(module: nn.Module, key: str) -> Any:
    """What can be compared of an attribute: a plain value, None, the code of a function; else _OPAQUE."""
    value = _attribute(module, key)
    value = getattr(value, "__func__", value)
    if value is None or isinstance(value, BuiltinFunctionType):
        return value
    if isinstance(value, FunctionType):
        return value.__code__
    plain = plain_value(value)
    return _OPAQUE if plain is None else plain


def _lost(name: str, difference: str) -> ArtifactError:
    return ArtifactError(
        f"module {name!r} {difference}, which the structure file cannot express; "
        "pass the model_args that build it so, or architecture='custom'"
    )


def _is_inert(module: nn.Module) -> bool:
    """Whether a module does nothing in eval mode."""
    return isinstance(module, nn.Identity) or type(module).__name__.startswith("Drop")


def describe_buffers(
    model: nn.Module, state: Mapping[str, Tensor], dense: nn.Module | None
) -> dict[str, dict[str, Any]]:
    """The buffers that are not in the state dict: how they look, and whether they have to be stored.

    The builder makes them again, unless pruning has changed their shape, or nobody knows the builder. Those that only
    forward() makes are left to it, unless nobody knows the builder.
    """
    dense_buffers = None if dense is None else dict(dense.named_buffers(remove_duplicate=False))
    described = {}
    buffers = without_masks(model, dict(model.named_buffers(remove_duplicate=False)))
    for name, buffer in buffers.items():
        if name in state or (dense_buffers is not None and name not in dense_buffers):
            continue
        stored = dense_buffers is None or dense_buffers[name].shape != buffer.shape
        described[name] = {
            "shape": list(buffer.shape),
            "dtype": str(buffer.dtype).removeprefix("torch."),
            "stored": stored,
        }
    return described


def shared_storage(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one, with the name of that one."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        if tensor.numel():
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            kept = first.setdefault(key, name)
            if kept != name:
                tied[name] = kept
    return tied


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a pruned model depends on."""
    packages = ("dscore-plugin", "torch", "torch-pruning", "timm", "safetensors")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
