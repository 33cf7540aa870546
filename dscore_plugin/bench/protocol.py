"""What a benchmark runs, read from a JSON file: networks, rows, schedules, seeds.

``benchmarks/criteria/*.json`` are such files; docs/benchmark.md describes their fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from dscore_plugin.errors import BenchError, DScoreError, did_you_mean
from dscore_plugin.files import read_json
from dscore_plugin.jobs import Analysis, Choice
from dscore_plugin.planning import ALLOCATIONS
from dscore_plugin.registry import get_criterion
from dscore_plugin.training.config import TrainingConfig

POOLS = ("ours", "all")
SCORING_FIELDS = ("criterion", "criterion_options", "calibration_images", "layers")
NO_OPTIONS = ("momentum", "nesterov", "gamma", "warmup_epochs", "seed")  # not to be had by a cell's command
ROW_FIELDS = (*SCORING_FIELDS, "granularity", "min_channels", "round_to")
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Best:
    """The best rows of cells that are finished, by validation top-1 after fine-tuning; see ``ranking.best_rows``.

    Attributes:
        best: how many.
        of: ``"ours"`` leaves the baselines out, ``"all"`` does not.
        source: name of a block of the same protocol, or a results file beside the protocol; None takes the first
            block. In JSON it is called ``from``.
    """

    best: int
    of: str = "ours"
    source: str | None = None


@dataclass(frozen=True)
class Block:
    """Cells for every combination of rows, allocations, targets and seeds.

    Attributes:
        name: in the list of cells.
        rows: names of rows, or of criteria, and :class:`Best`.
        target_macs: shares of the MACs to keep.
        seeds: of the validation split, the training and everything random.
        allocations: ``"uniform"``, ``"sensitivity"`` or ``"global"``.
        rounds: in how many steps a target is approached.
        round_epochs: fine-tuning after every step but the last; these epochs are part of the training's.
        training: changes to the protocol's.
    """

    name: str
    rows: tuple[str | Best, ...]
    target_macs: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    allocations: tuple[str, ...] = ("uniform",)
    rounds: int = 1
    round_epochs: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """One benchmark: a trained network, one schedule of fine-tuning for all rows, and the blocks of cells.

    Attributes:
        name: of the benchmark, and of its results: ``criteria_NAME.json``.
        about: a sentence for readers.
        model: a name in timm's registry.
        data: name of the data set, without a folder.
        weights: the file's name, as the commands of the cells give it.
        training: of :class:`~dscore_plugin.training.config.TrainingConfig`; all epochs of a cell together.
        blocks: of cells.
        rows: settings of rows that are more than a criterion's name: fields of ``Choice``.
        analysis: of the sensitivity of the layers, as :class:`~dscore_plugin.jobs.Analysis`.
        recalibrate: whether batch norm's statistics are measured again before fine-tuning.
        folder: where the protocol lies; results files are named relative to it.
    """

    name: str
    about: str
    model: str
    data: str
    weights: str
    training: Mapping[str, Any]
    blocks: tuple[Block, ...]
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    analysis: Mapping[str, Any] = field(default_factory=dict)
    recalibrate: bool = True
    folder: Path = Path()

    def settings(self, row: str) -> dict[str, Any]:
        """Return the fields of ``Choice`` that a row stands for."""
        return {"criterion": row, **self.rows.get(row, {})}

    def block(self, name: str) -> Block | None:
        """Return the block of this name, if there is one."""
        return next((block for block in self.blocks if block.name == name), None)


def load_protocol(path: str | Path) -> Protocol:
    """Read a protocol.

    Args:
        path: a JSON file.

    Raises:
        BenchError: if a field is unknown, missing or out of range.
        DScoreError: if it cannot be read, or names a criterion that is unknown.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise BenchError(f"{path} holds a {type(content).__name__}; expected an object (docs/benchmark.md)")
    blocks = tuple(_block(entry, str(path)) for entry in _list(content, "blocks", str(path)))
    protocol: Protocol = _read(Protocol, {**content, "blocks": blocks, "folder": path.parent}, str(path))
    try:
        _check(protocol)
    except DScoreError as error:
        raise BenchError(f"{path}: {error}") from error
    return protocol


def _block(content: Any, where: str) -> Block:
    if not isinstance(content, dict):
        raise BenchError(f"{where} has a block that is no object: {content!r}")
    rows = tuple(
        entry if isinstance(entry, str) else _read(Best, _renamed(entry, where), where)
        for entry in _list(content, "rows", where)
    )
    lists = {
        name: tuple(content[name]) for name in ("target_macs", "seeds", "allocations") if name in content
    }
    return _read(Block, {**content, **lists, "rows": rows}, where)


def _list(content: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    value = content.get(name)
    if not isinstance(value, list) or not value:
        raise BenchError(f"{where} needs {name!r}, a list that is not empty; got {value!r}")
    return value


def _renamed(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise BenchError(f'{where} has the row {entry!r}; expected a name, or {{"best": 3, "of": "ours"}}')
    return {"source" if key == "from" else key: value for key, value in entry.items()}


def _read(kind: type[_Kind], content: Mapping[str, Any], where: str) -> _Kind:
    """Build a dataclass from an object of JSON; refuse unknown and missing fields."""
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for name in content:
        if name not in known:
            raise BenchError(
                f"{where}: {kind.__name__.lower()} has no field {name!r}{did_you_mean(name, known)}"
            )
    needed = [n for n, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    missing = [name for name in needed if name not in content]
    if missing:
        raise BenchError(f"{where}: {kind.__name__.lower()} lacks {' and '.join(map(repr, missing))}")
    return kind(**content)


def _check(protocol: Protocol) -> None:
    """Refuse what no cell could be made of; raise a DScoreError."""
    names = [block.name for block in protocol.blocks]
    if len(set(names)) < len(names):
        raise BenchError(f"blocks need names of their own; got {', '.join(names)}")
    for row, settings in protocol.rows.items():
        unknown = [name for name in settings if name not in ROW_FIELDS]
        if unknown:
            raise BenchError(f"row {row!r} has no field {unknown[0]!r}{did_you_mean(unknown[0], ROW_FIELDS)}")
    Analysis(**protocol.analysis)
    for block in protocol.blocks:
        _check_block(protocol, block)


def _check_block(protocol: Protocol, block: Block) -> None:
    settings = {**protocol.training, **block.training}
    known = [item.name for item in fields(TrainingConfig) if item.name not in NO_OPTIONS]
    for name in settings:
        if name not in known:
            raise BenchError(f"the training takes no field {name!r}{did_you_mean(name, known)}")
    training = TrainingConfig(**settings)
    if block.rounds < 1 or (block.rounds > 1) != (block.round_epochs > 0):
        raise BenchError(f"block {block.name!r} needs rounds of 2 or more with round_epochs, or neither")
    if training.epochs <= (block.rounds - 1) * block.round_epochs:
        raise BenchError(f"block {block.name!r} leaves no epoch of {training.epochs} for the last round")
    for allocation in block.allocations:
        if allocation not in ALLOCATIONS:
            raise BenchError(
                f"allocation {allocation!r} is unknown; expected one of {', '.join(ALLOCATIONS)}"
            )
    for row in block.rows:
        if isinstance(row, Best):
            _check_best(protocol, block, row)
        else:
            get_criterion(protocol.settings(row)["criterion"])
            for target in block.target_macs:
                Choice(target_macs=target, **protocol.settings(row)).check()


def _check_best(protocol: Protocol, block: Block, best: Best) -> None:
    if best.best < 1 or best.of not in POOLS:
        raise BenchError(
            f"block {block.name!r} asks for the best {best.best} of {best.of!r}; {POOLS} are known"
        )
    earlier = [other.name for other in protocol.blocks[: protocol.blocks.index(block)]]
    is_file = best.source is not None and best.source.endswith(".json")
    if not is_file and (best.source or protocol.blocks[0].name) not in earlier:
        raise BenchError(
            f"block {block.name!r} takes the best of {best.source!r}, which is no block before it and no .json file"
        )
