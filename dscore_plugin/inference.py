"""A saved network, loaded to be run and not to be trained: each part on what is fastest here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscore_plugin.artifact import load_pruned, read_structure
from dscore_plugin.errors import ArtifactError, ModelError
from dscore_plugin.surgery.kernels import compile_sparse


def load_for_inference(
    folder: str | Path,
    *,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
    **options: Any,
) -> nn.Module:
    """Load an artifact; if it has lost kernels, each convolution runs on the backend that measures best here.

    Args:
        folder: the artifact.
        batch_size: the number of images for which the backends are timed; others run too, perhaps not in the best way.
        device: where the model shall live.
        model: the dense model, for an artifact of a custom model.
        **options: of :func:`dscore_plugin.surgery.sparse_execution.compile_sparse`.

    Returns:
        The network in eval mode. Where kernels are gone it is a
        :class:`~dscore_plugin.surgery.sparse_execution.SparseExecution`, whose ``choices`` say how each layer runs
        and what was measured; it is not for training.

    Raises:
        ArtifactError: if the artifact cannot be loaded, or has lost kernels and does not say what its inputs look like.
        ModelError: if ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ModelError(f"batch_size is {batch_size}; expected at least 1 image")
    structure = read_structure(folder)
    shape = structure["input_shape"]
    has_lost_kernels = any(entry["type"] == "kernels" for entry in structure["surgery"])
    if has_lost_kernels and shape is None:
        raise ArtifactError(
            f"{folder} does not say what its inputs look like; save it with input_shape=(C, H, W), or call "
            "compile_sparse(load_pruned(folder), example_inputs)"
        )
    pruned = load_pruned(folder, model, device=device)
    if not has_lost_kernels:
        return pruned
    return compile_sparse(pruned, (torch.randn(batch_size, *shape, device=device),), **options)
