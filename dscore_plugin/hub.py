"""Pruned models by their address: a folder, or a repository on the Hugging Face Hub.

A repository holds what :func:`dscore_plugin.save_pruned` wrote, and beside it ``config.json`` in timm's form (the
dense architecture and its arguments, and what we add under ``"dscore_plugin"``) and ``README.md``, the model card with
the numbers.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscore_plugin.artifact import METRICS, STRUCTURE, WEIGHTS, load_pruned, read_structure
from dscore_plugin.artifact.saving import file_in
from dscore_plugin.errors import ArtifactError, ModelError
from dscore_plugin.files import atomic_folder, ensure_writable, read_json, write_json, write_text

CONFIG, CARD = "config.json", "README.md"
_FILES = (WEIGHTS, STRUCTURE, METRICS, CONFIG)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def create_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    token: str | None = None,
    cache_dir: str | None = None,
) -> nn.Module:
    """Build a pruned model from a folder or from the Hub. Nothing in it is executed.

    Args:
        source: a folder (``"out/resnet50"``, ``"local-dir:out/resnet50"``) or a repository on the Hub
            (``"owner/name"``, ``"hf-hub:owner/name@revision"``). A folder that exists goes first.
        device: where the model shall live.
        token: for private repositories; by default the one that ``hf auth login`` keeps.
        cache_dir: where downloads are kept; by default the Hub's cache.

    Returns:
        The pruned model in eval mode.

    Raises:
        ModelError: if ``source`` is neither, or the repository cannot be had.
        ArtifactError: if it holds no pruned model, or a damaged one.
    """
    kind, _, rest = (
        str(source).partition(":")
        if re.match(r"(local-dir|hf-hub|hf_hub):", str(source))
        else ("", "", source)
    )
    if kind == "local-dir" or (not kind and os.path.isdir(source)):
        return load_pruned(Path(rest), device=device)
    if not _REPOSITORY.fullmatch(str(rest)):
        raise ModelError(
            f"{str(source)!r} is neither a folder nor a repository; expected a folder that save_pruned() wrote, or "
            "'owner/name' on the Hub (dense networks: dscore_plugin.models.create_model)"
        )
    with tempfile.TemporaryDirectory() as copy:
        _download(str(rest), Path(copy), token, cache_dir)
        return load_pruned(copy, device=device)


def save_for_hub(
    folder: str | Path, out: str | Path, *, name: str | None = None, force: bool = False
) -> Path:
    """Lay out an artifact as a repository: its files, ``config.json`` and the model card.

    Args:
        folder: what :func:`dscore_plugin.save_pruned` wrote.
        out: where to; must not exist unless ``force``.
        name: of the model in the card, by default the architecture's; ``"owner/name"`` where it is known.
        force: replace an existing folder.

    Returns:
        ``out``, which :func:`create_model` loads.

    Raises:
        ArtifactError: if the artifact is damaged or of a custom model, or ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    structure = read_structure(folder)
    if structure["architecture"] == "custom":
        raise ArtifactError(
            f"{folder} holds a custom model, which nobody could build; only timm's can be shared"
        )
    ensure_writable(out, force)
    load_pruned(folder)  # what does not load is of no use to anybody
    files = [file_in(folder, name) for name in (WEIGHTS, STRUCTURE)]
    metrics = {}
    if os.path.lexists(folder / METRICS):
        files.append(file_in(folder, METRICS))
        metrics = read_json(folder / METRICS)
    with atomic_folder(out, force) as partial:
        for file in files:
            shutil.copyfile(file, partial / file.name)
        write_json(partial / CONFIG, _config(structure))
        write_text(partial / CARD, model_card(structure, metrics, name or structure["architecture"]))
    return out


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Add pruned model",
) -> str:
    """Upload an artifact as a repository on the Hub, making it where it is not there.

    Args:
        folder: what :func:`dscore_plugin.save_pruned` wrote.
        repository: ``"owner/name"``.
        private: make a new repository private.
        token: by default the one that ``hf auth login`` keeps.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        ArtifactError: as :func:`save_for_hub`.
        ModelError: if the Hub refuses.
    """
    import huggingface_hub

    if not _REPOSITORY.fullmatch(repository) or "@" in repository:
        raise ModelError(f"{repository!r} is no repository; expected 'owner/name'")
    with tempfile.TemporaryDirectory() as parent:
        laid_out = save_for_hub(folder, Path(parent) / "repository", name=repository)
        api = huggingface_hub.HfApi(token=token, library_name="dscore-plugin")
        try:
            made = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=laid_out, commit_message=message)
        except (OSError, ValueError) as error:  # the Hub's errors are both
            raise ModelError(f"{repository!r} cannot be uploaded: {_first_line(error)}") from error
    return str(made)


def model_card(structure: dict[str, Any], metrics: dict[str, Any], name: str) -> str:
    """Write a model card: what was pruned and how, the numbers, how to load it.

    Args:
        structure: the content of ``pruned_structure.json``.
        metrics: the content of ``metrics.json``.
        name: of the model, ``"owner/name"`` where it is known.

    Returns:
        Markdown behind the front matter that the Hub reads.
    """
    from dscore_plugin.report.tables import report_markdown

    head = ["---", "library_name: dscore-plugin", "pipeline_tag: image-classification"]
    head += [
        "tags:",
        *(f"- {tag}" for tag in ("image-classification", "timm", "pruning", "dscore-plugin")),
        "---",
        "",
    ]
    text = report_markdown(structure, metrics, folder=None)
    load = [
        "",
        "## Load it",
        "",
        "```python",
        "import dscore_plugin",
        "",
        f"model = dscore_plugin.create_model({name!r})",
    ]
    return "\n".join([*head, text.rstrip(), *load, "```", ""])


def _config(structure: dict[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` as timm writes it, with the pruned widths under our own name."""
    arguments = structure["model_args"]
    config = {"architecture": structure["architecture"], "model_args": arguments}
    config |= {"num_classes": arguments["num_classes"]} if "num_classes" in arguments else {}
    shape = structure["input_shape"]
    return {
        **config,
        "pretrained_cfg": {"input_size": shape} if shape else {},
        "dscore_plugin": {
            "format_version": structure["format_version"],
            "structure": STRUCTURE,
            "criterion": structure["criterion"],
            "numbers": structure["numbers"],
        },
    }


def _download(address: str, to: Path, token: str | None, cache_dir: str | None) -> None:
    """Copy a repository's files; the cache keeps links, which an artifact must not hold."""
    import huggingface_hub

    repository, _, revision = address.partition("@")
    try:
        cached = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(_FILES),
            token=token,
            cache_dir=cache_dir,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{address!r} cannot be downloaded from the Hub: {_first_line(error)}") from error
    for name in _FILES:
        file = Path(cached) / name
        if file.is_file():
            shutil.copyfile(file.resolve(), to / name)
    if not (to / STRUCTURE).exists():
        raise ArtifactError(
            f"{address!r} has no {STRUCTURE}; dense networks are loaded with timm.create_model"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
