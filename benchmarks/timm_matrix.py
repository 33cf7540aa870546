"""What can be pruned of timm: the smallest model of each of its model files, and a second one drawn at random.

Each model runs in a process of its own, with a time limit; what is finished stays in the work folder, and the next run
goes on from there. Weights are random, and so is everything that a fresh network leaves at zero or one, since that
hides errors. Half of every group's units are drawn at random and removed; then

    graph          the channel groups are found, and some may be pruned (seconds, on one core)
    prune          the removal runs, and so does the pruned network, with outputs of the dense one's shape
    equivalent     it gives what the dense network gives with those channels masked, to 1e-4 of the largest output
    backward       training mode: every parameter has a finite gradient that had one before
    save_load      saved, loaded: bit-identical outputs
    features_only  timm's feature maps keep their widths after pruning, and are those of the mask
    onnx, export, compile   onnxruntime, torch.export, torch.compile agree with the pruned network
    stock          Torch-Pruning's own recipe at the same ratio: pruned, and the forward pass runs

    python -m benchmarks.timm_matrix --work DIR [--models a,b] [--columns graph,prune] [--second] [--jobs 2]
    python -m benchmarks.timm_matrix --work DIR --columns compile     of a sample of the families: it takes minutes
    python -m benchmarks.timm_matrix --work DIR --write     results and page from what the folder holds

The stock column depends on nothing of ours: it is taken from the results while the packages' versions are theirs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dscore_plugin.bench.hardware import processor_name
from dscore_plugin.groups import ChannelGroup
from dscore_plugin.integrations.torch_pruning.counting import count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.masking import masked
from dscore_plugin.plan import ChannelRemoval

HERE = Path(__file__).parent
MODELS = HERE / "timm_models.json"  # {family: [smallest, second]}
RESULTS = HERE / "results" / "timm_matrix.json"
CHEAP = ("graph", "prune", "forward", "equivalent", "backward", "save_load", "features_only")
COSTLY = ("onnx", "export", "stock")
COMPILED_EVERY = 5  # in the order of the families: torch.compile takes minutes
PACKAGES = ("torch", "timm", "torch-pruning")
RATIO, TOLERANCE, CLASSES = 0.5, 1e-4, 10
TIME_LIMITS = {"stock": 150, "compile": 600}
SMALLEST, SECOND = "Smallest model of each model file", "A second model, drawn at random"
WHOLE = "whole"  # the line that says how long all columns of a model took, processes and all


class FailedError(Exception):
    """A column's check did not hold; says how."""


# --- one model ---


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw what a fresh network leaves at a constant: norms, biases, statistics, layer scales, positions."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            normal = torch.randn(parameter.shape, generator=generator)
            zero = not parameter.flatten()[0] and not name.endswith(("weight", "gamma", "scale"))
            sizes = 0.5 + torch.rand(parameter.shape, generator=generator)
            signs = torch.where(torch.rand(parameter.shape, generator=generator) < 0.2, -1.0, 1.0)
            parameter.copy_(normal / 5 if zero else sizes * signs)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) / 3)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **{"num_classes": CLASSES, **options}))


def image_size(name: str) -> int:
    """Return the smallest sensible input: what timm names as the least, else the first that the network takes."""
    config = timm.get_pretrained_cfg(name) or timm.models.get_pretrained_cfg(name)
    full = max((config.input_size if config else (3, 224, 224))[1:])
    if config is None or config.fixed_input_size:
        return full
    model = timm.create_model(name, num_classes=CLASSES).eval()
    for size in (64, 96, 128, 160, 192, 224):
        if size >= full:
            break
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
            return size
        except Exception:  # whatever a network makes of an image that is too small
            continue
    return full


def choose(groups: tuple[ChannelGroup, ...]) -> list[tuple[ChannelGroup, list[int]]]:
    draw = random.Random(0)
    halves = [(group, int(RATIO * group.units + 1e-9)) for group in groups]
    return [(group, draw.sample(range(group.units), n)) for group, n in halves if n]


def removals(chosen: list[tuple[ChannelGroup, list[int]]]) -> list[ChannelRemoval]:
    return [ChannelRemoval(group.name, group.root_channels(units)) for group, units in chosen]


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


class Trial:
    """One model's way through the columns."""

    def __init__(self, name: str) -> None:
        self.name, self.size = name, image_size(name)
        self.dense = build(name)
        self.inputs = (torch.zeros(1, 3, self.size, self.size),)
        self.x = torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))
        self.facts: dict[str, Any] = {"image_size": self.size}

    def graph(self) -> None:
        start = time.perf_counter()
        self.found = PruningGraph(self.dense, self.inputs)
        self.facts["graph_seconds"] = round(time.perf_counter() - start, 2)
        self.chosen = choose(self.found.prunable)
        self.facts["groups"] = len(self.found.groups)
        self.facts["prunable"] = len(self.found.prunable)
        self.facts["protected"] = {g.name: g.protected for g in self.found.groups if g.protected}
        if not self.chosen:
            raise FailedError("nothing can be pruned")

    def prune(self) -> None:
        before = count(self.dense, self.inputs)
        self.pruned = remove_channels(copy.deepcopy(self.dense), self.inputs, removals(self.chosen))
        after = count(self.pruned, self.inputs)
        self.facts |= {"macs": [before[0], after[0]], "params": [before[1], after[1]]}
        if after[0] >= before[0]:
            raise FailedError("no MACs left the network")

    def forward(self) -> None:
        self.after = outputs(self.pruned, self.x)
        for one, other in zip(self.after, outputs(self.dense, self.x), strict=True):
            if one.shape != other.shape:
                raise FailedError(f"outputs of shape {tuple(one.shape)}, before {tuple(other.shape)}")

    def equivalent(self) -> None:
        error = distance(self.dense, self.after, self.chosen, self.x)
        self.facts["error"] = float(f"{error:.2g}")
        if not error <= TOLERANCE:
            raise FailedError(f"differs from the mask by {error:.2g} of the largest output")

    def backward(self) -> None:
        missing = set(gradients(copy.deepcopy(self.dense), self.x)) - set(
            gradients(copy.deepcopy(self.pruned), self.x)
        )
        if missing:
            raise FailedError(f"no gradient for {sorted(missing)[:3]}")

    def save_load(self) -> None:
        from dscore_plugin.artifact import load_pruned, save_pruned

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            save_pruned(self.pruned, path, architecture=self.name, model_args={"num_classes": CLASSES})
            loaded = load_pruned(path)
        if not all(torch.equal(*pair) for pair in zip(self.after, outputs(loaded, self.x), strict=True)):
            raise FailedError("a loaded network gives other outputs")

    def features_only(self) -> None:
        try:
            model = build(self.name, features_only=True, num_classes=None)
        except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, AssertionError) as error:
            raise NotApplicableError(f"timm has no feature maps of it: {first_line(error)}") from error
        shapes = [tuple(leaf.shape) for leaf in outputs(model, self.x)]
        chosen = choose(PruningGraph(model, self.inputs).prunable)
        pruned = remove_channels(copy.deepcopy(model), self.inputs, removals(chosen))
        if [tuple(leaf.shape) for leaf in outputs(pruned, self.x)] != shapes:
            raise FailedError("feature maps have other shapes")
        error = distance(model, outputs(pruned, self.x), chosen, self.x)
        if not error <= TOLERANCE:
            raise FailedError(f"differs from the mask by {error:.2g} of the largest output")
        if not chosen:
            raise FailedError("nothing can be pruned")

    def onnx(self) -> None:
        self._exported("onnx")

    def export(self) -> None:
        self._exported("torch-export")

    def _exported(self, form: str) -> None:
        from dscore_plugin.export import export_model

        with tempfile.TemporaryDirectory() as folder:
            export_model(self.pruned, self.inputs, Path(folder) / "out", form=form)

    def compile(self) -> None:
        compiled = torch.compile(copy.deepcopy(self.pruned))
        for one, other in zip(outputs(compiled, self.x), outputs(self.pruned, self.x), strict=True):
            if not (one - other).abs().max() <= TOLERANCE * other.abs().max():
                raise FailedError("a compiled network gives other outputs")

    def stock(self) -> None:
        import torch_pruning as tp

        model = build(self.name)
        ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES]
        pruner = tp.pruner.MagnitudePruner(
            model,
            self.inputs[0],
            tp.importance.MagnitudeImportance(),
            pruning_ratio=RATIO,
            ignored_layers=ignored,
        )
        pruner.step()
        outputs(model, self.x)


class NotApplicableError(Exception):
    """There is nothing to check."""


def distance(dense: nn.Module, after: list[Tensor], chosen: Any, x: Tensor) -> float:
    with masked(dense, chosen):
        silenced = outputs(dense, x)
    errors = [
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(silenced, after, strict=True)
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def gradients(model: nn.Module, x: Tensor) -> list[str]:
    model.train()
    leaves = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    torch.stack([leaf.float().square().mean() for leaf in leaves]).sum().backward()
    return [
        n for n, p in model.named_parameters() if p.grad is not None and bool(torch.isfinite(p.grad).all())
    ]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def run_columns(name: str, columns: list[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Try the columns one after the other and report each as it ends."""
    trial = Trial(name)
    for column in columns:
        start, result = time.perf_counter(), "pass"
        try:
            getattr(trial, column)()
        except NotApplicableError as error:
            result = f"none: {error}"
        except Exception as error:  # whatever a network does, it is the result
            result = str(error) if isinstance(error, FailedError) else first_line(error)
            if os.environ.get("TIMM_MATRIX_TRACEBACK"):
                traceback.print_exc()
        say(
            {
                "column": column,
                "result": result,
                "seconds": round(time.perf_counter() - start, 2),
                **trial.facts,
            }
        )
        trial.facts = {}
        if result != "pass" and column in ("graph", "prune"):
            break


def blame(name: str) -> None:
    """Remove every group by itself, and show those that go wrong."""
    trial = Trial(name)
    graph = PruningGraph(trial.dense, trial.inputs)
    for group in graph.groups:
        print(
            f"{group.name:45} {group.channels:5} {group.division:3} {len(group.members):4} {group.protected}"
        )
    for group, units in choose(graph.prunable):
        result = "ok"
        try:
            pruned = remove_channels(copy.deepcopy(trial.dense), trial.inputs, removals([(group, units)]))
            error = distance(trial.dense, outputs(pruned, trial.x), [(group, units)], trial.x)
            result = "ok" if error <= TOLERANCE else f"differs by {error:.2g}"
        except Exception as error:
            result = first_line(error)
        if result != "ok":
            print(f"{group.name:40} {result}")


# --- many models ---


def lines_of(work: Path, name: str) -> list[dict[str, Any]]:
    path = work / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def stock_result(name: str) -> str | None:
    """Return what Torch-Pruning's recipe gave before, with the same versions of everything."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    row = next((row for row in rows if row["model"] == name and row["versions"] == versions()), None)
    if row is None or row["stock"] is None:
        return None
    return "pass" if row["stock"] else row["reason"]["stock"]


def batches(name: str, columns: list[str], work: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield what is not yet there of a model's columns: what to run, and what of it to report.

    The cheap columns share a process; each costly one has its own.
    """
    done = {line["column"] for line in lines_of(work, name)}
    cheap = [c for c in columns if c in CHEAP]
    if not set(cheap) <= done and not failed_early(work, name):
        yield cheap, [c for c in cheap if c not in done]
    for column in columns:
        if column not in CHEAP and column not in done and (column == "stock" or not failed_early(work, name)):
            yield ([column] if column == "stock" else ["graph", "prune", column]), [column]


def run_model(name: str, columns: list[str], work: Path, limit: float) -> str:
    """Run a model's columns, each batch in a process of its own that ends after ``limit`` seconds."""
    began = time.perf_counter()
    if "stock" in columns and (known := stock_result(name)) is not None:
        append(work, name, {"column": "stock", "result": known, "seconds": 0})
    for batch, reported in batches(name, columns, work):
        seconds = TIME_LIMITS.get(reported[-1], limit)
        process = multiprocessing.get_context("fork").Process(
            target=worker, args=(name, batch, reported, work)
        )
        process.start()
        process.join(seconds)
        why = (
            f"took longer than {seconds:.0f} s"
            if process.is_alive()
            else f"ended with code {process.exitcode}"
        )
        process.kill()
        process.join()
        there = {line["column"] for line in lines_of(work, name)}
        missing = [c for c in reported if c not in there]
        if missing and not failed_early(work, name):
            append(work, name, {"column": missing[0], "result": why, "seconds": seconds})
    append(
        work, name, {"column": WHOLE, "seconds": round(time.perf_counter() - began, 1), "columns": columns}
    )
    return name


def worker(name: str, batch: list[str], reported: list[str], work: Path) -> None:
    warnings.simplefilter("ignore")
    run_columns(name, batch, lambda line: append(work, name, line) if line["column"] in reported else None)


def failed_early(work: Path, name: str) -> bool:
    return any(
        line["column"] in ("graph", "prune") and line["result"] != "pass" for line in lines_of(work, name)
    )


def append(work: Path, name: str, line: dict[str, Any]) -> None:
    with (work / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def result_of(family: str, name: str, work: Path) -> dict[str, Any]:
    """Return a model's row of the matrix."""
    every = lines_of(work, name)
    lines = {line["column"]: line for line in every if line["column"] != WHOLE}
    row: dict[str, Any] = {"family": family, "model": name}
    for column in (*CHEAP, *COSTLY, "compile"):
        result = lines.get(column, {}).get("result")
        row[column] = None if result is None or result.startswith("none") else result == "pass"
    facts = {
        key: lines.get("graph", {}).get(key) for key in ("image_size", "graph_seconds", "groups", "prunable")
    }
    facts |= {key: lines.get("prune", {}).get(key) for key in ("macs", "params")}
    wrong = {c: line["result"] for c, line in lines.items() if line["result"] not in ("pass",)}
    wholes = (line for line in every if line["column"] == WHOLE and line["columns"] != ["compile"])
    seconds = round(sum(line["seconds"] for line in wholes), 1)
    return {**row, **facts, "seconds": seconds, "reason": wrong}


NEEDED = ("graph", "prune", "forward", "equivalent", "backward", "save_load")


def summary(rows: list[dict[str, Any]]) -> str:
    good = sum(all(row[c] for c in NEEDED) for row in rows)
    tried = {c: [row[c] for row in rows if row[c] is not None] for c in (*CHEAP, *COSTLY, "compile")}
    parts = [f"{c} {sum(passed)} of {len(passed)}" for c, passed in tried.items() if passed]
    minutes = sum(row["seconds"] for row in rows) / 60
    return (
        f"{good} of {len(rows)} pass {', '.join(NEEDED)}; {', '.join(parts)}; {minutes:.0f} minutes on one core, "
        "torch.compile aside"
    )


def mark(value: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "-"}[value]


def page(rows_of: dict[str, list[dict[str, Any]]]) -> str:
    """Write the matrix as a page of documentation."""
    text = (
        (HERE.parent / "docs" / "timm.md").read_text() if (HERE.parent / "docs" / "timm.md").exists() else ""
    )
    start = "<!-- matrix: written by benchmarks/timm_matrix.py -->"
    head = text.split(start)[0].rstrip()
    lines = [start, ""]
    for title, rows in rows_of.items():
        if not rows:
            continue
        columns = [c for c in (*CHEAP, *COSTLY, "compile") if any(row[c] is not None for row in rows)]
        lines += [f"### {title}", "", summary(rows) + ".", ""]
        lines += ["| model file | model | groups | MACs left | params left | " + " | ".join(columns) + " |"]
        lines += ["|" + "---|" * (len(columns) + 5)]
        for row in rows:
            left = [
                f"{100 * b / a:.0f} %" if a else ""
                for a, b in (row["macs"] or [0, 0], row["params"] or [0, 0])
            ]
            groups = "" if row["groups"] is None else f"{row['prunable']} of {row['groups']}"
            cells = [row["family"], row["model"], groups, *left, *(mark(row[c]) for c in columns)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "Reasons:", ""]
        for row in rows:
            ours = {c: why for c, why in row["reason"].items() if c != "stock"}
            lines += [f"- {row['model']}, {c}: {why}" for c, why in ours.items()]
        lines.append("")
    return head + "\n\n" + "\n".join(lines).replace(str(Path.home()), "~") + "\n"


def write(work: Path, chosen: dict[str, list[str]]) -> None:
    """Write the results, a list of rows, and the page."""
    from dscore_plugin.files import write_json

    here = {"ratio": RATIO, "cpu": processor_name(), "versions": versions()}
    rows_of: dict[str, list[dict[str, Any]]] = {SMALLEST: [], SECOND: []}
    for family, names in chosen.items():
        for title, name in zip(rows_of, names, strict=False):
            if lines_of(work, name):
                rows_of[title].append(result_of(family, name, work) | {"drawn": title == SECOND} | here)
    write_json(RESULTS, [row for rows in rows_of.values() for row in rows])
    (HERE.parent / "docs" / "timm.md").write_text(page(rows_of))
    for title, rows in rows_of.items():
        print(f"{title}: {summary(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default="")
    parser.add_argument("--families", default="")
    parser.add_argument("--columns", default=",".join((*CHEAP, *COSTLY)))
    parser.add_argument("--second", action="store_true", help="the second model of each family, too")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=480)
    parser.add_argument("--redo", action="store_true", help="forget what is finished of these models")
    parser.add_argument("--write", action="store_true", help="write results and page from what is finished")
    parser.add_argument("--blame", help="show what goes wrong in one model, group by group")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    columns = options.columns.split(",")
    if options.blame:
        blame(options.blame)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, list[str]] = json.loads(MODELS.read_text()) if MODELS.exists() else {}
    if options.write:
        write(options.work, chosen)
        return
    wanted = [f for f in options.families.split(",") if f]
    names = [names[0] for family, names in chosen.items() if not wanted or family in wanted]
    if options.second:
        names += [n for f, names in chosen.items() if not wanted or f in wanted for n in names[1:2]]
    if columns == ["compile"] and not wanted:
        names = [names[0] for names in list(chosen.values())[::COMPILED_EVERY]]
    names = [n for n in options.models.split(",") if n] or names
    for name in names if options.redo else ():
        (options.work / f"{name}.jsonl").unlink(missing_ok=True)
    if {"onnx", "export"} & set(columns):  # the imports alone take longer than most exports
        from dscore_plugin.export import export_model

        with tempfile.TemporaryDirectory() as folder:
            for form in ("onnx", "torch-export"):
                export_model(nn.Linear(2, 2), (torch.zeros(1, 2),), Path(folder) / form, form=form)
    with ThreadPoolExecutor(options.jobs) as pool:
        for name in pool.map(lambda n: run_model(n, columns, options.work, options.time_limit), names):
            found = {line["column"]: line for line in lines_of(options.work, name) if line["column"] != WHOLE}
            good = (
                "ok  "
                if all(found.get(c, {}).get("result") == "pass" for c in columns if c in NEEDED)
                else "FAIL"
            )
            first = next(
                (f"{c}: {line['result']}" for c, line in found.items() if line["result"] != "pass"), ""
            )
            graph, prune = found.get("graph", {}), found.get("prune", {})
            left = f"{prune['macs'][1] / prune['macs'][0]:.2f}" if "macs" in prune else "-"
            print(
                f"{good} {name:36} {graph.get('graph_seconds', '-'):>6} s {graph.get('prunable', '-'):>4}/"
                f"{graph.get('groups', '-'):<4} macs {left} {first}",
                flush=True,
            )


if __name__ == "__main__":
    main()
