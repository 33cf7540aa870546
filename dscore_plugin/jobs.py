"""What one can ask the pipeline to do: plain, frozen data that can be checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscore_plugin.datasets import ImageData, ImageSet, load_data
from dscore_plugin.errors import BudgetError, CriterionError, ModelError
from dscore_plugin.files import ensure_writable
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import Plan
from dscore_plugin.planning import GOALS, check_goals, check_layers, check_reranking, check_scoring
from dscore_plugin.registry import CriterionInfo, get_criterion
from dscore_plugin.selection.processes import Processes
from dscore_plugin.selection.sensitivity import RATIOS, Sensitivity, check_ratios
from dscore_plugin.training.config import NO_EFFECT, TrainingConfig
from dscore_plugin.training.precision import choose_device, choose_precision
from dscore_plugin.training.tracking import require_tracker

DENSE_EPOCHS = {"digits": 20}  # data small enough that a dense network is trained on the spot


@dataclass(frozen=True)
class Source:
    """Which network, which weights, which images.

    Attributes:
        model: a name in timm's registry, ours included.
        data: as in :func:`dscore_plugin.datasets.load_data`.
        weights: a safetensors file of the dense network.
        model_args: further arguments of the model.
        image_size: for image folders.
        seed: of the validation split, the training and everything random.
        device: ``"auto"`` takes a GPU where there is one, under a launcher each process its own.
    """

    model: str = "digits_cnn"
    data: str = "digits"
    weights: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    seed: int = 0
    device: str = "auto"

    def load_images(self) -> ImageData:
        """Load the images; raise DataError if they are not there."""
        return load_data(self.data, seed=self.seed, image_size=self.image_size)

    def build(self, data: ImageData) -> nn.Module:
        """Build the network for ``data`` and load its weights, if any are named; raise ModelError if they misfit."""
        torch.manual_seed(self.seed)
        model = create_model(self.model, **self.arguments(data))
        if self.weights:
            load_weights(model, Path(self.weights))
        return model.to(self.find_device())

    def arguments(self, data: ImageData) -> dict[str, Any]:
        """Return the arguments that build the network for ``data``."""
        return {"num_classes": data.num_classes, "in_chans": data.input_shape[0], **self.model_args}

    def find_device(self) -> torch.device:
        """Return the device to compute on; raise ModelError if it is unknown or not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:  # the latter without CUDA in PyTorch
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"device {self.device!r} cannot be computed on ({reason}); expected auto, cpu, or cuda, cuda:1, ... "
                "where there is a GPU"
            ) from error
        return torch.device(self.device)

    def training_device(self) -> torch.device | None:
        """Return the device to train on, or None where that is left to accelerate; raise as :meth:`find_device`."""
        return None if self.device == "auto" else self.find_device()

    def check(self) -> None:
        """Refuse a device that is not there, or that the launcher has to choose; raise a DScoreError."""
        processes = Processes()
        choose_device(self.training_device(), processes.device, processes.number)

    def check_training(self, *configs: TrainingConfig | None) -> None:
        """Refuse trainings that this machine cannot do, whether for their precision or their tracker."""
        for config in filter(None, configs):
            choose_precision(config.precision, self.find_device())
            require_tracker(config)


@dataclass(frozen=True)
class Analysis:
    """How the sensitivity of the layers is measured.

    Attributes:
        images: of the validation split; None takes all.
        ratios: shares of a layer's channels to remove.
        paper_protocol: measure on the test images, as the paper did. The choice of ratios then knows them.
        early_exit: give a layer up once it lies so many points below the dense accuracy; None measures all.
        fold_batchnorm: fold batch norm into the convolutions, for speed; the numbers differ by rounding.
        rerank: score what is left of a layer anew after every step, as the paper's code does.
    """

    images: int | None = 2000
    ratios: tuple[float, ...] = RATIOS
    paper_protocol: bool = False
    early_exit: float | None = None
    fold_batchnorm: bool = False
    rerank: bool = False

    @property
    def idle(self) -> list[str]:
        """The fields that were given a value and mean nothing, as no table is measured."""
        needed = ("rerank", "ratios") if self.rerank else ()
        return [
            item.name
            for item in fields(self)
            if item.name not in needed and getattr(self, item.name) != item.default
        ]

    def choose_images(self, data: ImageData, seed: int) -> ImageSet:
        """Return the images to measure on; raise DataError if there are none."""
        images = data.test if self.paper_protocol else data.validation.plain()
        return images if self.images is None else images.subset(min(self.images, len(images)), seed=seed)


@dataclass(frozen=True)
class Choice:
    """How it is chosen what leaves.

    Attributes:
        granularity: ``"channel"``, ``"kernel"`` or ``"layer"``; None takes the criterion's first.
        keep_layers: how many residual branches stay (granularity ``"layer"``).
        criterion_options: keyword arguments of the criterion's class.
        calibration_images: for criteria that look at data.
        table: a sensitivity table measured before, for the allocation by sensitivity; None measures one.
        analysis: how it is measured.

    The other fields are those of :func:`dscore_plugin.planning.plan_pruning`.
    """

    criterion: str = "d_score"
    granularity: str | None = None
    ratio: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    target_latency: float | None = None
    threshold: float | None = None
    max_drop: float | None = None
    keep_layers: int | None = None
    allocation: str = "uniform"
    layers: str = "all"
    min_channels: int = 1
    round_to: int | None = None
    latency_batch: int = 1
    calibration_images: int = 1024
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    table: str | None = None
    analysis: Analysis = field(default_factory=Analysis)

    @property
    def info(self) -> CriterionInfo:
        """What is known of the criterion."""
        return get_criterion(self.criterion)

    @property
    def unit(self) -> str:
        """What leaves: channels, kernels or layers."""
        return self.granularity or self.info.granularity[0]

    @property
    def goals(self) -> dict[str, float | None]:
        """All goals, those that are not given as None."""
        return {name: getattr(self, name) for name in ("ratio", *GOALS, "keep_layers")}

    @property
    def goal(self) -> tuple[str, float]:
        """The goal that is given, and its value; raise BudgetError if there is not exactly one.

        A criterion that stops by itself needs none: ``("adapt", 0)``.
        """
        if self.info.stops_by_itself and all(value is None for value in self.goals.values()):
            return "adapt", 0.0
        return check_goals(self.goals, self.allocation)

    def in_stages(self, ratios: Mapping[str, float | None]) -> tuple[Choice, ...]:
        """Return one choice for each granularity that has a ratio of its own; this one alone if none has.

        Raises:
            BudgetError: if this choice has a goal, too.
        """
        stages = {unit: ratio for unit, ratio in ratios.items() if ratio is not None}
        goals = [name for name, value in self.goals.items() if value is not None]
        if stages and (goals or self.granularity):
            raise BudgetError(
                f"ratios of their own for {' and '.join(stages)}s leave no room for {goals or ['granularity']}"
            )
        return tuple(replace(self, granularity=unit, ratio=ratio) for unit, ratio in stages.items()) or (
            self,
        )

    def check(self) -> None:
        """Refuse what can be refused without a model; raise a DScoreError."""
        info, (goal, _) = self.info, self.goal
        if self.unit not in info.granularity:
            raise CriterionError(
                f"criterion {info.name!r} prunes {' or '.join(f'{unit}s' for unit in info.granularity)}, "
                f"not {self.unit}s; see: dscore list"
            )
        if (goal == "keep_layers") != (self.unit == "layer") and goal == "keep_layers":
            raise BudgetError(
                f"keep_layers is for criteria that prune layers; {info.name!r} prunes {self.unit}s"
            )
        if (info.kind == "selector" or self.unit != "channel") and self.allocation != "uniform":
            raise BudgetError(f"{info.name!r} chooses {self.unit}s by itself; leave the allocation out")
        if self.unit == "kernel" and goal != "ratio":
            raise BudgetError(f"kernels are removed by a ratio; got {goal}")
        if info.kind == "selector":
            info.build_selector(**self.criterion_options).check(self.unit)
        elif self.unit == "channel":
            self.check_scoring()
        elif self.criterion_options:
            raise CriterionError(
                f"criterion {info.name!r} takes no options where it prunes {self.unit}s; leave out "
                f"{', '.join(self.criterion_options)}"
            )
        check_layers(self.layers)
        check_ratios(self.analysis.ratios)
        self._check_table()

    def check_scoring(self) -> None:
        """Refuse what cannot score channels: a criterion, its options, layers, ratios; raise a DScoreError."""
        check_scoring(self.info)
        self.info.build(**self.criterion_options)
        check_layers(self.layers)
        check_ratios(self.analysis.ratios)
        if self.analysis.rerank:
            check_reranking(self.info)

    def _check_table(self) -> None:
        """Refuse a table that cannot be read, or one and its options where the allocation does not ask for any."""
        if self.allocation == "sensitivity":
            if self.table is not None:
                Sensitivity.load(self.table)
            return
        idle = [*(["a sensitivity table"] if self.table is not None else []), *self.analysis.idle]
        if idle:
            raise BudgetError(
                f"the allocation {self.allocation!r} makes no use of {', '.join(idle)}; add --allocation sensitivity, "
                "or leave it out"
            )


class Job:
    """What jobs have in common that leave a folder and can be interrupted; they are dataclasses.

    Attributes:
        out: the folder of the result.
    """

    out: Path

    @property
    def work(self) -> Path:
        """Where checkpoints lie until the result is complete."""
        return self.out.with_name(self.out.name + ".work")

    def logs(self, checkpoint: Path) -> Path:
        """Say where the tracker of the training with this checkpoint writes; logs stay when the work is done."""
        return self.out.with_name(self.out.name + ".logs") / checkpoint.relative_to(self.work)

    def identity(self) -> dict[str, Any]:
        """What an interrupted run and its continuation must have in common."""
        content = asdict(  # type: ignore[call-overload]
            self, dict_factory=lambda items: {name: value for name, value in items if name not in NO_EFFECT}
        )
        for key in ("force", "resume", "command", "out"):
            del content[key]
        return content


@dataclass(frozen=True)
class PruneJob(Job):
    """Everything that ``dscore prune`` is asked to do.

    Attributes:
        source: network, weights, images.
        choices: what leaves in each stage; every stage ends with its fine-tuning.
        out: the folder of the artifact.
        rounds: in how many steps the goal of the only choice is approached; each is a stage.
        plan: a plan to apply, instead of choosing.
        training: of the fine-tuning after the last stage; None leaves it out.
        round_training: of the fine-tuning after each stage before.
        dense_training: of the dense network where there are no weights.
        recalibrate: whether batch norm's statistics are measured again after the removal.
        force: replace an existing artifact.
        resume: go on with an interrupted run.
        command: the command line, for the report.
    """

    source: Source
    choices: tuple[Choice, ...]
    out: Path
    rounds: int = 1
    plan: Path | None = None
    training: TrainingConfig | None = None
    round_training: TrainingConfig | None = None
    dense_training: TrainingConfig | None = None
    recalibrate: bool = True
    force: bool = False
    resume: bool = False
    command: str = ""

    @property
    def stages(self) -> tuple[Choice, ...]:
        """One choice for each stage."""
        return self.choices * self.rounds

    def identity(self) -> dict[str, Any]:
        """What an interrupted run and its continuation must have in common."""
        return {**super().identity(), "plan": str(self.plan) if self.plan else None}

    def training_after(self, stage: int) -> TrainingConfig | None:
        """Return the fine-tuning after a stage, counted from 1."""
        return self.training if stage == len(self.stages) else self.round_training

    @property
    def distils(self) -> bool:
        """Whether any fine-tuning learns from the dense network."""
        configs = [self.training_after(number) for number in range(1, len(self.stages) + 1)]
        return any(config.distils for config in configs if config)

    def check(self) -> None:
        """Refuse what can be refused before any work starts; raise a DScoreError."""
        ensure_writable(self.out, self.force)
        if self.rounds < 1 or (self.rounds > 1 and (self.plan is not None or len(self.choices) > 1)):
            raise BudgetError(f"rounds divide the goal of one choice; got {self.rounds} rounds")
        if self.plan is not None:
            Plan.load(self.plan)
        else:
            for choice in self.choices:
                choice.check()
                if self.rounds > 1 and choice.goal[0] in ("threshold", "max_drop", "adapt"):
                    raise BudgetError(
                        f"{choice.goal[0]} cannot be approached in rounds; give a share instead"
                    )
                if len(self.stages) > 1 and choice.table is not None:
                    raise BudgetError("a sensitivity table holds for the first stage only; leave it out")
        if self.source.weights is None and self.dense_training is None:
            raise ModelError(
                f"{self.source.model} has no weights; pass --weights FILE, or --dense-epochs N to train it first"
            )
        self.source.check()
        self.source.check_training(self.training, self.round_training, self.dense_training)


def amount_in_round(goal: str, amount: float, number: int, rounds: int, left: float, things: int) -> float:
    """Return what to ask of one round, so that the last one meets the goal.

    Args:
        goal: the name of the goal; ``"cumulative_ratio"`` for a ratio that counts what earlier rounds removed.
        amount: its value for the whole run.
        number: of this round, from 1.
        rounds: how many there are.
        left: share of the dense network's MACs (parameters for ``target_params``) that is left now.
        things: residual branches that are left now, for ``keep_layers``.

    Returns:
        For ``target_macs`` and ``target_params`` a share of what is left now: the dense network shrinks by the
        same factor each time. For ``ratio`` and ``target_latency`` an equal factor each time, and for
        ``cumulative_ratio`` what these make together so far. For ``keep_layers`` the branches that stay after this
        round, an equal number leaving each time.
    """
    if goal in ("target_macs", "target_params"):
        return min(1.0, float(amount ** (number / rounds)) / left)
    if goal == "target_latency":
        return float(amount ** (1 / rounds))
    if goal in ("ratio", "cumulative_ratio"):
        return float(1 - (1 - amount) ** ((1 if goal == "ratio" else number) / rounds))
    return things - -(-(things - amount) // (rounds - number + 1))


def default_out(model: str, criterion: str) -> Path:
    """Return where an artifact goes if nobody says."""
    return Path("runs") / f"{model}-{criterion}"


def require_one(folder: Path | None, model: str | None) -> None:
    """Refuse an evaluation of nothing, or of two things at once."""
    if (folder is None) == (model is None):
        raise BudgetError("name either an artifact's folder or --model with --weights")
