"""Atomic folders and files: complete or not there, whatever happens in between."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dscore_plugin.errors import ArtifactError
from dscore_plugin.files import atomic_folder, ensure_writable, read_json, write_json, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "one"
    with atomic_folder(target) as partial:
        (partial / "file").write_text("content")
        assert not target.exists()
        assert partial.parent == target.parent
    assert (target / "file").read_text() == "content"
    assert names(target.parent) == {"one"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half() -> None:
        with atomic_folder(tmp_path / "one") as partial:
            (partial / "file").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == set()


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(ArtifactError, match="exists already.*--force"), atomic_folder(tmp_path / "one"):
        pytest.fail("the block ran")
    assert names(tmp_path) == {"one"}


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").write_text("old")
    with atomic_folder(tmp_path / "one", force=True) as partial:
        (partial / "new").write_text("new")
        assert names(tmp_path / "one") == {"old"}
    assert names(tmp_path / "one") == {"new"}
    assert names(tmp_path) == {"one"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_force_keeps_the_old_folder_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").write_text("old")
    with pytest.raises(error), atomic_folder(tmp_path / "one", force=True):
        raise error
    assert names(tmp_path / "one") == {"old"}
    assert names(tmp_path) == {"one"}


@pytest.mark.parametrize("failing_rename", [1, 2])
@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_old_folder_comes_back_when_a_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_rename: int, error: BaseException
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").write_text("old")
    rename, calls = os.rename, []

    def fail_once(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing_rename:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    expected = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_folder(tmp_path / "one", force=True) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path / "one") == {"old"}
    assert names(tmp_path) == {"one"}


def test_interrupt_after_the_swap_leaves_the_new_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    rename, calls = os.rename, []

    def interrupted_after_the_second(source: Path, target: Path) -> None:
        rename(source, target)
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted_after_the_second)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "one", force=True) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path / "one") == {"new"}
    assert names(tmp_path) == {"one"}


def test_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    def write_while_another_does() -> None:
        with atomic_folder(tmp_path / "one"):
            (tmp_path / "one").mkdir()
            (tmp_path / "one" / "theirs").write_text("theirs")

    with pytest.raises(ArtifactError, match="exists already"):
        write_while_another_does()
    assert names(tmp_path / "one") == {"theirs"}
    assert names(tmp_path) == {"one"}


def test_folder_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_folder("one"):
        monkeypatch.chdir(tmp_path / "there")
    assert names(tmp_path / "here") == {"one"}


def test_force_spares_the_working_and_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "home" / "me").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for folder in (tmp_path / "a" / "b", tmp_path / "a", tmp_path / "home" / "me", tmp_path / "home"):
        with pytest.raises(ArtifactError, match="is not replaced"):
            ensure_writable(folder, force=True)


def test_files_and_links_are_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "link"):
        with pytest.raises(ArtifactError, match="not a plain folder"):
            ensure_writable(tmp_path / name, force=True)
    with pytest.raises(ArtifactError, match="cannot write below"):
        ensure_writable(tmp_path / "file" / "one")


def test_names_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / ("ä" * 127)) as partial:
        write_text(partial / ("a" * 255), "text")
    with pytest.raises(ArtifactError, match="File name too long; choose another folder"):
        ensure_writable(tmp_path / ("a" * 256))


def test_ensure_writable_makes_nothing(tmp_path: Path) -> None:
    ensure_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == set()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLAIN)
def test_json_comes_back_as_it_was(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    assert names(tmp_path) == {"file.json"}


def test_lists_of_numbers_stand_on_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"a": [1, -2, 3.5e-7], "text": "[\n 1,\n 2\n]"})
    assert '"a": [1, -2, 3.5e-07]' in (tmp_path / "file.json").read_text()
    assert read_json(tmp_path / "file.json")["text"] == "[\n 1,\n 2\n]"


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, {1, 2}, Path("x")])
def test_values_that_are_no_json_are_refused(tmp_path: Path, value: object) -> None:
    write_text(tmp_path / "file.json", "before")
    with pytest.raises(ArtifactError, match="plain, finite values"):
        write_json(tmp_path / "file.json", value)
    assert (tmp_path / "file.json").read_text() == "before"


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": NaN}', b"[Infinity]", b"\xff\xfe", b"[" * 200_000, b"{'a': 1}"]
)
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="not valid JSON") as caught:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_json(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        read_json(tmp_path / "file.json")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_json(tmp_path)


def test_text_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "before")

    def interrupted(source: Path, target: Path) -> None:
        assert source.read_text() == "after"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before"
    assert names(tmp_path) == {"file"}


def test_text_below_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("mine")
    for folder in ("no", "plain"):
        with pytest.raises(ArtifactError, match="cannot write"):
            write_text(tmp_path / folder / "file", "text")


def test_json_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"name": "Gänsefüßchen"})
    assert json.loads((tmp_path / "file.json").read_bytes().decode("utf-8")) == {"name": "Gänsefüßchen"}
