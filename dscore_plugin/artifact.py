"""Save and load a pruned model: safetensors for the weights, JSON for the structure, never pickle.

A folder holds ``model.safetensors``, ``pruned_structure.json`` (how the model differs from the dense
architecture), ``metrics.json`` and ``report.md``. Loading builds the dense architecture without memory for
its weights, narrows its layers as the JSON says, checks every shape and assigns the weights, without tracing.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from dscore_plugin.errors import ArtifactError, did_you_mean
from dscore_plugin.files import atomic_folder, ensure_writable, read_json, write_json, write_text

FORMAT_VERSION = 1
WEIGHTS, STRUCTURE = "model.safetensors", "pruned_structure.json"
METRICS, REPORT = "metrics.json", "report.md"
CUSTOM = "custom"
STAGES = ("dense", "pruned", "recalibrated", "finetuned")

# What pruning may change in a module: widths of torch.nn's layers, then of timm's.
_TORCH_WIDTHS = """
in_channels out_channels groups in_features out_features in1_features in2_features num_features num_channels
num_groups normalized_shape num_embeddings embedding_dim num_parameters embed_dim kdim vdim num_heads head_dim
hidden_size input_size proj_size
"""
_TIMM_WIDTHS = """
 attention_dim attn_dim channel_splits channels d d_inner dh dim dim_conv3 dim_head dim_head_qk dim_head_v
dim_k dim_out dim_out_qk dim_out_v dim_qk dim_untouched dim_v embed_dims expand_chs group head_hidden_size
head_splits heads hidden_dim hidden_features in_chans in_chs in_dim in_planes inc inplanes input_split
key_attn_dim key_dim kv_dim mhca_out_chs mhsa_out_chs num_1x1_c num_classes num_keys num_kv_groups
num_kv_heads num_out_features o_proj_inpdim out_chs out_dim out_planes pdim planes pool_dim qk_dim shape
split_indexes split_indices val_attn_dim val_dim value_dim width widths
"""
_SWITCHES = frozenset({"fused_attn"})  # the two forms of attention scale and round differently
_FACTORS = frozenset({"scale"})  # of attention and of weight-standardised convolutions: follows a width
_ATTRIBUTES = frozenset((_TORCH_WIDTHS + _TIMM_WIDTHS).split()) | _SWITCHES | _FACTORS
_LARGEST = 2**24

# What may differ from the dense architecture without a trace in the outputs of eval mode.
_TRAINING_ONLY = re.compile(r"training|p|momentum|inplace|grad_checkpointing|.*drop.*")
# Arguments of a builder that make it read files, the network or a cache.
_REFUSED_ARGUMENTS = re.compile(r"(pretrained|checkpoint|cache|custom_load|file|url|hf_).*|name|device|dtype")

_STRUCTURE_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "architecture": str,
    "model_args": dict,
    "input_shape": (list, type(None)),
    "modules": dict,
    "frozen": list,
    "tied": dict,
    "buffers": dict,
    "criterion": (str, type(None)),
    "plan": (dict, type(None)),
    "pruning_history": (list, type(None)),
    "numbers": (dict, type(None)),
    "versions": dict,
}


def save_pruned(
    model: nn.Module,
    folder: str | Path,
    *,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    input_shape: Iterable[int] | None = None,
    plan: dict[str, Any] | None = None,
    history: list[Any] | None = None,
    criterion: str | None = None,
    numbers: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    report: str | Callable[[Path], str] | None = None,
    force: bool = False,
) -> Path:
    """Save a pruned model as a folder that :func:`load_pruned` turns into the same model again.

    The model is not modified. The folder appears complete or not at all.

    Args:
        model: the pruned model, on any device, in any memory format.
        folder: where to; must not exist unless ``force``.
        architecture: name in timm's registry of the dense model; ``"custom"`` for a model that timm cannot
            build. None asks the model, and falls back to ``"custom"``.
        model_args: arguments of ``timm.create_model`` that build the dense model, plain values. None takes
            those that timm noted in the model.
        input_shape: shape of one input, ``(C, H, W)``.
        plan: the plan that was applied, plain values: ratios, removed channels.
        history: Torch-Pruning's ``pruning_history()``.
        criterion: by which criterion the channels were chosen.
        numbers: ``{"before": {"macs", "params"}, "after": {...}}``.
        metrics: the content of ``metrics.json``; stages that are not there become null.
        report: the content of ``report.md``, or a function that writes it when the other files lie in the
            folder it is given (so that it can state their sizes); None writes a plain one.
        force: replace an existing folder, atomically.

    Returns:
        The folder.

    Raises:
        ArtifactError: if the folder exists and ``force`` is not given, or if the model could not be loaded
            again: it differs from its dense architecture in more than widths, or a layer contradicts itself.
    """
    folder = Path(folder)
    ensure_writable(folder, force)
    state = _state(model)
    _check_layers(model, {}, {name: tuple(tensor.shape) for name, tensor in state.items()})
    architecture, model_args, dense = _find_dense(model, state, architecture, model_args)
    buffers = _describe_buffers(model, state, dense)
    state |= {name: model.get_buffer(name).detach() for name in buffers if buffers[name]["stored"]}
    tied = _shared_storage(state)
    structure = {
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "model_args": model_args,
        "input_shape": None if input_shape is None else list(input_shape),
        "modules": _describe_modules(model, state, dense),
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "tied": tied,
        "buffers": buffers,
        "criterion": criterion,
        "plan": plan,
        "pruning_history": history,
        "numbers": numbers,
        "versions": _versions(),
    }
    _validate_structure(structure, str(folder))
    with atomic_folder(folder, force) as partial:
        _write_weights({name: state[name] for name in state if name not in tied}, partial / WEIGHTS)
        write_json(partial / STRUCTURE, structure)
        write_json(partial / METRICS, dict.fromkeys(STAGES) | (metrics or {}))
        write_text(partial / REPORT, _report(report, partial, structure, metrics or {}))
    return folder


def load_pruned(
    folder: str | Path, model: nn.Module | None = None, *, device: str | torch.device = "cpu"
) -> nn.Module:
    """Load a folder that :func:`save_pruned` wrote. Nothing in it is executed.

    Args:
        folder: the artifact.
        model: the dense model, for an artifact of a custom model. It is modified and returned: its layers
            become narrower and its parameters are replaced (so make the optimizer afterwards). Where an error
            is raised about the artifact not fitting, it has not been touched.
        device: where the model shall live.

    Returns:
        The pruned model in eval mode, with the saved dtypes, parameters as trainable as they were saved.

    Raises:
        ArtifactError: if a file is missing, truncated, tampered with, reached through a link that leaves the
            folder, or of an unknown format version; if the artifact does not fit the dense model.
    """
    folder = Path(folder)
    structure = read_structure(folder)
    weights = _file_in(folder, WEIGHTS)
    if model is None and structure["architecture"] == CUSTOM:
        raise ArtifactError(
            f"{folder} holds a custom model; build the dense one and call load_pruned(folder, model=dense)"
        )
    stored = _read_header(weights)
    _check_ties(structure["tied"], stored)
    stored |= {name: stored[kept] for name, kept in structure["tied"].items()}
    pruned = model if model is not None else _build_dense(structure["architecture"], structure["model_args"])
    _check_fit(pruned, structure, stored)
    _narrow(pruned, structure["modules"], stored)
    tensors = _read_tensors(weights)
    _fill(pruned, structure, tensors)
    if model is None:
        _rebuild_buffers(pruned, structure)
    _finish_buffers(pruned, structure["buffers"], tensors)
    return pruned.to(device).eval()


def read_structure(folder: str | Path) -> dict[str, Any]:
    """Read and validate ``pruned_structure.json``.

    Args:
        folder: the artifact.

    Returns:
        Its content; the keys are those of the file.

    Raises:
        ArtifactError: if it is missing, reached through a link that leaves the folder, no valid JSON, of an
            unknown format version, or has a field that is missing, unknown or out of range.
    """
    path = _file_in(Path(folder), STRUCTURE)
    structure = read_json(path)
    _validate_structure(structure, str(path))
    return structure


# --- saving: what the model is, and how it differs from the dense one ---


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, if every entry is a dense tensor that lives somewhere."""
    state = model.state_dict()
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


def _find_dense(
    model: nn.Module, state: Mapping[str, Tensor], architecture: str | None, model_args: dict[str, Any] | None
) -> tuple[str, dict[str, Any], nn.Module | None]:
    """Name and build (on the meta device) the architecture that was pruned; None if the model is custom."""
    name = architecture or _own_architecture(model)
    if name is None or name == CUSTOM:
        return CUSTOM, model_args or {}, None
    arguments = model_args if model_args is not None else _own_arguments(model)
    try:
        _check_arguments(arguments, "model_args")
        arguments = json.loads(json.dumps(arguments))  # build with what the file will hold: lists, not tuples
        dense = _build_dense(name, arguments)
        _check_names(dense.state_dict().keys(), state.keys(), f"{name!r} with {arguments}")
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
    arguments = {key: value for key, value in noted.items() if not _REFUSED_ARGUMENTS.fullmatch(key)}
    num_classes = getattr(model, "num_classes", None)
    return arguments | ({"num_classes": num_classes} if isinstance(num_classes, int) else {})


def _describe_modules(
    model: nn.Module, state: Mapping[str, Tensor], dense: nn.Module | None
) -> dict[str, dict[str, Any]]:
    """What differs from the dense model, by module; without a dense model, what every layer is."""
    dense_shapes = {} if dense is None else {name: t.shape for name, t in dense.state_dict().items()}
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, tensor in state.items():
        if name not in dense_shapes or dense_shapes[name] != tensor.shape:
            module_name, leaf = _split(name)
            shapes.setdefault(module_name, {})[leaf] = list(tensor.shape)
    if dense is None:
        attributes = {name: _widths(module) for name, module in _modules(model)}
    else:
        attributes = _changed_attributes(model, dense)
    return {
        name: {
            "class": type(module).__name__,
            "attributes": attributes.get(name, {}),
            "shapes": shapes.get(name, {}),
        }
        for name, module in _modules(model)
        if attributes.get(name) or shapes.get(name)
    }


def _widths(module: nn.Module) -> dict[str, Any]:
    """All attributes of a module with parameters that pruning may change."""
    if next(module.parameters(), None) is None:
        return {}
    found = {key: _plain(value) for key, value in vars(module).items() if key in _ATTRIBUTES}
    return {key: value for key, value in found.items() if _is_attribute(key, value)}


def _changed_attributes(model: nn.Module, dense: nn.Module) -> dict[str, dict[str, Any]]:
    """The attributes by which the modules differ from the dense ones.

    Raises:
        ArtifactError: if something differs that pruning does not change, so that it would be lost.
    """
    twins = dict(_modules(dense))
    ours = dict(_modules(model))
    for name in sorted(ours.keys() ^ twins.keys()):
        if not _is_inert((ours | twins)[name]):
            raise _lost(name, "is in only one of the model and its dense architecture")
    return {name: _differences(name, module, twins[name]) for name, module in ours.items() if name in twins}


def _differences(name: str, module: nn.Module, twin: nn.Module) -> dict[str, Any]:
    if type(module).__name__ != type(twin).__name__:
        if _is_inert(module) and _is_inert(twin):
            return {}
        raise _lost(name, f"is a {type(module).__name__}, in the dense one a {type(twin).__name__}")
    if _forward(module) is not _forward(twin):
        raise _lost(name, "has a replaced forward()")
    changed = {}
    for key, value in vars(twin).items():
        before, now = _plain(value), _plain(vars(module).get(key))
        if key.startswith("_") or before is None or now == before:
            continue
        if key in _ATTRIBUTES and now is not None:
            changed[key] = now
        elif not _TRAINING_ONLY.fullmatch(key):
            raise _lost(name, f"has {key} = {vars(module).get(key)!r}, in the dense one {value!r}")
    return changed


def _forward(module: nn.Module) -> Any:
    """The function that runs the module, be it its class's or one put in its place."""
    return getattr(module.forward, "__func__", module.forward)


def _lost(name: str, difference: str) -> ArtifactError:
    return ArtifactError(
        f"module {name!r} {difference}, which the structure file cannot express; "
        "pass the model_args that build it so, or architecture='custom'"
    )


def _is_inert(module: nn.Module) -> bool:
    """Whether a module does nothing in eval mode."""
    return isinstance(module, nn.Identity) or type(module).__name__.startswith("Drop")


def _plain(value: Any) -> bool | int | float | str | list[int] | None:
    """A value as JSON holds it; None if it is of no plain kind."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):  # numpy's integers, too
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (tuple, list)) and all(isinstance(v, Integral) for v in value):
        return [int(v) for v in value]
    return None


def _describe_buffers(
    model: nn.Module, state: Mapping[str, Tensor], dense: nn.Module | None
) -> dict[str, dict[str, Any]]:
    """The buffers that are not in the state dict: how they look, and whether they have to be stored.

    The builder makes them again, unless pruning has changed their shape, or nobody knows the builder.
    """
    dense_buffers = None if dense is None else dict(dense.named_buffers(remove_duplicate=False))
    described = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in state or (dense_buffers is not None and name not in dense_buffers):
            continue  # one that the builder does not make is a cache that forward() fills
        stored = dense_buffers is None or dense_buffers[name].shape != buffer.shape
        described[name] = {
            "shape": list(buffer.shape),
            "dtype": str(buffer.dtype).removeprefix("torch."),
            "stored": stored,
        }
    return described


def _shared_storage(state: Mapping[str, Tensor]) -> dict[str, str]:
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


def _write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    tensors = {name: _detached_copy(tensor) for name, tensor in state.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ArtifactError(f"safetensors cannot store the weights: {_first_line(error)}") from error


def _detached_copy(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, row by row (not channels_last), in a storage of its own."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _report(
    report: str | Callable[[Path], str] | None,
    folder: Path,
    structure: dict[str, Any],
    metrics: dict[str, Any],
) -> str:
    if isinstance(report, str):
        return report
    if report is not None:
        return report(folder)
    from dscore_plugin.report.numbers import file_sizes
    from dscore_plugin.report.tables import report_markdown

    return report_markdown(structure, metrics, sizes=file_sizes(folder))


def _versions() -> dict[str, str]:
    packages = ("dscore-plugin", "torch", "torch-pruning", "timm", "safetensors")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


# --- the structure file: what may stand in it ---


def _validate_structure(structure: Any, where: str) -> None:
    """Refuse a structure of another version, with unknown or missing fields, or with values out of range."""
    if not isinstance(structure, dict):
        raise ArtifactError(f"{where} holds a {type(structure).__name__}; expected an object")
    if structure.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{where} has format version {structure.get('format_version')!r}; this version of dscore-plugin "
            f"reads version {FORMAT_VERSION}: install the one that wrote it"
        )
    for field in sorted(structure.keys() ^ _STRUCTURE_FIELDS.keys()):
        raise ArtifactError(f"{where}: field {field!r} is {'unknown' if field in structure else 'missing'}")
    for field, kind in _STRUCTURE_FIELDS.items():
        if not isinstance(structure[field], kind):
            raise ArtifactError(f"{where}: field {field!r} is a {type(structure[field]).__name__}")
    if structure["input_shape"] is not None and not _is_shape(structure["input_shape"]):
        raise ArtifactError(f"{where}: input_shape {structure['input_shape']} is no list of sizes")
    if not all(isinstance(name, str) for name in [*structure["frozen"], *structure["tied"].values()]):
        raise ArtifactError(f"{where}: 'frozen' and 'tied' hold something that is no name")
    _check_arguments(structure["model_args"], f"{where}: model_args")
    for name, entry in structure["modules"].items():
        _validate_module(entry, f"{where}: module {name!r}")
    for name, entry in structure["buffers"].items():
        _validate_buffer(entry, f"{where}: buffer {name!r}")


def _validate_module(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"class", "attributes", "shapes"}:
        raise ArtifactError(f"{where}: expected exactly class, attributes and shapes")
    if not isinstance(entry["class"], str) or not all(
        isinstance(entry[field], dict) for field in ("attributes", "shapes")
    ):
        raise ArtifactError(f"{where}: expected a class name and two objects")
    for key, value in entry["attributes"].items():
        if key not in _ATTRIBUTES:
            raise ArtifactError(f"{where}: attribute {key!r} is not one that pruning changes; refused")
        if not _is_attribute(key, value):
            raise ArtifactError(f"{where}: {key} = {_short(value)} is out of range; expected plain sizes")
    for leaf, shape in entry["shapes"].items():
        if not _is_shape(shape):
            raise ArtifactError(f"{where}: shape {_short(shape)} of {leaf!r} is no list of sizes")


def _validate_buffer(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"shape", "dtype", "stored"}:
        raise ArtifactError(f"{where}: expected exactly shape, dtype and stored")
    dtype = getattr(torch, entry["dtype"], None) if isinstance(entry["dtype"], str) else None
    if not _is_shape(entry["shape"]) or not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"{where}: {_short(entry)} is no shape and dtype")
    if not isinstance(entry["stored"], bool):
        raise ArtifactError(f"{where}: 'stored' is {_short(entry['stored'])}; expected true or false")


def _check_arguments(arguments: dict[str, Any], where: str) -> None:
    """Refuse arguments of a builder that are not plain, out of range, or that make it read a file."""
    for key, value in arguments.items():
        if not isinstance(key, str) or _REFUSED_ARGUMENTS.fullmatch(key):
            raise ArtifactError(f"{where}: argument {key!r} is refused; weights come from {WEIGHTS} alone")
        _check_argument(value, f"{where}: {key}")


def _check_argument(value: Any, where: str) -> None:
    if isinstance(value, dict):
        _check_arguments(value, where)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_argument(item, where)
    elif isinstance(value, (int, float)):
        if not abs(value) <= _LARGEST:  # NaN, too
            raise ArtifactError(f"{where} = {_short(value)} is out of range")
    elif not isinstance(value, (str, type(None))):
        raise ArtifactError(f"{where} is a {type(value).__name__}; expected a plain value")


def _is_attribute(key: str, value: Any) -> bool:
    """Whether a value is one that the attribute of this name may take."""
    if key in _SWITCHES:
        return isinstance(value, bool)
    if key in _FACTORS and isinstance(value, float):
        return 0 < value < math.inf
    return _is_size(value, least=1) or (bool(value) and _is_shape(value))


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= 64 and all(_is_size(size) for size in value)


def _is_size(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


# --- loading: does the artifact fit, and if so, make the model that it describes ---


def _file_in(folder: Path, name: str) -> Path:
    """The real path of a file in the artifact, if it is there and no link leads out of the folder."""
    if not folder.is_dir():
        raise ArtifactError(f"there is no artifact at {folder}; expected a folder that save_pruned() wrote")
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; expected a complete folder that save_pruned() wrote")
    if path.resolve().parent != folder.resolve():
        raise ArtifactError(f"{path} is a link that leaves the folder; put the file itself there")
    return path


class _Stored(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str


def _read_header(path: Path) -> dict[str, _Stored]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
        return {name: _Stored(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the weights into memory of their own: what becomes of the file later must not matter."""
    with _opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, no dict


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} is truncated or no safetensors file ({_first_line(error)}); save it again"
        ) from error


def _build_dense(architecture: str, model_args: dict[str, Any], device: str = "meta") -> nn.Module:
    """Build the dense architecture, by default without memory for its weights, leaving the seeds alone."""
    import timm

    from dscore_plugin.models import create_model  # registers the networks of this package, too

    if not re.fullmatch(r"\w+", architecture) or not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models())
        raise ArtifactError(
            f"architecture {architecture!r} is unknown to timm{near}; "
            "import the module that registers it, or give the dense model: load_pruned(folder, model=dense)"
        )
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return create_model(architecture, **model_args)
    except Exception as error:  # whatever a builder makes of arguments from a file
        if device == "meta":  # some builders compute with tensors, which meta cannot
            return _build_dense(architecture, model_args, "cpu")
        raise ArtifactError(
            f"{architecture!r} cannot be built with {_short(model_args)}: {_first_line(error)}"
        ) from error


def _check_ties(tied: Mapping[str, str], stored: Mapping[str, _Stored]) -> None:
    for name, kept in tied.items():
        if name in stored or kept not in stored:
            raise ArtifactError(f"tensor {name!r} is said to be {kept!r}, which {WEIGHTS} contradicts")


def _check_fit(model: nn.Module, structure: dict[str, Any], stored: Mapping[str, _Stored]) -> None:
    """Refuse an artifact that does not describe a narrower form of ``model``; touches nothing."""
    state, modules = model.state_dict(), dict(_modules(model))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    kept = {name for name, entry in structure["buffers"].items() if entry["stored"]}
    _check_names(state.keys() | kept, stored.keys(), f"{structure['architecture']!r}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in [*(set(structure["frozen"]) - parameters), *(structure["buffers"].keys() - buffers.keys())]:
        raise ArtifactError(f"{name!r} of {STRUCTURE} is not in the dense model")
    for name, entry in structure["modules"].items():
        _check_module(name, entry, modules.get(name))
    for name, tensor in (buffers | state).items():
        if name in stored:
            _check_tensor(name, stored[name], tensor, structure)
    _check_layers(model, structure["modules"], {name: found.shape for name, found in stored.items()})


def _check_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
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
        now = _plain(vars(module).get(key))
        same_kind = type(now) is type(value) or (key in _FACTORS and isinstance(now, (int, float)))
        if not same_kind or (isinstance(now, list) and len(now) != len(value)):
            raise ArtifactError(f"module {name!r}: {key} = {_short(value)} cannot take the place of {now!r}")


def _check_tensor(name: str, found: _Stored, dense: Tensor, structure: dict[str, Any]) -> None:
    module_name, leaf = _split(name)
    if name in structure["buffers"]:
        expected = structure["buffers"][name]["shape"]
    else:
        changed = structure["modules"].get(module_name, {"shapes": {}})["shapes"]
        expected = changed.get(leaf, list(dense.shape))
    if list(found.shape) != expected:
        raise ArtifactError(f"tensor {name!r} has shape {list(found.shape)}; expected {expected}")
    if found.dtype.startswith(("F", "BF", "C")) != (dense.is_floating_point() or dense.is_complex()):
        raise ArtifactError(f"tensor {name!r} has dtype {found.dtype}; expected one like {dense.dtype}")


def _check_layers(
    model: nn.Module, entries: Mapping[str, dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse layers whose attributes (of ``entries``, else their own) contradict their tensors' shapes."""
    for name, module in _modules(model):
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


def _narrow(model: nn.Module, entries: Mapping[str, dict[str, Any]], stored: Mapping[str, _Stored]) -> None:
    """Give the layers the pruned widths, and tensors of the pruned shapes without content."""
    for name, entry in entries.items():
        module = model.get_submodule(name)
        for key, value in entry["attributes"].items():
            now = getattr(module, key)
            setattr(module, key, tuple(value) if isinstance(now, tuple) else value)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.shape != stored[name].shape:
            narrow = torch.empty(stored[name].shape, dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            _put(model, name, nn.Parameter(narrow, tensor.requires_grad) if is_parameter else narrow)


def _fill(model: nn.Module, structure: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Assign the stored tensors; those that were one tensor under several names become one again."""
    tied, frozen = structure["tied"], set(structure["frozen"])
    state = {name: tensors[tied.get(name, name)] for name in model.state_dict()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{WEIGHTS} does not fit: {' '.join(str(error).split())}") from error
    names = model.state_dict(keep_vars=True)
    for name, kept in tied.items():
        if name in names and kept in names:
            _put(model, name, names[kept])


def _rebuild_buffers(model: nn.Module, structure: dict[str, Any]) -> None:
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
        built = _build_dense(structure["architecture"], structure["model_args"], "cpu")
        for name in left:
            _put(model, name, _get(built, name))


def _meta_tensors(model: nn.Module) -> Iterator[str]:
    """Names of the tensors without content, plain attributes included."""
    for prefix, module in model.named_modules():
        for leaf, value in {**module._buffers, **vars(module)}.items():
            if isinstance(value, Tensor) and value.is_meta:
                yield f"{prefix}.{leaf}" if prefix else leaf


def _finish_buffers(
    model: nn.Module, entries: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    """Put the stored buffers in place, give all their dtypes, and check their shapes."""
    for name, entry in entries.items():
        buffer = tensors[name] if entry["stored"] else model.get_buffer(name)
        if list(buffer.shape) != entry["shape"]:
            raise ArtifactError(
                f"buffer {name!r} is rebuilt with shape {list(buffer.shape)}; expected {entry['shape']}"
            )
        _put(model, name, buffer.to(getattr(torch, entry["dtype"])))


# --- small help ---


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by all their names."""
    return model.named_modules(remove_duplicate=False)


def _split(name: str) -> tuple[str, str]:
    """``"layer1.0.conv1.weight"`` is ``"weight"`` of ``"layer1.0.conv1"``."""
    module_name, _, leaf = name.rpartition(".")
    return module_name, leaf


def _get(model: nn.Module, name: str) -> Any:
    module_name, leaf = _split(name)
    return getattr(model.get_submodule(module_name), leaf)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    module_name, leaf = _split(name)
    setattr(model.get_submodule(module_name), leaf, value)


def _some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
