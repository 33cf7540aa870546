"""MACs and parameters by Torch-Pruning's rules: the number of a finished network, and the terms of the table.

The table that one chooses a plan by must agree with the number that is reported, so both use Torch-Pruning's
formulas, whatever one thinks of them (batch norm counts twice, ``F.relu`` not at all). One thing is added: its
counter looks layers up by their exact class and so misses timm's ``Conv2dSame`` and other subclasses of a
convolution or a linear layer; they are counted as what they are.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_pruning import ops
from torch_pruning.utils import op_counter

from dscore_plugin.costs import Cost, CostTerm
from dscore_plugin.integrations.timm.adapters import channel_dim
from dscore_plugin.modes import modes_kept

_NORMS = (ops.TORCH_BATCHNORM, ops.TORCH_LAYERNORM, ops.TORCH_GROUPNORM, ops.TORCH_INSTANCENORM)
Formula = Callable[[nn.Module, tuple[Any, ...], Any], None]


def formulas(model: nn.Module) -> dict[type, Formula]:
    """Return the counting rule of every layer type in ``model`` that Torch-Pruning's counter would miss."""
    missing: dict[type, Formula] = {}
    for module in model.modules():
        kind = type(module)
        if kind in op_counter.MODULES_MAPPING:
            continue
        if isinstance(module, ops.TORCH_CONV):
            missing[kind] = op_counter.conv_flops_counter_hook
        elif isinstance(module, nn.Linear):
            missing[kind] = op_counter.linear_flops_counter_hook
    return missing


def count(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[int, int]:
    """Count the MACs of one image, and the parameters, with Torch-Pruning's counter.

    Args:
        model: any network; it is left as it was.
        example_inputs: the arguments of one forward pass.

    Returns:
        ``(macs, params)``.
    """
    op_counter.CUSTOM_MODULES_MAPPING = formulas(model)
    try:
        with modes_kept(model), redirect_stdout(io.StringIO()):  # it prints a line for every shared layer
            macs, params = op_counter.count_ops_and_params(model, example_inputs)
    finally:
        op_counter.CUSTOM_MODULES_MAPPING = {}
    return round(macs), int(params)


@dataclass
class CallRecorder:
    """What one forward pass shows: the cost of every call, and the graph node of every layer without weights.

    Attributes:
        terms: cost terms in the order of the calls; a layer with weights has one, however often it is called.
        passing: ``(module name, call, autograd node of the output)`` of every counted layer without weights.
        outputs: the autograd nodes of the network's outputs.
        batch: images in the pass; the counter divides by it, not by the length of what a layer gives out, which
            may be windows or tokens.
    """

    terms: dict[tuple[str, int], CostTerm] = field(default_factory=dict)
    passing: list[tuple[str, int, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    batch: int = 1

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[CallRecorder]:
        """Record every call inside the ``with`` block; the hooks are removed at its end, come what may."""
        known = {**op_counter.MODULES_MAPPING, **formulas(model)}
        handles = [
            model.register_forward_pre_hook(self._keep_batch),
            model.register_forward_hook(self._keep_outputs),
        ]
        try:
            for name, module in model.named_modules():
                is_leaf = not any(True for _ in module.children()) or channel_dim(module) is not None
                formula = known.get(type(module)) if is_leaf else None
                if formula is None and (isinstance(module, _NORMS) or channel_dim(module) is not None):
                    formula = op_counter.empty_flops_counter_hook  # the counter counts its parameters only
                if formula is not None:
                    handles.append(module.register_forward_hook(self._hook(name, formula)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _keep_batch(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.batch = len(inputs[0]) if inputs else 1

    def _keep_outputs(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.outputs += [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    def _hook(self, name: str, formula: Formula) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        calls = 0

        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal calls
            if not inputs or not isinstance(output, Tensor):
                return
            module.__flops__ = 0  # type: ignore[assignment]
            try:
                formula(module, inputs, output)
                macs = float(module.__flops__) / self.batch  # type: ignore[arg-type]
            finally:
                del module.__flops__
            has_weights = any(True for _ in module.parameters(recurse=False)) and not shares_one_weight(
                module
            )
            call = 0 if has_weights else calls
            if not has_weights:
                self.passing.append((name, call, output.grad_fn))
            term = _term(module, name, call, macs, output.numel() / self.batch, self.batch)
            earlier = self.terms.get((name, call))
            self.terms[name, call] = term if earlier is None else _called_again(earlier, term)
            calls += 1

        return record


def _term(module: nn.Module, name: str, call: int, macs: float, outputs: float, batch: int) -> CostTerm:
    sizes = [
        p.numel() if isinstance(p, Tensor) else 0
        for p in (getattr(module, "weight", None), module_bias(module))
    ]
    total = Cost(macs, 0 if shares_one_weight(module) else sum(sizes))
    is_linear = isinstance(module, nn.Linear)
    if not is_linear and ops.module2type(module) != ops.OPTYPE.CONV:
        return CostTerm(name, call, Cost(), total)
    # Torch-Pruning counts a linear layer's bias once a batch and a convolution's once a position
    bias_macs = sizes[1] / batch if is_linear else outputs * bool(sizes[1])
    bias = Cost(bias_macs, sizes[1])
    return CostTerm(name, call, total - bias, bias)


def shares_one_weight(module: Any) -> bool:
    """Whether a module has one weight for all channels, so that none leaves with them."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def module_bias(module: nn.Module) -> Tensor | None:
    """Return a layer's bias, or None where it has none."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _called_again(earlier: CostTerm, term: CostTerm) -> CostTerm:
    """Add the MACs of a second call to a layer's term; its parameters are counted once."""
    weight = Cost(earlier.weight.macs + term.weight.macs, earlier.weight.params)
    channel = Cost(earlier.channel.macs + term.channel.macs, earlier.channel.params)
    return CostTerm(term.module, term.call, weight, channel)


def uncounted(model: nn.Module, example_inputs: tuple[Any, ...], terms: Iterable[CostTerm]) -> Cost:
    """Return what the terms miss of the counter's numbers: bare parameters, and layers it counts as a whole."""
    macs, params = count(model, example_inputs)
    return Cost(macs, params) - sum((term.total for term in terms), Cost())


def example_input(input_shape: tuple[int, ...], device: torch.device | str = "cpu") -> tuple[Tensor]:
    """Return the arguments of a forward pass on one image of ``input_shape``, for tracing and counting."""
    return (torch.zeros(1, *input_shape, device=device),)
