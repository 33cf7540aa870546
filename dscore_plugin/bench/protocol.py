"""What a benchmark runs, read from a JSON file: networks, rows, schedules, seeds.

``benchmarks/criteria/*.json`` are such files; docs/benchmark.md describes their fields.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
_NOT_OF_ROWS = frozenset(item.name for item in fields(Choice)) - frozenset(ROW_FIELDS)
_Kind = TypeVar("_Kind")
_WORDS: dict[Any, str] = {
    str: "text", bool: "true or false", int: "a whole number", float: "a number", Mapping: "an object",
}  # fmt: skip


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
    try:
        blocks = tuple(_block(entry) for entry in _list(content, "blocks"))
        read = {**content, "blocks": blocks, "folder": path.parent}
        protocol: Protocol = _read(Protocol, read, "the protocol")
        _check(protocol)
    except DScoreError as error:
        raise BenchError(f"{path}: {error}") from error
    return protocol


def _block(content: Any) -> Block:
    if not isinstance(content, dict):
        raise BenchError(f"the block {content!r} is no object")
    given = {
        name: _list(content, name) for name in ("target_macs", "seeds", "allocations") if name in content
    }
    rows = tuple(entry if isinstance(entry, str) else _best(entry) for entry in _list(content, "rows"))
    return _read(Block, {**content, **given, "rows": rows}, f"the block {content.get('name')!r}")


def _list(content: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    value = content.get(name)
    if not isinstance(value, list) or not value:
        raise BenchError(f"{name}={value!r} is not valid; expected a list that is not empty")
    return tuple(value)


def _best(entry: Any) -> Best:
    if not isinstance(entry, dict):
        raise BenchError(f'the row {entry!r} is not valid; expected a name, or {{"best": 3, "of": "ours"}}')
    return _read(Best, {"source" if key == "from" else key: value for key, value in entry.items()}, "the row")


def _read(kind: type[_Kind], content: Mapping[str, Any], what: str, but: Collection[str] = ()) -> _Kind:
    """Build a dataclass from an object of JSON; refuse what :func:`_check_fields` refuses, and missing fields."""
    _check_fields(kind, content, what, but)
    needed = [
        item.name
        for item in fields(kind)  # type: ignore[arg-type]
        if item.default is MISSING and item.default_factory is MISSING
    ]
    missing = [name for name in needed if name not in content]
    if missing:
        raise BenchError(f"{what} lacks {' and '.join(map(repr, missing))}")
    return kind(**content)


def _check_fields(kind: type[Any], content: Mapping[str, Any], what: str, but: Collection[str]) -> None:
    """Refuse fields that a dataclass does not have, or that are named here, and values of other types."""
    known = {name: hint for name, hint in get_type_hints(kind).items() if name not in but}
    for name, value in content.items():
        if name not in known:
            raise BenchError(f"{what} has no field {name!r}{did_you_mean(name, known)}")
        hint = _without_none(known[name])
        if not _fits(value, hint):
            got = "null" if value is None else repr(value)
            raise BenchError(f"{what} has {name}={got}; expected {_describe(hint)}, or no such field")


def _without_none(hint: Any) -> Any:
    """Return what a field holds where it holds something: ``null`` is no value of a protocol, as no option says it."""
    parts = get_args(hint)
    return next(part for part in parts if part is not NoneType) if NoneType in parts else hint


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON, or one made of it, is of the type of a field."""
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # which one, the dataclass checks itself
    if isinstance(value, bool):
        return hint is bool
    if get_origin(hint) is Mapping:
        return isinstance(value, Mapping)
    return isinstance(value, (int, float) if hint is float else hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"a list, each {_describe(get_args(hint)[0])}"
    return _WORDS.get(get_origin(hint) or hint, "text")


def _check(protocol: Protocol) -> None:
    """Refuse what no cell could be made of; raise a DScoreError."""
    names = [block.name for block in protocol.blocks]
    if len(set(names)) < len(names):
        raise BenchError(f"blocks need names of their own; got {', '.join(names)}")
    for row, settings in protocol.rows.items():
        if not isinstance(settings, dict):
            raise BenchError(
                f"the row {row!r} is {settings!r}; expected an object of {', '.join(ROW_FIELDS)}"
            )
        _check_fields(Choice, settings, f"the row {row!r}", but=_NOT_OF_ROWS)
    _read(Analysis, protocol.analysis, "the analysis")
    for block in protocol.blocks:
        _check_block(protocol, block)


def _check_block(protocol: Protocol, block: Block) -> None:
    training = _read(TrainingConfig, {**protocol.training, **block.training}, "the training", NO_OPTIONS)
    for seed in block.seeds:
        replace(training, seed=seed)
    for target in block.target_macs:
        Choice(target_macs=target).check()
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
