"""The dense model of an artifact: build it, check that the artifact fits it, narrow it, fill it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from dscore_plugin.artifact.structure import CUSTOM, FACTORS, STRUCTURE, WEIGHTS, first_line, short
from dscore_plugin.errors import ArtifactError, did_you_mean

_FACTORIES = frozenset(
    {torch.arange, torch.empty, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros}
)


class Stored(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str


class _Bounded(TorchFunctionMode):
    """Stops a builder whose network is more than a thousand times as large as the pruned one."""

    def __init__(self, pruned: float) -> None:
        super().__init__()
        self.left = 1000 * pruned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _FACTORIES:
            self.left -= made.numel()
            if self.left < 0:
                raise ArtifactError(
                    "it is more than a thousand times as large as the pruned network; "
                    "build it yourself and call load_pruned(folder, model=dense)"
                )
        return made


def build_dense(
    architecture: str, model_args: dict[str, Any], pruned: float = math.inf, device: str = "meta"
) -> nn.Module:
    """Build the dense architecture, by default without memory for its weights, leaving the seeds alone.

    Args:
        architecture: name in timm's registry.
        model_args: arguments of its builder.
        pruned: how many numbers the pruned network holds; a dense one a thousand times as large is refused.
        device: where to build; builders that cannot compute on meta are run on the CPU.
    """
    import timm

    from dscore_plugin.models import create_model  # registers the networks of this package, too

    if not re.fullmatch(r"\w+", architecture) or not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models())
        raise ArtifactError(
            f"architecture {architecture!r} is unknown to timm{near}; "
            "import the module that registers it, or give the dense model: load_pruned(folder, model=dense)"
        )
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device), _Bounded(pruned):
            return create_model(architecture, **model_args)
    except Exception as error:  # whatever a builder makes of arguments from a file
        too_large = isinstance(error, ArtifactError)
        if device == "meta" and not too_large:  # some builders compute with tensors, which meta cannot
            return build_dense(architecture, model_args, pruned, "cpu")
        raise ArtifactError(
            f"{architecture!r} cannot be built with {short(model_args)}: {first_line(error)}"
        ) from error


def check_ties(tied: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    """Refuse tensors that are said to be another one and are stored, or whose other one is not."""
    for name, kept in tied.items():
        if name in stored or kept not in stored:
            raise ArtifactError(f"tensor {name!r} is said to be {kept!r}, which {WEIGHTS} contradicts")


def check_fit(model: nn.Module, structure: dict[str, Any], stored: Mapping[str, Stored]) -> None:
    """Refuse an artifact that does not describe a narrower form of ``model``; touches nothing."""
    state, modules = model.state_dict(), dict(all_modules(model))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    kept = {name for name, entry in structure["buffers"].items() if entry["stored"]}
    check_names(state.keys() | kept, stored.keys(), f"{structure['architecture']!r}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    caches = {name for name in structure["buffers"] if _may_be_cache(name, structure, modules)}
    for name in [*(set(structure["frozen"]) - parameters), *(structure["buffers"].keys() - buffers - caches)]:
        raise ArtifactError(f"{name!r} of {STRUCTURE} is not in the dense model")
    for name, entry in structure["modules"].items():
        _check_module(name, entry, modules.get(name))
    for name, tensor in (buffers | state).items():
        if name in stored:
            _check_tensor(name, stored[name], tensor, structure)
    check_layers(model, structure["modules"], {name: found.shape for name, found in stored.items()})


def _may_be_cache(name: str, structure: dict[str, Any], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a buffer may be one that a custom model's forward() makes: stored, with a place that is free."""
    if structure["architecture"] != CUSTOM or not structure["buffers"][name]["stored"]:
        return False
    module_name, leaf = split_name(name)
    module = modules.get(module_name)
    if module is None or not leaf.isidentifier():
        return False
    return leaf in module._buffers or not hasattr(module, leaf)


def check_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    """Refuse names of tensors that are not those expected of ``what``."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        faults = {"missing": missing, "unexpected": extra}
        listed = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise ArtifactError(f"the tensors are not those of {what}; {listed}")


def _check_module(name: str, entry: dict[str, Any], module: nn.Module | None) -> None:
    if module is None:
        raise ArtifactError(f"module {name!r} of {STRUCTURE} is not in the dense model")
    if type(module).__name__ != entry["class"]:
        raise ArtifactError(
            f"module {name!r} is a {type(module).__name__}; {STRUCTURE} expects {entry['class']}"
        )
    for key, value in entry["attributes"].items():
        now = plain_value(vars(module).get(key))
        same_kind = type(now) is type(value) or (key in FACTORS and isinstance(now, (int, float)))
        if not same_kind or (isinstance(now, list) and len(now) != len(value)):
            raise ArtifactError(f"module {name!r}: {key} = {short(value)} cannot take the place of {now!r}")


def _check_tensor(name: str, found: Stored, dense: Tensor, structure: dict[str, Any]) -> None:
    module_name, leaf = split_name(name)
    if name in structure["buffers"]:
        expected = structure["buffers"][name]["shape"]
    else:
        changed = structure["modules"].get(module_name, {"shapes": {}})["shapes"]
        expected = changed.get(leaf, list(dense.shape))
    if list(found.shape) != expected:
        raise ArtifactError(f"tensor {name!r} has shape {list(found.shape)}; expected {expected}")
    if found.dtype.startswith(("F", "BF", "C")) != (dense.is_floating_point() or dense.is_complex()):
        raise ArtifactError(f"tensor {name!r} has dtype {found.dtype}; expected one like {dense.dtype}")


def check_layers(
    model: nn.Module, entries: Mapping[str, dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse layers whose attributes (of ``entries``, else their own) contradict their tensors' shapes."""
    for name, module in all_modules(model):
        attributes = vars(module) | entries.get(name, {"attributes": {}})["attributes"]
        for leaf, expected in _expected_shapes(module, attributes).items():
            found = shapes.get(f"{name}.{leaf}" if name else leaf)
            if found is not None and tuple(found) != expected:
                raise ArtifactError(
                    f"{leaf} of {type(module).__name__} {name!r} has shape {tuple(found)}; "
                    f"its attributes say {expected}"
                )
        for whole, parts in _divisions(module):
            if attributes[whole] % attributes[parts]:
                raise ArtifactError(
                    f"{type(module).__name__} {name!r} has {attributes[whole]} {whole} "
                    f"in {attributes[parts]} {parts}; expected a multiple"
                )


def _divisions(module: nn.Module) -> list[tuple[str, str]]:
    """Which attributes of a layer are divided by which."""
    if isinstance(module, _ConvNd):
        return [("in_channels", "groups"), ("out_channels", "groups")]
    return [("num_channels", "num_groups")] if isinstance(module, nn.GroupNorm) else []


def _expected_shapes(module: nn.Module, a: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that a layer's tensors have, by its attributes ``a``; empty for types that are not known."""
    if isinstance(module, _ConvNd):
        rows, columns = a["out_channels"], a["in_channels"]
        if module.transposed:
            rows, columns = columns, rows
        weight = (rows, columns // a["groups"], *module.kernel_size)
        return {"weight": weight, "bias": (a["out_channels"],)}
    if isinstance(module, nn.Linear):
        return {"weight": (a["out_features"], a["in_features"]), "bias": (a["out_features"],)}
    if isinstance(module, _NormBase):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (a["num_features"],))
    if isinstance(module, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (a["num_channels"],))
    if isinstance(module, nn.LayerNorm):
        return dict.fromkeys(("weight", "bias"), tuple(a["normalized_shape"]))
    if isinstance(module, nn.Embedding):
        return {"weight": (a["num_embeddings"], a["embedding_dim"])}
    if isinstance(module, nn.PReLU):
        return {"weight": (a["num_parameters"],)}
    if isinstance(module, nn.MultiheadAttention):
        return {"in_proj_weight": (3 * a["embed_dim"], a["embed_dim"]), "in_proj_bias": (3 * a["embed_dim"],)}
    return {}


def narrow(model: nn.Module, entries: Mapping[str, dict[str, Any]], stored: Mapping[str, Stored]) -> None:
    """Give the layers the pruned widths, and tensors of the pruned shapes without content."""
    for name, entry in entries.items():
        module = model.get_submodule(name)
        for key, value in entry["attributes"].items():
            setattr(module, key, _like(getattr(module, key), value))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.shape != stored[name].shape:
            narrow = torch.empty(stored[name].shape, dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            _put(model, name, nn.Parameter(narrow, tensor.requires_grad) if is_parameter else narrow)


def fill(model: nn.Module, structure: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Assign the stored tensors; those that were one tensor under several names become one again."""
    tied, frozen = structure["tied"], set(structure["frozen"])
    state = {name: tensors[tied.get(name, name)] for name in model.state_dict()}
    try:
        model.load_state_dict(state, strict=True, assign=True)
        names = model.state_dict(keep_vars=True)
        for name, kept in tied.items():
            if isinstance(names.get(name), nn.Parameter) and isinstance(names.get(kept), nn.Parameter):
                _put(model, name, names[kept])  # buffers are one already
        for name, parameter in model.named_parameters():  # the new ones; a rollback brings the old ones back
            parameter.requires_grad_(name not in frozen)
    except RuntimeError as error:
        raise ArtifactError(f"{WEIGHTS} does not fit: {' '.join(str(error).split())}") from error


def rebuild_buffers(model: nn.Module, structure: dict[str, Any]) -> None:
    """Compute again what the builder computes and nobody saves: position indices, frequencies, filters."""
    for prefix, module in model.named_modules():
        initialise = getattr(module, "init_non_persistent_buffers", None)
        if callable(initialise):  # timm's protocol; it fills tensors that have to be there
            for leaf, buffer in module.named_buffers(recurse=False):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if buffer.is_meta:
                    shape = structure["buffers"].get(name, {}).get("shape", buffer.shape)
                    module._buffers[leaf] = torch.zeros(shape, dtype=buffer.dtype)
            initialise()
    left = list(_meta_tensors(model))
    if left:
        built = build_dense(structure["architecture"], structure["model_args"], device="cpu")
        for name in left:
            _put(model, name, _get(built, name))


def _meta_tensors(model: nn.Module) -> Iterator[str]:
    """Names of the tensors without content, plain attributes included."""
    for prefix, module in model.named_modules():
        for leaf, value in {**module._buffers, **vars(module)}.items():
            if isinstance(value, Tensor) and value.is_meta:
                yield f"{prefix}.{leaf}" if prefix else leaf


def finish_buffers(model: nn.Module, structure: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the stored buffers in place, those that only forward() makes, too; check shapes, restore dtypes."""
    tied = structure["tied"]
    for name, entry in structure["buffers"].items():
        buffer = tensors[tied.get(name, name)] if entry["stored"] else model.get_buffer(name)
        if list(buffer.shape) != entry["shape"]:
            raise ArtifactError(
                f"buffer {name!r} is rebuilt with shape {list(buffer.shape)}; expected {entry['shape']}"
            )
        try:
            buffer = buffer.to(getattr(torch, entry["dtype"]))
        except RuntimeError as error:  # torch has dtypes that nothing can be turned into
            told = f"buffer {name!r} cannot become {entry['dtype']}: {first_line(error)}"
            raise ArtifactError(told) from error
        module_name, leaf = split_name(name)
        module = model.get_submodule(module_name)
        if leaf not in module._buffers:
            module.register_buffer(leaf, None, persistent=False)
        setattr(module, leaf, buffer)


def all_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by all their names."""
    return model.named_modules(remove_duplicate=False)


def split_name(name: str) -> tuple[str, str]:
    """``"layer1.0.conv1.weight"`` is ``"weight"`` of ``"layer1.0.conv1"``."""
    module_name, _, leaf = name.rpartition(".")
    return module_name, leaf


def _get(model: nn.Module, name: str) -> Any:
    module_name, leaf = split_name(name)
    return getattr(model.get_submodule(module_name), leaf)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    module_name, leaf = split_name(name)
    setattr(model.get_submodule(module_name), leaf, value)


def _some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more


def plain_value(value: Any) -> bool | int | float | str | list[int] | None:
    """A value as JSON holds it; None if it is of no plain kind."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):  # numpy's integers, too
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (tuple, list)) and all(isinstance(v, Integral) for v in value):
        return [int(v) for v in value]
    if isinstance(value, list) and all(isinstance(v, dict) and "num_chs" in v for v in value):
        return [int(v["num_chs"]) for v in value]  # timm's feature_info
    return None


def _like(now: Any, value: Any) -> Any:
    """Put a plain value into the form that an attribute has."""
    if isinstance(now, list) and now and isinstance(now[0], dict):
        return [info | {"num_chs": width} for info, width in zip(now, value, strict=True)]
    return tuple(value) if isinstance(now, tuple) else value
