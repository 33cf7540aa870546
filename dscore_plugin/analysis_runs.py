"""Runs that leave a network as it is: a plan, a sensitivity analysis, an evaluation."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from dscore_plugin.artifact import STRUCTURE, WEIGHTS, load_pruned, read_structure
from dscore_plugin.choosing import choose, sensitivity_table
from dscore_plugin.datasets import ImageData
from dscore_plugin.errors import ArtifactError, DataError, ModelError
from dscore_plugin.files import atomic_folder, ensure_writable
from dscore_plugin.jobs import Choice, Source
from dscore_plugin.plan import Plan
from dscore_plugin.report.drawing import can_draw
from dscore_plugin.report.kernel_numbers import sparse_latency
from dscore_plugin.report.plots import plot_sensitivity
from dscore_plugin.runs import Say, measure, open_work
from dscore_plugin.selection.sensitivity import Sensitivity
from dscore_plugin.surgery.kernel_masks import kernel_masks
from dscore_plugin.training.progress import NoProgress, Progress


def run_plan(source: Source, choice: Choice, say: Say = lambda _: None) -> Plan:
    """Choose what leaves a network, without touching it."""
    choice.check()
    source.check()
    if source.weights is None:
        raise ModelError("a plan needs trained weights; pass --weights FILE")
    data = source.load_images()
    return choose(source, choice, source.build(data), data, say=say)


def run_sensitivity(
    source: Source,
    choice: Choice,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> Sensitivity:
    """Measure the sensitivity of every layer and write the table and its picture.

    Args:
        source: the network, with its weights, and the images.
        choice: the criterion, and how to measure.
        out: the folder that takes ``sensitivity.json``, ``.csv`` and, where matplotlib is installed, ``.png`` and
            ``.svg``.
        force: replace it.
        resume: go on with an interrupted analysis.
        progress: shows bars.
        say: takes a line of news now and then.

    Returns:
        The table.

    Raises:
        DScoreError: on bad input, before any work starts.
    """
    ensure_writable(out, force)
    choice.check_scoring()
    source.check()
    if source.weights is None:
        raise ModelError("a sensitivity analysis needs trained weights; pass --weights FILE")
    work = out.with_name(out.name + ".work")
    data = source.load_images()
    open_work(work, {"source": asdict(source), "choice": asdict(choice)}, say, force=force, resume=resume)
    table = sensitivity_table(source, choice, source.build(data), data, work, progress=progress, say=say)
    if PartialState().is_main_process:
        with atomic_folder(out, force) as folder:
            table.save(folder)
            if can_draw():
                plot_sensitivity(table, folder / "sensitivity")
        shutil.rmtree(work)
        say(f"saved {out}: sensitivity.json, .csv" + (", .png, .svg" if can_draw() else ""))
    return table


def run_evaluate(folder: Path | None, source: Source, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a saved artifact, or a dense network, on the test images.

    Args:
        folder: an artifact; None measures the network that ``source`` names.
        source: the images, and the dense network with its weights.
        progress: shows bars.

    Returns:
        ``{"top1", "images", "macs", "params", "latency_ms"}``, and ``"sparse_latency_ms"`` where kernels are gone.

    Raises:
        DScoreError: on bad input.
    """
    if folder is None and source.weights is None:
        raise ModelError("a dense network needs trained weights; pass --weights FILE, or name an artifact")
    if folder is not None and (folder / WEIGHTS).exists() and not (folder / STRUCTURE).exists():
        raise ArtifactError(
            f"{folder} holds a dense network; measure it with --model NAME --weights {folder / WEIGHTS}"
        )
    source.check()
    # Before the images: they take long.
    expected = None if folder is None else read_structure(folder)["input_shape"]
    data = source.load_images()
    if expected:
        _check_images(source, data, tuple(expected))
    model = source.build(data) if folder is None else load_pruned(folder).to(source.find_device())
    found = {**measure(model, data, progress or NoProgress()), "images": len(data.test)}
    if kernel_masks(model):
        found["sparse_latency_ms"] = sparse_latency(model, data.input_shape)
    return found


def _check_images(source: Source, data: ImageData, expected: tuple[int, ...]) -> None:
    """Refuse images that an artifact was not made for, unless another size was asked for."""
    resized = source.image_size is not None and data.input_shape[0] == expected[0]
    if data.input_shape != expected and not resized:
        made, found = (" x ".join(map(str, shape)) for shape in (expected, data.input_shape))
        raise DataError(
            f"the artifact was made for images of {made}, those of {source.data!r} are {found}; name its own with "
            "--data (image folders: and --image-size)"
        )
