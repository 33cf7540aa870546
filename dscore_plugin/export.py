"""Write a pruned network for other runtimes, and check what was written against the network itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import ArtifactError, DScoreError, ModelError, did_you_mean
from dscore_plugin.modes import in_eval_mode

FORMS = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-4
_BLAME = (
    "; without onnxruntime's graph optimisations it agrees, so the fault is theirs (known: before "
    "onnxruntime 1.32 they fold zero padding into the max pooling behind it, microsoft/onnxruntime#24737)"
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": ()}


@dataclass(frozen=True)
class Exported:
    """A network that was written and checked.

    Attributes:
        path: the file.
        form: ``"onnx"`` or ``"torch-export"``.
        difference: the largest difference of its outputs on a random input, relative to the largest output.
        size: of the file, in bytes.
    """

    path: Path
    form: str
    difference: float
    size: int


def export_folder(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    form: str = "onnx",
    batch: int = 1,
    force: bool = False,
) -> Exported:
    """Export a saved artifact.

    Args:
        folder: what :func:`dscore_plugin.save_pruned` wrote.
        out: the file to write; by default ``model.onnx`` or ``model.pt2`` beside the artifact's files.
        form: ``"onnx"`` or ``"torch-export"``.
        batch: images in one call; the exported network takes exactly so many.
        force: replace an existing file.

    Raises:
        ArtifactError: if the artifact cannot be loaded, does not say what its inputs look like, or ``out`` exists.
        ModelError: if ``batch`` is below 1, or as :func:`export_model`.
    """
    from dscore_plugin.artifact import load_pruned, read_structure

    _check_form(form)
    if batch < 1:
        raise ModelError(f"batch is {batch}; expected at least 1 image")
    shape = read_structure(folder)["input_shape"]
    if shape is None:
        raise ArtifactError(
            f"{folder} does not say what its inputs look like; save it with input_shape=(C, H, W)"
        )
    out = Path(out) if out is not None else Path(folder) / f"model{FORMS[form]}"
    _check_writable(out, force)
    return export_model(load_pruned(folder), (torch.zeros(batch, *shape),), out, form=form, force=force)


def export_model(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    out: str | Path,
    *,
    form: str = "onnx",
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Exported:
    """Write a network as a file, read it back, and compare its outputs with the network's on random inputs.

    Args:
        model: the network; it is left as it was, and exported in eval mode.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument), floating-point; their
            shapes become the file's.
        out: the file to write; it appears only if the check holds.
        form: ``"onnx"`` (run by onnxruntime) or ``"torch-export"``.
        tolerance: of the difference, relative to the largest output.
        force: replace an existing file.

    Raises:
        ArtifactError: if ``out`` exists and ``force`` is not given, or cannot be written.
        ModelError: if the form is unknown, a package is missing, an input is empty, or the network does not run on the
            inputs, cannot be exported or gives other outputs afterwards.
    """
    _check_form(form)
    out = Path(out)
    _check_writable(out, force)
    examples = as_arguments(example_inputs)
    if not all(x.numel() for x in examples):
        raise ModelError("an example input is empty; expected at least 1 image")
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(x.shape, generator=generator).to(x) for x in examples)
    partial = out.with_name(f".partial-{out.stem}{FORMS[form]}")  # torch.export warns of other endings
    try:
        with in_eval_mode(model), torch.no_grad():
            expected = _outputs(model, inputs)
            found = (_through_onnx if form == "onnx" else _through_export)(model, inputs, partial)
        difference = _difference(found, expected)
        if not difference <= tolerance:
            agrees = form == "onnx" and _difference(_run_onnx(partial, inputs, False), expected) <= tolerance
            raise ModelError(
                f"the exported network differs by {difference:.1e} of the largest output; "
                f"expected at most {tolerance:.0e}{_BLAME if agrees else ''}"
            )
        partial.replace(out)
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Exported(out, form, difference, out.stat().st_size)


def _through_onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> list[Tensor]:
    try:
        program = _onnx_program(model, inputs)
        program.save(str(path), external_data=False)
    except (DScoreError, OSError):
        raise
    except Exception as error:  # whatever the exporter makes of a forward()
        raise ModelError(_cannot(model, "ONNX", error)) from error
    return _run_onnx(path, inputs)


def _onnx_program(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Export; where that fails, once more with timm's attention written out: the exporter knows no fused one in 5-d."""
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", None) is True]
    try:
        return torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    except Exception:
        if not fused:
            raise
        try:
            for module in fused:
                module.fused_attn = False
            return torch.onnx.export(model, inputs, dynamo=True, verbose=False)
        finally:
            for module in fused:
                module.fused_attn = True


def _run_onnx(path: Path, inputs: tuple[Tensor, ...], optimised: bool = True) -> list[Tensor]:
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        fed = {given.name: x.cpu().numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.as_tensor(value) for value in session.run(None, fed)]
    except Exception as error:
        told = _cause(error).replace(str(path), path.name)
        raise ModelError(f"onnxruntime does not run the exported network: {told}") from error


def _through_export(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> list[Tensor]:
    try:
        torch.export.save(torch.export.export(model, inputs), path)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(_cannot(model, "torch.export", error)) from error
    return _leaves(torch.export.load(path).module()(*inputs))


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    errors = [
        float((one.cpu() - other.cpu()).abs().max() / other.abs().max().cpu().clamp(min=1e-12))
        for one, other in zip(found, expected, strict=True)
        if other.numel()
    ]
    return float(torch.tensor([0.0, *errors]).max())  # NaN, too, which max() loses


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    try:
        return _leaves(model(*inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ModelError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {_cause(error)}; give those of a batch "
            "(an artifact: save it with input_shape=(C, H, W), without the batch)"
        ) from error


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ModelError(
            f"export format {form!r} is unknown; expected one of {', '.join(FORMS)}"
            + did_you_mean(form, FORMS)
        )
    missing = [name for name in _NEEDED[form] if find_spec(name) is None]
    if missing:
        raise ModelError(f"export to {form} needs {', '.join(missing)}; pip install 'dscore-plugin[onnx]'")


def _check_writable(out: Path, force: bool) -> None:
    if out.is_dir() or (out.exists() and not force):
        raise ArtifactError(
            f"{out} exists already; choose another file, or replace it with --force (force=True)"
        )
    if not out.parent.is_dir():
        raise ArtifactError(f"there is no folder {out.parent}; make it first")


def _cannot(model: nn.Module, what: str, error: BaseException) -> str:
    return f"{type(model).__name__} cannot be exported by {what}: {_cause(error)}"


def _cause(error: BaseException) -> str:
    """Say in a line what went wrong first: exporters wrap it into pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0].strip()}"[:250]
