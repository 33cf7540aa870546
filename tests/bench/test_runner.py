"""Runs of a benchmark: cells that finish, fail, are interrupted, or wait for others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from dscore_plugin import pipeline
from dscore_plugin.bench import runner
from dscore_plugin.bench.cells import Cell, Place
from dscore_plugin.bench.claims import first_free
from dscore_plugin.bench.protocol import Protocol, load_protocol
from dscore_plugin.bench.records import NEEDED, Record, read_records
from dscore_plugin.bench.runner import run_bench
from dscore_plugin.bench.survey import DONE, FAILED, STARTED, TO_DO, UNFIT, seconds_left, survey
from dscore_plugin.errors import BenchError, TrainingError
from dscore_plugin.training import loop
from tests.bench.helpers import PROTOCOL, place, record, save_weights, write_protocol

MEASURED = ("macs_kept", "params_kept", "top1_dense", "top1_pruned", "top1_recalibrated", "top1_finetuned")


def protocol(folder: Path, **changes: Any) -> Protocol:
    return load_protocol(write_protocol(folder, **changes))


def numbers(records: list[Record]) -> dict[str, list[Any]]:
    return {entry["id"]: [entry[name] for name in (*MEASURED, "validation_top1")] for entry in records}


def test_cells_become_records_and_the_best_row_gets_its_cells(tmp_path: Path) -> None:
    blocks = [
        {"name": "all rows", "rows": ["l1", "d_score", "coarse"], "target_macs": [0.5]},
        {
            "name": "both allocations", "rows": ["l1", {"best": 1, "of": "ours"}], "target_macs": [0.5],
            "allocations": ["uniform", "sensitivity"],
        },
        {
            "name": "rounds", "rows": ["l1"], "target_macs": [0.5], "rounds": 2, "round_epochs": 1,
            "training": {"epochs": 2},
        },
    ]  # fmt: skip
    rows = {"coarse": {"criterion": "coarse", "criterion_options": {"candidates": 3, "selection_images": 40}}}
    out, said = tmp_path / "results" / "criteria_tiny.json", []
    asked = protocol(tmp_path, blocks=blocks, rows=rows)
    found = run_bench(asked, place(tmp_path), out, say=said.append)

    records = read_records(out)
    best = max(records[1:3], key=lambda r: r["validation_top1"])["row"]
    assert [(r["row"], r["allocation"], r["rounds"]) for r in records[:4]] == [
        ("l1", "uniform", 1), ("d_score", "uniform", 1), ("coarse", "uniform", 1), ("l1", "sensitivity", 1),
    ]  # fmt: skip
    assert records[-1]["rounds"] == 2
    assert found.waiting == ()
    assert found.left == []
    if best == "coarse":  # it cannot be combined with an allocation
        assert found.entries[4].state == UNFIT
        assert any("leave the allocation out" in line for line in found.missing())
    else:
        assert records[4]["row"] == "d_score"
        assert found.missing() == []
    for entry in records:
        assert set(NEEDED) <= set(entry)
        assert 0.3 < entry["macs_kept"] <= 0.5
        assert (
            0 <= min(entry[name] for name in MEASURED[2:]) <= max(entry[name] for name in MEASURED[2:]) <= 100
        )
        assert entry["scoring_seconds"] > 0
        assert set(entry["latency_ms"]["64"]) == {"dense", "pruned"}
        assert (entry["sensitivity_seconds"] is not None) == (entry["allocation"] == "sensitivity")
        assert entry["test_images"] == 359
        assert entry["versions"]["torch"]
        assert str(tmp_path) not in json.dumps(entry)
    assert len({entry["top1_dense"] for entry in records}) == 1
    assert said[0].startswith("l1-uniform-50off-1epochs-seed0; cells to go: 5, time unknown")
    assert any("less than a minute" in line for line in said)

    table = place(tmp_path).work / "sensitivity"
    assert len([folder for folder in table.iterdir() if folder.is_dir()]) == len(
        {entry["row"] for entry in records if entry["allocation"] == "sensitivity"}
    )


def test_what_is_there_is_not_measured_again_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = protocol(tmp_path), tmp_path / "out.json"
    ran: list[str] = []
    run = runner.run_prune
    monkeypatch.setattr(runner, "run_prune", lambda job, *rest: ran.append(job.out.name) or run(job, *rest))
    run_bench(asked, place(tmp_path), out, only=["l1"])
    assert [name[:2] for name in ran] == ["l1"]
    first = read_records(out)

    other = Place("digits", place(tmp_path).weights, tmp_path / "another folder", "cpu")  # a later machine
    found = run_bench(asked, other, out)
    assert [name[:6] for name in ran] == ["l1-uni", "random"]
    assert [entry.state for entry in found.entries] == [DONE, DONE]
    assert read_records(out)[0] == first[0]

    run_bench(asked, other, out, only=["l1"], redo=True)
    assert [name[:2] for name in ran] == ["l1", "ra", "l1"]
    again = read_records(out)
    assert len(again) == 2
    assert numbers(again) == numbers([*first, again[1]])
    assert len(list((other.work / "cells").iterdir())) == 2


def test_a_cell_of_other_weights_is_another_cell(tmp_path: Path) -> None:
    asked, here = protocol(tmp_path), place(tmp_path)
    cell = survey(asked, []).entries[1].cell
    known = {**record("l1"), "id": cell.id}
    assert [entry.state for entry in survey(asked, [known], here).entries] == [TO_DO, TO_DO]
    known["weights"] = {"file": "digits.safetensors", "sha256": here.digest}
    assert [entry.state for entry in survey(asked, [known], here).entries] == [TO_DO, DONE]
    assert [entry.state for entry in survey(asked, [record("l1"), known]).entries] == [TO_DO, DONE]


def test_a_cell_that_fails_is_recorded_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The digits CNN has no residual branches: energy fails when it looks at the network, not before.
    blocks = [
        {"name": "all rows", "rows": ["energy", "random", "l1"], "target_macs": [0.5]},
        {"name": "best", "rows": [{"best": 1, "of": "all"}], "target_macs": [0.4]},
    ]
    asked, here, out = protocol(tmp_path, blocks=blocks), place(tmp_path), tmp_path / "out.json"
    run, ran = runner.run_prune, []

    def out_of_memory(job: Any, *rest: Any) -> Any:
        ran.append(job.choices[0].criterion)
        if job.choices[0].criterion == "random":
            raise RuntimeError("CUDA out of memory\nmore")
        return run(job, *rest)

    monkeypatch.setattr(runner, "run_prune", out_of_memory)
    said: list[str] = []
    found = run_bench(asked, here, out, say=said.append)
    assert ran == ["energy", "random", "l1", "l1"]  # the best of those that ran
    assert [entry.state for entry in found.entries] == [FAILED, FAILED, DONE, DONE]
    energy, random, l1, best = read_records(out)
    assert "residual branches" in energy["failed"]
    assert random["failed"] == "RuntimeError: CUDA out of memory"
    assert energy["top1_finetuned"] is None
    assert set(NEEDED) <= set(energy)
    assert l1["row"] == best["row"] == "l1"
    assert any("energy-uniform-50off-1epochs-seed0: failed: ModelError" in line for line in found.missing())
    assert "Traceback" in next((here.work / "failed").glob("random*")).read_text()

    monkeypatch.setattr(runner, "run_prune", run)
    found = run_bench(asked, here, out, only=["random"])
    assert [entry.state for entry in found.entries] == [DONE] * len(found.entries)
    assert "failed" not in read_records(out)[1]


@pytest.mark.parametrize("ending", ["finishes", "fails", "dies"])
def test_a_cell_of_another_process_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    blocks = [*PROTOCOL["blocks"], {"name": "best", "rows": [{"best": 1, "of": "all"}], "target_macs": [0.4]}]
    asked, here, out = protocol(tmp_path, blocks=blocks), place(tmp_path), tmp_path / "out.json"
    run, ran = runner.run_prune, []
    monkeypatch.setattr(runner, "run_prune", lambda job, *rest: ran.append(job.out.name) or run(job, *rest))
    other = ExitStack()
    theirs = other.enter_context(first_free(survey(asked, []).left, here))
    assert theirs is not None
    assert theirs.row == "random"

    def end(seconds: float) -> None:  # instead of waiting for it
        assert seconds == runner._PATIENCE
        if ending != "dies":
            metrics = record("random", validation=99.0, failed="out of memory" if ending == "fails" else None)
            metrics |= {"id": theirs.id, "weights": {"file": "", "sha256": here.digest}}
            runner.keep(metrics, theirs, here, out)
        other.close()

    monkeypatch.setattr(runner.time, "sleep", end)
    said: list[str] = []
    found = run_bench(asked, here, out, say=said.append)
    assert any(line.startswith("waiting for other processes") for line in said)
    assert len(ran) == len(set(ran))
    mine = [name.split("-uniform-")[0] for name in ran]
    expected = {"finishes": ["l1", "random"], "fails": ["l1", "l1"], "dies": ["l1", "random", mine[-1]]}
    assert mine == expected[ending]
    assert [entry.state for entry in found.entries] == [FAILED if ending == "fails" else DONE, DONE, DONE]


def test_redo_leaves_out_what_another_process_has_just_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, here, out = protocol(tmp_path), place(tmp_path), tmp_path / "out.json"
    cells, ran = survey(asked, []).left, list[str]()

    def measured(cell: Cell, *_: Any) -> Record:
        return {**record(cell.row), "id": cell.id, "weights": {"file": "", "sha256": here.digest}}

    def attempt(cell: Cell, *_: Any) -> Record:
        ran.append(cell.row)
        return measured(cell)

    def attempt_beside_another(cell: Cell, *_: Any) -> Record:
        runner.keep(measured(cells[1]), cells[1], here, out)
        return attempt(cell)

    monkeypatch.setattr(runner, "_attempt", attempt)
    run_bench(asked, here, out)
    run_bench(asked, here, out, redo=True)
    assert ran == ["random", "l1", "random", "l1"]
    monkeypatch.setattr(runner, "_attempt", attempt_beside_another)
    run_bench(asked, here, out, redo=True)
    assert ran[4:] == ["random"]


def test_processes_take_different_cells(tmp_path: Path) -> None:
    cells, here = survey(protocol(tmp_path), []).left, place(tmp_path)
    with first_free(cells, here) as first:
        with first_free(cells, here) as second, first_free(cells, here) as third:
            assert [first, second, third] == [cells[0], cells[1], None]
        with first_free(cells, here) as again:
            assert again == cells[1]
    with first_free(cells, here) as again:
        assert again == cells[0]


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = protocol(tmp_path, training={**PROTOCOL["training"], "epochs": 2})
    here, out = place(tmp_path), tmp_path / "out.json"
    script = Path(__file__).with_name("killed_bench.py")
    threads = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # they decide how sums are rounded
    command = [sys.executable, script, tmp_path / "tiny.json", here.weights, here.work, out]
    killed = subprocess.run(command, env=threads)
    assert killed.returncode == -signal.SIGKILL
    assert [entry["row"] for entry in read_records(out)] == ["random"]
    assert [entry.state for entry in survey(asked, read_records(out), here).entries] == [DONE, STARTED]

    said: list[str] = []
    run_bench(asked, here, out, say=said.append)
    assert any(line.startswith("continuing the run in") for line in said)
    resumed = read_records(out)
    assert resumed[1]["seconds"] is None  # the time before the kill is not known
    assert resumed[1]["scoring_seconds"] is not None  # the choice was complete
    whole = tmp_path / "whole"
    run_bench(asked, Place("digits", here.weights, whole / "work", "cpu"), whole / "out.json")
    assert numbers(resumed) == numbers(read_records(whole / "out.json"))


SENSITIVITY = [{**PROTOCOL["blocks"][0], "rows": ["l1"], "allocations": ["sensitivity"]}]


def test_an_interrupted_run_goes_on_from_other_folders_and_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = protocol(tmp_path, blocks=SENSITIVITY, training={**PROTOCOL["training"], "epochs": 2})
    here, out, save = place(tmp_path), tmp_path / "out.json", loop.save_checkpoint

    def interrupt(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_bench(asked, here, out)
    there = tmp_path / "there"
    shutil.move(here.work, there / "work")
    shutil.move(here.weights, there / "renamed.safetensors")
    said: list[str] = []
    run_bench(asked, Place("digits", there / "renamed.safetensors", there / "work"), out, say=said.append)
    assert any(line.startswith("continuing the run in") for line in said)
    (entry,) = read_records(out)
    assert entry["top1_finetuned"] is not None


def test_what_another_version_left_is_begun_again(tmp_path: Path) -> None:
    asked, here, out = protocol(tmp_path, blocks=SENSITIVITY), place(tmp_path), tmp_path / "out.json"
    (cell,) = survey(asked, []).left
    for folder in (cell.folder(here), cell.table_folder(here)):
        work = folder.with_name(folder.name + ".work")
        work.mkdir(parents=True)
        (work / "job.json").write_text('{"source": {"model": "older"}}')
    said: list[str] = []
    run_bench(asked, here, out, say=said.append)
    assert sum(line.endswith("starting over") and "--force" not in line for line in said) == 2
    assert "failed" not in read_records(out)[0]


@pytest.mark.parametrize("cause", [None, OSError("no space left")])
def test_a_checkpoint_of_other_hardware_is_begun_again_but_not_one_that_a_full_disk_interrupts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: OSError | None
) -> None:
    asked, here, out = (
        protocol(tmp_path, blocks=[{**SENSITIVITY[0], "allocations": ["uniform"]}]),
        place(tmp_path),
        tmp_path / "out.json",
    )
    (cell,) = survey(asked, []).left
    cell.job(here).work.mkdir(parents=True)
    errors = [TrainingError("cannot resume: precision differs; train anew")]
    run = runner.run_prune

    def refuse_once(*arguments: Any) -> Any:
        if errors:
            raise errors.pop() from cause
        return run(*arguments)

    monkeypatch.setattr(runner, "run_prune", refuse_once)
    run_bench(asked, here, out)
    assert ("failed" in read_records(out)[0]) == cell.job(here).work.exists() == (cause is not None)


@pytest.mark.parametrize("where", ["finished_record", "write_json", "add_records"])
def test_a_run_that_ends_between_two_files_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    blocks = [{**PROTOCOL["blocks"][0], "rows": ["l1"]}]
    asked, here, out = protocol(tmp_path, blocks=blocks), place(tmp_path), tmp_path / "out.json"
    with monkeypatch.context() as patch:
        patch.setattr(runner, where, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_bench(asked, here, out)
    assert not out.exists()
    monkeypatch.setattr(runner, "run_prune", lambda *_: pytest.fail("the run was complete"))
    run_bench(asked, here, out)
    (entry,) = read_records(out)
    assert entry["top1_finetuned"] is not None
    assert (entry["seconds"] is None) == (where != "add_records")


def test_the_time_of_an_interrupted_choice_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, here, out = protocol(tmp_path), place(tmp_path), tmp_path / "out.json"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Run, "_plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_bench(asked, here, out)
    run_bench(asked, here, out)
    random, l1 = read_records(out)
    assert random["scoring_seconds"] is None
    assert l1["scoring_seconds"] > 0


def test_the_best_rows_of_another_results_file(tmp_path: Path) -> None:
    source = {"best": 2, "of": "all", "from": "results/criteria_other.json"}
    asked = protocol(tmp_path, blocks=[{"name": "b", "rows": ["l1", source], "target_macs": [0.5]}])
    found = survey(asked, [])
    assert [entry.cell.row for entry in found.entries] == ["l1"]
    assert "criteria_other.json, which is not there" in found.waiting[0]
    assert any("(not run)" in line for line in found.missing())
    (tmp_path / "results").mkdir()
    other = [record("l1", validation=99), record("taylor", validation=80), record("d_step", validation=90)]
    (tmp_path / "results" / "criteria_other.json").write_text(json.dumps(other))
    assert [entry.cell.row for entry in survey(asked, []).entries] == ["l1", "d_step", "taylor"]


def test_the_best_wait_until_all_rows_have_been_tried(tmp_path: Path) -> None:
    blocks = [*PROTOCOL["blocks"], {"name": "best", "rows": [{"best": 1, "of": "all"}], "target_macs": [0.4]}]
    asked = protocol(tmp_path, blocks=blocks)
    ids = [entry.cell.id for entry in survey(asked, []).entries]
    one = {**record("random", validation=30), "id": ids[0]}
    assert "waits for 1 of 2 cells of 'all rows'" in survey(asked, [one]).waiting[0]
    both = [one, {**record("l1", validation=20), "id": ids[1]}]
    assert survey(asked, both).entries[-1].cell.row == "random"


def test_the_estimate_is_that_of_an_epoch_on_the_last_machine(tmp_path: Path) -> None:
    cells = survey(protocol(tmp_path), []).left
    assert seconds_left(cells, []) is None
    assert seconds_left([], []) == 0
    timed = [
        record("l1", model="digits_cnn", seconds=9999.0, hardware="old"),
        record("l1", model="cifar_resnet56", seconds=9999.0),
        record("l1", model="digits_cnn", seconds=30.0, epochs=15),
        record("l2", model="digits_cnn", seconds=60.0, epochs=15),
        record("random", model="digits_cnn", seconds=None),
    ]
    assert seconds_left(cells, timed) == pytest.approx(2 * 1 * 3.0)
    assert [runner.time_left(x) for x in (None, 59, 61, 3661)] == [
        "time unknown until one is finished", "less than a minute", "about 1 min", "about 1 h 01 min",
    ]  # fmt: skip


def test_bad_input_is_refused_before_any_work(tmp_path: Path) -> None:
    asked, here, out = protocol(tmp_path), place(tmp_path), tmp_path / "out.json"
    with pytest.raises(BenchError, match="measured on digits; got the data 'cifar10'"):
        run_bench(asked, Place("cifar10", here.weights, here.work), out)
    with pytest.raises(BenchError, match="no file; expected the weights of digits_cnn"):
        run_bench(asked, Place("digits", tmp_path / "none", here.work), out)
    with pytest.raises(BenchError, match="--only 'randon' names no row.*did you mean 'random'"):
        run_bench(asked, here, out, only=["randon"])
    out.write_text('{"cells": []}')
    with pytest.raises(BenchError, match="expected a list of cells"):
        run_bench(asked, here, out)
    out.write_text('[{"criterion": "l1"}]')
    with pytest.raises(BenchError, match="a cell without 'id'"):
        run_bench(asked, here, out)
    assert not here.work.exists()
    assert save_weights(tmp_path).exists()
