"""Files and folders that are there completely or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from dscore_plugin.errors import ArtifactError


@contextmanager
def atomic_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder to write into, and rename it into place when all went well.

    On any exception, Ctrl-C included, the temporary folder is removed and what stood at ``path`` stays.

    Args:
        path: the folder that is to appear; missing parents are made.
        force: replace a folder that exists already: it is moved aside, the new one takes its place, and
            only then is it removed; where the second step fails, it comes back.

    Yields:
        The temporary folder, beside ``path``.

    Raises:
        ArtifactError: before any work, if ``path`` exists and ``force`` is not given, or cannot be written.
    """
    path = Path(path).absolute()  # so that a change of the working directory in between does not matter
    ensure_writable(path, force)
    partial = _sibling(path, "partial")
    try:
        _make_folder(partial)
        yield partial
        _put_in_place(partial, path, force)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def ensure_writable(path: str | Path, force: bool = False) -> None:
    """Find out before the long work whether a result folder can be written at its end.

    Args:
        path: the folder that is to appear.
        force: a folder that exists already may be replaced.

    Raises:
        ArtifactError: if ``path`` exists and ``force`` is not given; if it is not a folder, or one that must
            not be replaced (the working directory, the home directory, what holds either); if the folder
            that would hold it cannot be written.
    """
    path = Path(path).absolute()
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ArtifactError(f"{path} exists and is not a plain folder; choose another output folder")
        if path.exists():
            _ensure_replaceable(path, force)
        parent = next(folder for folder in path.parents if folder.exists())
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        raise ArtifactError(f"{path} cannot be written: {error.strerror}; choose another folder") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write below {parent}; choose an output folder that can be written")


def write_json(path: str | Path, obj: Any) -> None:
    """Write plain values as JSON, readable and atomically.

    Args:
        path: the file; what it held before stays until the new text is complete.
        obj: dicts, lists, tuples, strings, numbers, booleans, None.

    Raises:
        ArtifactError: if ``obj`` is not plain or holds NaN or infinity, or the file cannot be written.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"cannot write {path} as JSON: {error}; give plain, finite values") from error
    write_text(path, _numbers_on_one_line(text) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Args:
        path: the file.

    Returns:
        What it holds.

    Raises:
        ArtifactError: if it is missing, cannot be read, or is not strict JSON in UTF-8.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ArtifactError(f"{path} is not valid JSON ({error}); write it again") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, atomically.

    Args:
        path: the file; what it held before stays until the new text is complete.
        text: its content.

    Raises:
        ArtifactError: if the file cannot be written.
    """
    path = Path(path)
    partial = _sibling(path, "partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it was moved, or never made
            partial.unlink()


def _sibling(path: Path, ending: str) -> Path:
    """A hidden name beside ``path`` that nothing has yet; not so long that no file system takes it."""
    return path.parent / f".{path.name[:50]}.{secrets.token_hex(6)}.{ending}"


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(f"cannot write below {path.parent}: {error.strerror or error}") from error


def _ensure_replaceable(path: Path, force: bool) -> None:
    if not force:
        raise ArtifactError(
            f"{path} exists already; choose another folder, or replace it with --force (force=True)"
        )
    resolved = path.resolve()
    for protected in (Path.cwd().resolve(), Path.home().resolve()):
        if resolved == protected or resolved in protected.parents:
            raise ArtifactError(f"{path} holds {protected} and is not replaced; choose another folder")


def _put_in_place(partial: Path, path: Path, force: bool) -> None:
    if path.exists():
        _ensure_replaceable(path, force)  # it may have appeared meanwhile
    aside = _sibling(path, "replaced")
    try:
        if path.exists():
            os.rename(path, aside)
        os.rename(partial, path)
    except OSError as error:
        raise ArtifactError(f"cannot put {path} into place: {error.strerror or error}") from error
    finally:  # whichever step was interrupted, one complete folder stays
        if aside.exists() and path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif aside.exists():
            os.rename(aside, path)


def _numbers_on_one_line(text: str) -> str:
    """Join the lists of numbers that ``indent`` spreads; strings stay, as they hold no raw line break."""
    return re.sub(r"\[\n([-+.\deE,\s]+?)\n\s*\]", lambda match: "[" + " ".join(match[1].split()) + "]", text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
