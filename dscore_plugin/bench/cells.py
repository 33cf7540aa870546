"""One cell of a benchmark: a pruning run whose numbers become one record."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscore_plugin.bench.commands import changed_fields, prune_command, sensitivity_command
from dscore_plugin.bench.protocol import SCORING_FIELDS, Block, Protocol
from dscore_plugin.datasets import ImageData, load_data
from dscore_plugin.errors import BenchError
from dscore_plugin.jobs import Analysis, Choice, PruneJob, Source
from dscore_plugin.registry import CriterionInfo, get_criterion
from dscore_plugin.training.config import NO_EFFECT, TrainingConfig

_TABLE_SEED = 0  # of sensitivity tables that all seeds share


class SharedImages(Source):
    """A source whose images stay decoded from one run to the next."""

    def load_images(self) -> ImageData:
        """Load the images, or take those of the run before, as fresh."""
        data = _images(self.data, self.seed, self.image_size)
        data.train.set_epoch(0)
        return data


@functools.lru_cache(maxsize=1)
def _images(spec: str, seed: int, image_size: int | None) -> ImageData:
    return load_data(spec, seed=seed, image_size=image_size)


@dataclass(frozen=True)
class Place:
    """Where a benchmark finds its network and images, and where it works.

    Attributes:
        data: as in :func:`dscore_plugin.datasets.load_data`.
        weights: a safetensors file.
        work: the folder of runs, tables and finished cells.
        device: ``"auto"`` takes a GPU where there is one.
    """

    data: str
    weights: Path
    work: Path
    device: str = "auto"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights; cells measured with others are other cells."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def check(self, protocol: Protocol) -> None:
        """Refuse other data than the protocol's, and weights that are no file; raise BenchError."""
        if self.data.partition(":")[0] != protocol.data:
            raise BenchError(f"{protocol.name} is measured on {protocol.data}; got the data {self.data!r}")
        if not self.weights.is_file():
            raise BenchError(f"{self.weights} is no file; expected the weights of {protocol.model}")

    def source(self, model: str, seed: int) -> Source:
        """Return the network and the images of a run."""
        return SharedImages(model, self.data, str(self.weights), seed=seed, device=self.device)


@dataclass(frozen=True)
class Cell:
    """One run: a row, an allocation, a target and a seed, under the schedule of its block.

    Attributes:
        protocol: it belongs to.
        block: of the protocol.
        row: its name.
        allocation: of the removals to the layers.
        target_macs: share of the MACs to keep.
        seed: of the validation split, the training and everything random.
    """

    protocol: Protocol
    block: Block
    row: str
    allocation: str
    target_macs: float
    seed: int

    @property
    def info(self) -> CriterionInfo:
        """What is known of the criterion."""
        return get_criterion(self.protocol.settings(self.row)["criterion"])

    @property
    def training(self) -> dict[str, Any]:
        """What the training is asked for; ``epochs`` are those of all rounds."""
        return {**self.protocol.training, **self.block.training}

    @property
    def epochs(self) -> int:
        """Epochs of fine-tuning, of all rounds together."""
        return int(self.training["epochs"])

    @property
    def distill(self) -> float:
        """Share of the dense network's soft targets."""
        return float(self.training.get("distill", 0))

    @property
    def analysis(self) -> Analysis:
        """How the sensitivity of the layers is measured."""
        ratios = {name: tuple(value) for name, value in self.protocol.analysis.items() if name == "ratios"}
        return Analysis(**{**self.protocol.analysis, **ratios})

    @property
    def shares_table(self) -> bool:
        """Whether the sensitivity table is measured before the run; rounds measure one of their own in each."""
        return self.allocation == "sensitivity" and self.block.rounds == 1

    @property
    def table_seed(self) -> int:
        """The seed of the sensitivity table: one for all, unless the scores depend on it."""
        return self.seed if self.info.seeded or self.info.needs_data else _TABLE_SEED

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it another cell than others, on any machine; defaults are left out, so that they may grow."""
        choice = changed_fields(self.choice(), but=("table", "analysis"))
        training = changed_fields(TrainingConfig(**self.training), but=("seed", *NO_EFFECT))
        identity = {"model": self.protocol.model, "data": self.protocol.data, "seed": self.seed}
        identity |= {"choice": choice, "training": training}
        identity |= {"recalibrate": "as trained" if self.protocol.recalibrate else False}
        if self.block.rounds > 1:
            identity |= {"rounds": self.block.rounds, "round_epochs": self.block.round_epochs}
        if self.allocation == "sensitivity":
            identity |= {"analysis": changed_fields(self.analysis), "table_seed": self.table_seed}
        return identity

    @functools.cached_property
    def id(self) -> str:
        """Ten characters that stand for the identity."""
        return _digest(self.identity)

    @property
    def name(self) -> str:
        """The cell in one word, for folders and lists."""
        removed = f"{100 * (1 - self.target_macs):.4g}".replace(".", "_")
        words = [self.row, self.allocation, f"{removed}off", f"{self.epochs}epochs"]
        words += [f"{self.block.rounds}rounds"] if self.block.rounds > 1 else []
        words += ["distilled"] if self.distill else []
        return "-".join([*words, f"seed{self.seed}"])

    def choice(self, table: str | None = None) -> Choice:
        """Return how it is chosen what leaves; ``table`` is a sensitivity table measured before."""
        return Choice(
            target_macs=self.target_macs,
            allocation=self.allocation,
            table=table,
            analysis=self.analysis if self.allocation == "sensitivity" else Analysis(),
            **self.protocol.settings(self.row),
        )

    def table_choice(self) -> Choice:
        """Return what a sensitivity table is measured for: the criterion alone."""
        settings = self.protocol.settings(self.row)
        return Choice(analysis=self.analysis, **{k: v for k, v in settings.items() if k in SCORING_FIELDS})

    def table_folder(self, place: Place) -> Path:
        """Return where its sensitivity table lies, together with all cells that may use it."""
        choice = changed_fields(self.table_choice(), but=("analysis",))
        settings = {"choice": choice, "analysis": changed_fields(self.analysis), "seed": self.table_seed}
        settings |= {"model": self.protocol.model, "weights": place.digest}
        return place.work / "sensitivity" / f"{self.row}-seed{self.table_seed}-{_digest(settings)}"

    def folder(self, place: Place) -> Path:
        """Return the folder of its run, another one for other weights."""
        return place.work / "runs" / f"{self.name}-{self.id}-{place.digest[:8]}"

    def job(self, place: Place) -> PruneJob:
        """Return the run; its folder's name need not exist."""
        table = str(self.table_folder(place) / "sensitivity.json") if self.shares_table else None
        last = self.epochs - (self.block.rounds - 1) * self.block.round_epochs
        return PruneJob(
            place.source(self.protocol.model, self.seed),
            (self.choice(table),),
            self.folder(place),
            rounds=self.block.rounds,
            training=self._config(last),
            round_training=self._config(self.block.round_epochs if self.block.rounds > 1 else last),
            recalibrate=self.protocol.recalibrate,
            resume=True,
            command=self.command(place.data),
        )

    def command(self, data: str) -> str:
        """Return the command line that anyone can run to get this cell, with ``PATH`` for a folder of images."""
        shown = Place(_shown(data), Path(self.protocol.weights), Path())
        source = Source(self.protocol.model, shown.data, self.protocol.weights, seed=self.seed)
        table = Path("sensitivity") / f"{self.row}-seed{self.table_seed}"
        choice = self.choice(str(table / "sensitivity.json") if self.shares_table else None)
        rounds = (self.block.rounds, self.block.round_epochs)
        last = self._config(self.epochs - (rounds[0] - 1) * rounds[1])
        command = prune_command(
            source, choice, last, *rounds, recalibrate=self.protocol.recalibrate, out=f"runs/{self.name}"
        )
        if not self.shares_table:
            return command
        measured = Source(self.protocol.model, shown.data, self.protocol.weights, seed=self.table_seed)
        return f"{sensitivity_command(measured, self.table_choice(), str(table))} && {command}"

    def _config(self, epochs: int) -> TrainingConfig:
        """Return the training of so many epochs; the validation images are looked at once, at its end."""
        settings = {**self.training, "epochs": epochs, "validate_every": epochs, "seed": self.seed}
        return TrainingConfig(**settings)


def _shown(data: str) -> str:
    name, colon, _ = data.partition(":")
    return f"{name}:PATH" if colon else name


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
