from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from dscore_plugin.errors import ArtifactError, CriterionError
from dscore_plugin.finetuning import (
    PrunedNetwork,
    add_training_options,
    make_once,
    open_pruned,
    open_run,
    prune_network,
    read_training_options,
)
from dscore_plugin.models import create_model
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.history import EpochRecord, TrainingResult


def parsed(*arguments: str, **defaults: object) -> TrainingConfig:
    parser = argparse.ArgumentParser()
    add_training_options(parser, **defaults)
    return read_training_options(parser.parse_args(arguments))


def test_every_field_has_an_option_with_its_default() -> None:
    assert parsed("--epochs", "3") == TrainingConfig(3)
    assert parsed("--epochs", "3", batch_size=256) == TrainingConfig(3, batch_size=256)
    config = TrainingConfig(
        7, learning_rate=0.5, momentum=0.8, nesterov=True, weight_decay=0.1, schedule="steps", milestones=(2, 4),
        gamma=0.3, warmup_epochs=0.5, label_smoothing=0.1, distill=0.2, distill_temperature=3.0,
        distill_features=0.4, mixup=0.6, cutmix=0.7, ema=0.9, batch_size=10, accumulate=2, precision="float32",
        seed=4, validate_every=3, workers=1, track="wandb",
    )  # fmt: skip
    arguments = []
    for option in fields(TrainingConfig):
        value = getattr(config, option.name)
        assert value != option.default, "give every field a value of its own here"
        arguments.append(f"--{option.name.replace('_', '-')}")
        if not isinstance(value, bool):
            arguments += [str(number) for number in (value if isinstance(value, tuple) else (value,))]
    assert parsed(*arguments) == config


def test_epochs_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed()
    assert "--epochs" in capsys.readouterr().err


def test_the_help_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("cosine|steps|constant", "tensorboard|wandb", "auto|float32|bfloat16", "--no-nesterov"):
        assert text in shown


def pruned() -> PrunedNetwork:
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_chans": 1}
    model = create_model("digits_cnn", **arguments)
    return prune_network(
        model, (1, 8, 8), "d_score", target_macs=0.5, architecture="digits_cnn", model_args=arguments
    )


def test_a_network_keeps_its_record_from_folder_to_folder(tmp_path: Path) -> None:
    network = pruned()
    network = replace(
        network, metrics={**network.metrics, "validation_top1": 99.0}
    )  # of an earlier fine-tuning
    network.save(tmp_path / "a")
    history = TrainingResult((EpochRecord(1, 0.5, 50.0, 74.0, 0.1, 1.0),))
    again = open_pruned(tmp_path / "a")
    again.save(tmp_path / "b", top1=75.0, result=history, command="python script.py")
    last = open_pruned(tmp_path / "b")
    assert last.record == again.record
    assert last.record["plan"]["removals"]
    assert last.record["history"]
    assert last.metrics["finetuned"] == {**network.metrics["pruned"], "top1": 75.0}
    assert again.metrics["finetuned"] is None
    assert (again.metrics["validation_top1"], last.metrics["validation_top1"]) == (99.0, 74.0)
    assert json.loads((tmp_path / "b" / "history.json").read_text()) == history.rows()
    assert "python script.py" in (tmp_path / "b" / "report.md").read_text()
    x = torch.randn(2, 1, 8, 8)
    assert last.model(x).equal(network.model.eval()(x))


def test_a_network_is_made_once(tmp_path: Path) -> None:
    calls = []

    def make() -> PrunedNetwork:
        calls.append(1)
        return pruned()

    first, second = (make_once(tmp_path / "pruned", make) for _ in range(2))
    assert len(calls) == 1
    assert first.model is not second.model
    assert first.record == second.record


def test_a_criterion_that_needs_data_is_named() -> None:
    with pytest.raises(CriterionError, match="needs images and labels"):
        prune_network(create_model("digits_cnn", in_chans=1), (1, 8, 8), "taylor", target_macs=0.5)


def test_an_unfinished_run_is_neither_lost_nor_mixed_up(tmp_path: Path) -> None:
    out, options = tmp_path / "out", {"model": "a", "target_macs": 0.5, "learning_rate": 0.1, "out": "out"}
    work = open_run(out, options)
    (work / "note").touch()
    with pytest.raises(ArtifactError, match="--resume, or start over with --force"):
        open_run(out, options)
    with pytest.raises(ArtifactError, match="model differ"):
        open_run(out, {**options, "model": "b"}, resume=True)
    assert (
        open_run(out, {**options, "learning_rate": 0.2}, resume=True) == work
    )  # the checkpoint looks after that
    assert (work / "note").exists()
    assert not (open_run(out, options, force=True) / "note").exists()
    out.mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        open_run(out, options, resume=True)
