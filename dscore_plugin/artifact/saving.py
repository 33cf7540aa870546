"""Save and load a pruned model: safetensors for the weights, JSON for the structure, never pickle.

A folder holds ``model.safetensors``, ``pruned_structure.json`` (how the model differs from the dense
architecture), ``metrics.json`` and ``report.md``. Loading builds the dense architecture without memory for
its weights, narrows its layers as the JSON says, checks every shape and assigns the weights, without tracing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dscore_plugin.artifact.description import (
    describe_buffers,
    describe_modules,
    find_dense,
    package_versions,
    read_state,
    shared_storage,
)
from dscore_plugin.artifact.fit import (
    Stored,
    build_dense,
    check_fit,
    check_layers,
    check_ties,
    fill,
    finish_buffers,
    narrow,
    rebuild_buffers,
)
from dscore_plugin.artifact.structure import (
    CUSTOM,
    FORMAT_VERSION,
    STRUCTURE,
    WEIGHTS,
    first_line,
    validate_structure,
)
from dscore_plugin.artifact.surgery import (
    check_maskable,
    compress,
    describe_surgery,
    expand,
    expanded_shapes,
    remove_layers,
)
from dscore_plugin.errors import ArtifactError
from dscore_plugin.files import atomic_folder, ensure_writable, read_json, write_json, write_text
from dscore_plugin.rollback import rolled_back_on_error
from dscore_plugin.surgery.kernel_masks import prune_kernels

METRICS, REPORT = "metrics.json", "report.md"
STAGES = ("dense", "pruned", "recalibrated", "finetuned")


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

    The model is not modified. The folder appears complete or not at all. Removed layers and kernels need no storage.
    What matters in training alone is not stored: dropout rates and the momenta of batch norms come back as the dense
    architecture (``model_args``) has them. Nor are forward hooks: a warning names the modules that have some.

    Args:
        model: the pruned model, on any device, in any memory format.
        folder: where to; must not exist unless ``force``.
        architecture: name in timm's registry of the dense model; ``"custom"`` for a model that timm cannot
            build. None asks the model, and falls back to ``"custom"``.
        model_args: arguments of ``timm.create_model`` that build the dense model, plain values. None takes
            those that timm noted in the model.
        input_shape: shape of one input without the batch, ``(C, H, W)``; :func:`~dscore_plugin.export.export_folder`
            needs it, and :func:`~dscore_plugin.load_for_inference` where kernels are gone.
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
            again: it differs from its dense architecture in more than widths (other settings, replaced functions),
            or a layer contradicts itself; if ``input_shape`` is no shape of an image.
    """
    folder = Path(folder)
    ensure_writable(folder, force)
    state = read_state(model)
    check_layers(model, {}, {name: tuple(tensor.shape) for name, tensor in state.items()})
    surgery = describe_surgery(model)
    architecture, model_args, dense = find_dense(model, state, surgery, architecture, model_args)
    shape = None if input_shape is None else _checked_shape(list(input_shape), architecture)
    buffers = describe_buffers(model, state, dense)
    state |= {name: model.get_buffer(name).detach() for name in buffers if buffers[name]["stored"]}
    tied = shared_storage(state)
    structure = {
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "model_args": model_args,
        "input_shape": shape,
        "modules": describe_modules(model, state, dense),
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "tied": tied,
        "buffers": buffers,
        "surgery": surgery,
        "criterion": criterion,
        "plan": plan,
        "pruning_history": history,
        "numbers": numbers,
        "versions": package_versions(),
    }
    validate_structure(structure, str(folder))
    with atomic_folder(folder, force) as partial:
        stored = {name: state[name] for name in state if name not in tied}
        _write_weights(compress(model, stored), partial / WEIGHTS)
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
        The pruned model in eval mode, with the saved dtypes, parameters as trainable as they were saved. Dropout
        rates and the momenta of batch norms are those of the dense model.

    Raises:
        ArtifactError: if a file is missing, truncated, tampered with, reached through a link that leaves the
            folder, or of an unknown format version; if the artifact does not fit the dense model, or the dense
            model that it names is more than a thousand times as large.
    """
    folder = Path(folder)
    structure = read_structure(folder)
    weights = file_in(folder, WEIGHTS)
    if model is None and structure["architecture"] == CUSTOM:
        raise ArtifactError(
            f"{folder} holds a custom model; build the dense one and call load_pruned(folder, model=dense)"
        )
    surgery = structure["surgery"]
    stored = expanded_shapes(surgery, _read_header(weights))
    check_ties(structure["tied"], stored)
    size = sum(math.prod(found.shape) for found in stored.values())
    stored |= {name: stored[kept] for name, kept in structure["tied"].items()}
    pruned = model
    if pruned is None:
        pruned = build_dense(structure["architecture"], structure["model_args"], size)
    with rolled_back_on_error(pruned):
        remove_layers(pruned, surgery)
        check_maskable(pruned, surgery)
        check_fit(pruned, structure, stored)
        tensors, masks = expand(surgery, _read_tensors(weights))
        narrow(pruned, structure["modules"], stored)
        fill(pruned, structure, tensors)
        if model is None:
            rebuild_buffers(pruned, structure)
        finish_buffers(pruned, structure, tensors)
        prune_kernels(pruned, masks)
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
    path = file_in(Path(folder), STRUCTURE)
    structure = read_json(path)
    if isinstance(structure, dict):
        structure.setdefault("surgery", [])  # of artifacts from before layers and kernels could leave
    validate_structure(structure, str(path))
    return structure


def _checked_shape(shape: list[int], architecture: str) -> list[int]:
    """Return the shape of one input if it can be one; of custom models any could, of timm's only an image's."""
    if architecture != CUSTOM and len(shape) != 3:
        raise ArtifactError(
            f"input_shape is {shape}; expected that of one image without the batch, (C, H, W)"
        )
    return shape


def _write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    tensors = {name: _detached_copy(tensor) for name, tensor in state.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ArtifactError(f"safetensors cannot store the weights: {first_line(error)}") from error


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


def file_in(folder: Path, name: str) -> Path:
    """The path of a file in the artifact, if it is there and no link leads out of the folder."""
    if not os.path.isdir(folder):
        raise ArtifactError(f"there is no artifact at {folder}; expected a folder that save_pruned() wrote")
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; expected a complete folder that save_pruned() wrote")
    if path.resolve().parent != folder.resolve():
        raise ArtifactError(f"{path} is a link that leaves the folder; put the file itself there")
    return path


def _read_header(path: Path) -> dict[str, Stored]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
        return {name: Stored(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


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
            f"{path} is truncated or no safetensors file ({first_line(error)}); save it again"
        ) from error
