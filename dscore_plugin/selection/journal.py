"""A file of what a long measurement has found so far, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dscore_plugin.errors import ArtifactError
from dscore_plugin.files import write_text


class Journal:
    """JSON lines, appended and synced one by one; the first says what is measured.

    Several processes may append to one file: a line is written in one piece. A line that an interruption cut off is
    left out when the file is read.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, identity: Mapping[str, Any], resume: bool) -> list[dict[str, Any]]:
        """Start the file, or read what it holds.

        Args:
            identity: plain JSON values that an interrupted measurement and its continuation have in common.
            resume: go on with the file if there is one.

        Returns:
            The records so far.

        Raises:
            ArtifactError: if the file belongs to another measurement, exists without ``resume``, or cannot be
                read or written.
        """
        if not self._path.exists():
            return self._start(identity)
        if not resume:
            raise ArtifactError(
                f"{self._path} holds an unfinished measurement; go on with resume=True (--resume), or remove it"
            )
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise ArtifactError(f"cannot read {self._path}: {error.strerror}") from error
        records = [record for line in lines if (record := _parse(line)) is not None]
        self._require(records[0] if records else {}, identity)
        self._append("\n")  # ends a line that was cut off
        return records[1:]

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record and wait until it is on the disk; raise ArtifactError if it cannot be."""
        self._append(json.dumps(record) + "\n")

    def _start(self, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot write {self._path}: {error.strerror}") from error
        write_text(self._path, json.dumps(identity) + "\n")
        return []

    def _require(self, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        different = [key for key in identity if found.get(key) != identity[key]]
        if different:
            raise ArtifactError(
                f"{self._path} belongs to another measurement ({', '.join(different)} differ); use the same "
                "model, data and options, or another file"
            )

    def _append(self, text: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # another computer's disk may not have it
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, text.encode())
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise ArtifactError(f"cannot write {self._path}: {error.strerror}") from error


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
