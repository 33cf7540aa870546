"""What may stand in an artifact's ``pruned_structure.json``; anything else is refused before it can do harm."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from dscore_plugin.errors import ArtifactError

FORMAT_VERSION = 1
WEIGHTS, STRUCTURE = "model.safetensors", "pruned_structure.json"
CUSTOM = "custom"

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
split_indexes split_indices val_attn_dim val_dim value_dim width widths feature_info
"""
_SWITCHES = frozenset({"fused_attn"})  # the two forms of attention scale and round differently
FACTORS = frozenset({"scale"})  # of attention and of weight-standardised convolutions: follows a width
ATTRIBUTES = frozenset((_TORCH_WIDTHS + _TIMM_WIDTHS).split()) | _SWITCHES | FACTORS
_LARGEST = 2**24
# Arguments of a builder that make it read files, the network or a cache.
REFUSED_ARGUMENTS = re.compile(r"(pretrained|checkpoint|cache|custom_load|file|url|hf_).*|name|device|dtype")
_STRUCTURE_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "architecture": str,
    "model_args": dict,
    "input_shape": (list, type(None)),
    "modules": dict,
    "frozen": list,
    "tied": dict,
    "buffers": dict,
    "surgery": list,
    "criterion": (str, type(None)),
    "plan": (dict, type(None)),
    "pruning_history": (list, type(None)),
    "numbers": (dict, type(None)),
    "versions": dict,
}


def validate_structure(structure: Any, where: str) -> None:
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
    if structure["input_shape"] is not None and not is_shape(structure["input_shape"]):
        raise ArtifactError(f"{where}: input_shape {structure['input_shape']} is no list of sizes")
    if not all(isinstance(name, str) for name in [*structure["frozen"], *structure["tied"].values()]):
        raise ArtifactError(f"{where}: 'frozen' and 'tied' hold something that is no name")
    check_arguments(structure["model_args"], f"{where}: model_args")
    for name, entry in structure["modules"].items():
        _validate_module(entry, f"{where}: module {name!r}")
    for name, entry in structure["buffers"].items():
        _validate_buffer(entry, f"{where}: buffer {name!r}")
    _validate_surgery(structure["surgery"], f"{where}: surgery")


def _validate_module(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"class", "attributes", "shapes"}:
        raise ArtifactError(f"{where}: expected exactly class, attributes and shapes")
    if not isinstance(entry["class"], str) or not all(
        isinstance(entry[field], dict) for field in ("attributes", "shapes")
    ):
        raise ArtifactError(f"{where}: expected a class name and two objects")
    for key, value in entry["attributes"].items():
        if key not in ATTRIBUTES:
            raise ArtifactError(f"{where}: attribute {key!r} is not one that pruning changes; refused")
        if not is_attribute(key, value):
            raise ArtifactError(f"{where}: {key} = {short(value)} is out of range; expected plain sizes")
    for leaf, shape in entry["shapes"].items():
        if not is_shape(shape):
            raise ArtifactError(f"{where}: shape {short(shape)} of {leaf!r} is no list of sizes")


def _validate_buffer(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"shape", "dtype", "stored"}:
        raise ArtifactError(f"{where}: expected exactly shape, dtype and stored")
    dtype = getattr(torch, entry["dtype"], None) if isinstance(entry["dtype"], str) else None
    if not is_shape(entry["shape"]) or not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"{where}: {short(entry)} is no shape and dtype")
    if not isinstance(entry["stored"], bool):
        raise ArtifactError(f"{where}: 'stored' is {short(entry['stored'])}; expected true or false")


def _validate_surgery(surgery: list[Any], where: str) -> None:
    """Refuse entries of unknown types, or with values that are none."""
    types = []
    for entry in surgery:
        if not isinstance(entry, dict) or entry.keys() != {"type", "layers"}:
            raise ArtifactError(f"{where}: {short(entry)} is no entry; expected type and layers")
        kind, layers = entry["type"], entry["layers"]
        if kind == "layers":
            fits = isinstance(layers, list) and all(isinstance(name, str) for name in layers)
        else:
            fits = kind == "kernels" and isinstance(layers, dict)
            fits = fits and all(is_shape(shape) and len(shape) >= 3 for shape in layers.values())
        if not fits:
            raise ArtifactError(f"{where}: {short(entry)} is not one that can be done; refused")
        types.append(kind)
    if types not in ([], ["layers"], ["kernels"], ["layers", "kernels"]):
        raise ArtifactError(f"{where}: expected layers, then kernels, each once; got {short(types)}")


def check_arguments(arguments: dict[str, Any], where: str) -> None:
    """Refuse arguments of a builder that are not plain, out of range, or that make it read a file."""
    for key, value in arguments.items():
        if not isinstance(key, str) or REFUSED_ARGUMENTS.fullmatch(key):
            raise ArtifactError(f"{where}: argument {key!r} is refused; weights come from {WEIGHTS} alone")
        _check_argument(value, f"{where}: {key}")


def _check_argument(value: Any, where: str) -> None:
    if isinstance(value, dict):
        check_arguments(value, where)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_argument(item, where)
    elif isinstance(value, (int, float)):
        if not abs(value) <= _LARGEST:  # NaN, too
            raise ArtifactError(f"{where} = {short(value)} is out of range")
    elif not isinstance(value, (str, type(None))):
        raise ArtifactError(f"{where} is a {type(value).__name__}; expected a plain value")


def is_attribute(key: str, value: Any) -> bool:
    """Whether a value is one that the attribute of this name may take."""
    if key in _SWITCHES:
        return isinstance(value, bool)
    if key in FACTORS and isinstance(value, float):
        return 0 < value < math.inf
    return _is_size(value, least=1) or (bool(value) and is_shape(value))


def is_shape(value: Any) -> bool:
    """Whether a value is a list of sizes."""
    return isinstance(value, (list, tuple)) and len(value) <= 64 and all(_is_size(size) for size in value)


def _is_size(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def short(value: Any) -> str:
    """Show a value in 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
