"""Run a network that has lost kernels fast: each convolution on the backend that measures best on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import ModelError, PlanError, did_you_mean
from dscore_plugin.surgery.kernel_masks import remove_masks
from dscore_plugin.surgery.sparse_backends import BACKENDS, DENSE, SparseConv2d, live_kernels, usable_backends

_TOLERANCE = 1e-4
_HOPELESS = 8.0  # times the fastest first call: what is slower is not called again
_WORTHWHILE = 0.95  # of the dense time: what a backend must reach to be chosen


@dataclass(frozen=True)
class Choice:
    """How a convolution runs.

    Attributes:
        backend: the chosen one.
        live: share of its kernels that are left.
        milliseconds: of each backend that was measured, for the input of this call.
    """

    backend: str
    live: float
    milliseconds: Mapping[str, float]


class SparseExecution(nn.Module):
    """A network for inference, whose convolutions run on chosen backends; arguments and outputs are the network's.

    Attributes:
        model: the network; without gradients where a backend is not dense.
        choices: how each convolution runs, by qualified name.
        dense_seconds: measured of the whole network, for one call.
        sparse_seconds: likewise.
    """

    def __init__(self, model: nn.Module, choices: Mapping[str, Choice], seconds: tuple[float, float]) -> None:
        super().__init__()
        self.model = model
        self.choices = dict(choices)
        self.dense_seconds, self.sparse_seconds = seconds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        return self.model(*args, **kwargs)


def compile_sparse(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    backends: Sequence[str] = BACKENDS,
    rounds: int = 5,
) -> SparseExecution:
    """Choose, by measurement on this machine, how each convolution of a kernel-sparse network runs.

    Every ``nn.Conv2d`` with zero kernels (subclasses stay dense) is timed on its own input in each backend: ``dense``;
    ``gathered``, dense over the channels that are alive; ``csr``, one product of a sparse matrix for each tap; and on a
    CPU with a C compiler ``native``. One that is not at least 5 % faster than dense, or differs by more than 1e-4 of
    the largest output, is not taken. If the network as a whole is not faster in the end, all of it stays dense.

    Times hold for this input size, the batch included, and the present number of threads; inputs of other sizes give
    right results, perhaps not in the best way. Under autocast, what is not dense computes in float32; after a move to
    another type or device it runs dense.

    Args:
        model: the network, left as it is; masked or with zeros in its weights.
        example_inputs: the arguments of a forward pass (a tensor stands for one argument), in the size that matters.
        backends: those to try; dense is always among them.
        rounds: how often each is timed, in turns; the median counts.

    Returns:
        A copy for inference: weights changed afterwards in the original do not reach it.

    Raises:
        PlanError: if a backend is unknown.
        ModelError: if the network does not run.
    """
    unknown = next((name for name in backends if name not in BACKENDS), None)
    if unknown is not None:
        raise PlanError(
            f"backend {unknown!r} is unknown; expected some of {', '.join(BACKENDS)}{did_you_mean(unknown, BACKENDS)}"
        )
    inputs = as_arguments(example_inputs)
    dense = remove_masks(copy.deepcopy(model)).eval()
    sparse = copy.deepcopy(dense)
    choices = {}
    with torch.no_grad():
        for name, x in _inputs_of_convolutions(dense, inputs).items():
            convolution = dense.get_submodule(name)
            assert isinstance(convolution, nn.Conv2d)
            tried = [backend for backend in usable_backends(convolution) if backend in (DENSE, *backends)]
            if len(tried) > 1:
                choices[name], runner = _fastest(convolution, tried, x, rounds)
                _put(sparse, name, runner)
        seconds = _measure({"dense": _call(dense, inputs), "sparse": _call(sparse, inputs)}, rounds)
    if seconds["sparse"] > seconds["dense"]:
        choices = {name: Choice(DENSE, c.live, c.milliseconds) for name, c in choices.items()}
        sparse, seconds["sparse"] = dense, seconds["dense"]
    return SparseExecution(sparse, choices, (seconds["dense"], seconds["sparse"]))


def _inputs_of_convolutions(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return what each 2-d convolution gets at its first call."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(names[module], inputs[0].clone())  # type: ignore[index]

    handles = [module.register_forward_pre_hook(keep) for module in names]
    try:
        model(*example_inputs)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} does not run on these inputs: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _fastest(
    convolution: nn.Conv2d, backends: Sequence[str], x: Tensor, rounds: int
) -> tuple[Choice, nn.Module]:
    runners: dict[str, nn.Module] = {DENSE: convolution}
    expected = convolution(x)
    for backend in backends:
        if backend != DENSE:
            runner = SparseConv2d(convolution, backend)
            if float((runner(x) - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max()):
                runners[backend] = runner
    seconds = _measure({name: _call(runner, (x,)) for name, runner in runners.items()}, rounds)
    best = min(seconds, key=lambda name: seconds[name])
    best = best if seconds[best] <= _WORTHWHILE * seconds[DENSE] else DENSE
    milliseconds = {name: round(1e3 * value, 4) for name, value in seconds.items()}
    return Choice(best, float(live_kernels(convolution).float().mean()), milliseconds), runners[best]


def _measure(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time calls in turns; return the median of each, in seconds."""
    first = {name: _timed(call) for name, call in calls.items()}  # memory is allocated, layouts are made
    slowest = _HOPELESS * min(first.values())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(1, rounds)):
        for name, call in calls.items():
            if name == DENSE or first[name] <= slowest:
                times[name].append(_timed(call))
    return {name: statistics.median(values or [first[name]]) for name, values in times.items()}


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _call(module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: module(*inputs)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
