"""Run only the part of a network behind a given module, on recorded outputs of the part before it.

A change inside a network, such as a mask, leaves everything untouched that ended before the first changed module
began. Outputs of such modules are recorded once for each batch, and replayed instead of computed in every further
pass. This works for any ``forward``, since nothing but the ``forward`` of whole modules is replaced:

* A module that is called several times is not recorded, as its calls cannot be told apart; what contains it may be.
* An output that is changed in place later in the pass (``relu_``, ``+=``) is recorded and replayed as a copy.
* An output that only replayed modules would read keeps its shape, but no memory.
* What cannot be seen from outside shows up when a replayed pass differs from a full one (:meth:`Replay.agrees`): a
  result that a module leaves in an attribute, or an input that it changes in place and that others read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Give modules another ``forward``; on exit they have their own again, come what may."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.callback(_set_forward, module, module.__dict__.get("forward"))
            _set_forward(module, forward)
        yield


def _set_forward(module: nn.Module, forward: Forward | None) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


class Uses(TorchDispatchMode):
    """Counts how many operations read each tensor's memory.

    Tensors must be kept alive while they are counted, as the memory of others is given out again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._counts[_memory(leaf)] += 1
        return func(*args, **(kwargs or {}))

    def of(self, tensor: Tensor) -> int:
        """Return how many operations have read ``tensor``, or a view of it."""
        return self._counts[_memory(tensor)]

    def forget(self, tensor: Tensor) -> None:
        """Count anew, for a tensor that has just been made."""
        self._counts.pop(_memory(tensor), None)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(eq=False)
class _Call:
    """One call of a module during the pass that is watched; ``start`` and ``end`` count starts and ends."""

    module: nn.Module
    outer: _Call | None
    start: int
    end: int = 0
    output: Tensor | None = None
    version: int = 0
    copy: Tensor | None = None
    macs: int = 0

    @property
    def changed(self) -> bool:
        """Whether the output was changed in place after the call."""
        return self.output is not None and self.output._version != self.version

    def within(self, calls: set[_Call]) -> bool:
        """Whether one of ``calls`` contains this one."""
        return self.outer is not None and (self.outer in calls or self.outer.within(calls))


class _Watch:
    """Notes every call of every module, in order."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self._open: list[_Call] = []
        self._time = 0

    def watched(self, module: nn.Module) -> Forward:
        forward = module.forward

        @wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            call = _Call(module, self._open[-1] if self._open else None, self._tick())
            self.calls.append(call)
            self._open.append(call)
            output = forward(*args, **kwargs)
            self._open.pop()
            call.end = self._tick()
            if isinstance(output, Tensor):
                call.output, call.version, call.copy = output, output._version, output.clone()
                call.macs = _macs(module, output)
            return output

        return watched

    def _tick(self) -> int:
        self._time += 1
        return self._time


def _macs(module: nn.Module, output: Tensor) -> int:
    """Estimate the multiply-accumulates of a layer: those of its weight, and one for each output."""
    weight = getattr(module, "weight", None)
    inner = weight[0].numel() if isinstance(weight, Tensor) and weight.ndim > 1 else 0
    return output.numel() * (inner + 1)


@dataclass(frozen=True)
class Prefix:
    """The part of a network that ends before the first of some modules begins.

    Attributes:
        replaced: the largest modules in it that can be replayed; none of them contains another.
        kept: those of them whose outputs the rest of the network reads.
        stop: the module that begins next; None where nothing can be replayed.
        start: when that is, to sort prefixes by: the number of starts and ends of modules so far.
        bytes_per_image: memory for the outputs that are kept.
        macs_behind: estimate of the multiply-accumulates of one image in the rest of the network.
    """

    replaced: tuple[nn.Module, ...]
    kept: frozenset[nn.Module]
    stop: nn.Module | None
    start: int
    bytes_per_image: int
    macs_behind: int


@dataclass(frozen=True)
class Recording:
    """What the modules of a prefix gave for one batch; a stand-in without memory where nobody reads it."""

    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)


class _EndOfPrefixError(BaseException):
    """Leaves a pass at the end of the prefix; no Exception, so that no forward() takes it for one of its own."""


class Replay:
    """Records and replays prefixes of a network.

    Args:
        model: the network, in eval mode; it takes one tensor.
        example: a small batch, ``(b, ...)``, on the model's device.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model = model
        self._example = example.clone()
        watch = _Watch()
        images = example.clone()
        with torch.no_grad(), replaced_forwards({m: watch.watched(m) for m in model.modules()}):
            model(images)
        self._calls = watch.calls
        self._changes_input = images._version != 0
        self._changed = {call.module for call in self._calls if call.changed}
        times = Counter(call.module for call in self._calls)
        self._once = {call for call in self._calls if call.output is not None and times[call.module] == 1}
        for call in self._calls:
            call.output = None  # the copy is enough

    def prefix(self, changed: Iterable[nn.Module]) -> Prefix:
        """Find what ends before the first of ``changed`` begins.

        Args:
            changed: modules whose inputs or whose working will be other than in the recorded pass. One that is
                never called itself counts as beginning with the module around it.
        """
        first = self._first_call(changed)
        if first is None:
            return Prefix((), frozenset(), None, 0, 0, self._macs_behind(0))
        ended = {call for call in self._once if call.end < first.start}
        outermost = [call for call in self._calls if call in ended and not call.within(ended)]
        kept = self._read(outermost)
        size = sum(call.copy.nbytes for call in kept if call.copy is not None) // len(self._example)
        replaced = tuple(call.module for call in outermost)
        kept_modules = frozenset(call.module for call in kept)
        return Prefix(replaced, kept_modules, first.module, first.start, size, self._macs_behind(first.start))

    def record(self, prefix: Prefix, images: Tensor, earlier: Recording | None = None) -> Recording:
        """Run the prefix on a batch and keep its outputs.

        Args:
            prefix: from :meth:`prefix`.
            images: shape ``(b, ...)``.
            earlier: a recording of the same batch for a prefix that ends no later; it saves the way to there.
        """
        outputs: dict[nn.Module, Tensor] = {}
        known = earlier.outputs if earlier else {}
        forwards: dict[nn.Module, Forward] = {m: partial(self._give, m, known[m]) for m in known}
        for module in prefix.replaced:
            if module in known:  # as it is: passing it through would copy what is changed in place
                outputs[module] = known[module] if module in prefix.kept else _stand_in(known[module])
            else:
                forwards[module] = self._storing(module, outputs, module in prefix.kept)
        if prefix.stop is not None:
            forwards[prefix.stop] = _stop
            with torch.no_grad(), replaced_forwards(forwards), suppress(_EndOfPrefixError):
                self._run(images)
        return Recording(outputs)

    def run(self, images: Tensor, recording: Recording | None = None) -> Any:
        """Run the network on a batch; what is recorded is not computed.

        Args:
            images: shape ``(b, ...)``; the same batch that was recorded.
            recording: from :meth:`record`; None computes everything.

        Returns:
            The network's output.
        """
        outputs = recording.outputs if recording else {}
        with replaced_forwards({m: partial(self._give, m, output) for m, output in outputs.items()}):
            return self._run(images)

    def agrees(self, images: Tensor, recording: Recording, expected: Tensor) -> bool:
        """Tell whether a replayed pass gives, bit for bit, what the full pass gave.

        Args:
            images: a batch.
            recording: of this batch; best checked after others were recorded too.
            expected: the output of the full pass.
        """
        output = self.run(images, recording)
        return isinstance(output, Tensor) and torch.equal(output, expected)

    def _run(self, images: Tensor) -> Any:
        return self._model(images.clone() if self._changes_input else images)

    def _give(self, module: nn.Module, output: Tensor, *_: Any, **__: Any) -> Tensor:
        return output.clone() if module in self._changed else output

    def _storing(self, module: nn.Module, outputs: dict[nn.Module, Tensor], keep: bool) -> Forward:
        forward = module.forward

        @wraps(forward)
        def storing(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if isinstance(output, Tensor):
                kept = output.clone() if module in self._changed else output
                outputs[module] = kept if keep else _stand_in(output)
            return output

        return storing

    def _first_call(self, modules: Iterable[nn.Module]) -> _Call | None:
        called = {call.module for call in self._calls}
        names = {module: name for name, module in self._model.named_modules()}
        beginning = set()
        for module in modules:
            name = names[module]
            while self._model.get_submodule(name) not in called:
                name = name.rpartition(".")[0]
            beginning.add(self._model.get_submodule(name))
        return next((call for call in self._calls if call.module in beginning), None)

    def _read(self, calls: list[_Call]) -> list[_Call]:
        """Return the calls whose outputs some operation outside of them reads."""
        given = {call: call.copy.clone() for call in calls if call.copy is not None}
        forwards = {call.module: partial(self._give_this, output) for call, output in given.items()}
        with torch.no_grad(), replaced_forwards(forwards), Uses() as uses:
            self._run(self._example)
        return [call for call, output in given.items() if uses.of(output)]

    @staticmethod
    def _give_this(output: Tensor, *_: Any, **__: Any) -> Tensor:
        return output

    def _macs_behind(self, start: int) -> int:
        return sum(call.macs for call in self._calls if call.start >= start) // len(self._example)


def _stop(*_: Any, **__: Any) -> None:
    raise _EndOfPrefixError


def _stand_in(like: Tensor) -> Tensor:
    """Give a tensor of the same shape, one number in size; not a number, so that using it cannot go unseen."""
    return like.new_full((), float("nan") if like.is_floating_point() else 0).expand(like.shape)
