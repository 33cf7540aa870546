"""Synaptic strength on DepGraph: which batch norm feeds a convolution, and through what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import importance as torch_pruning_importance
from torch_pruning import ops
from torch_pruning.dependency import Group
from torch_pruning.pruner import function

from dscore_plugin.criteria.synaptic_strength import input_strength, synaptic_strength
from dscore_plugin.errors import CriterionError
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.importance import _apart
from dscore_plugin.training.synaptic import NormLink

__all__ = ["SynapticStrengthImportance"]

_CONSUMING = (function.prune_conv_in_channels, function.prune_linear_in_channels)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISING = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"}
_ARITHMETIC = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Cat",
    "Stack",
)  # with what DepGraph does not show, such as the image
_MOVING = ("Permute", "Transpose", "TBackward", "PixelShuffle", "PixelUnshuffle", "Movedim", "Roll", "Flip")
_FLATTENING = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze")
_SELECTING = ("Index", "IndexSelect")
_WIDTHS = ("num_features", "num_channels", "out_channels", "out_features")


class SynapticStrengthImportance(torch_pruning_importance.Importance):
    """Synaptic strength, summed over all connections that read a channel: ``S_c = sum_o |gamma_c| ||W[o, c]||_F``.

    Several layers that read the channel add up; the weights of a linear layer count as kernels of one weight. Gamma is
    that of the batch norm that alone feeds the layer, and 1 where a residual sum or no batch norm does. The paper
    prunes single connections (granularity ``kernel``); the sum over a channel's connections is ours.

    Source: arXiv 1811.02454; the pure function is ``criteria.synaptic_strength.synaptic_strength``.
    """

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """Score the channels of a group.

        Args:
            group: a group of DepGraph's, with all channels of its root or some of them.

        Returns:
            Scores of shape ``(len(group[0].idxs),)``, float64 on the CPU, all distinct; the lowest is pruned first.
            None if no convolution or linear layer reads the channels.

        Raises:
            CriterionError: if weights hold NaN or infinity.
        """
        place = {channel: position for position, channel in enumerate(group[0].idxs)}
        score, found = torch.zeros(len(place), dtype=torch.float64), False
        for item in group:
            if item.dep.handler not in _CONSUMING or not set(item.root_idxs) <= place.keys():
                continue
            strength = _strength_of_inputs(item.dep.target)
            if strength is not None and max(item.idxs) < len(strength):
                roots = torch.as_tensor([place[root] for root in item.root_idxs])
                score.index_add_(0, roots, strength[torch.as_tensor(item.idxs)])
                found = True
        return score + _apart(float(score.max()), len(score)) if found else None


def kernel_scores(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> dict[str, Tensor]:
    """Score the connections of every convolution by the magnitude of their synaptic strength.

    Args:
        model: the network, left as it is; a reparameterised one must be converted back first.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).

    Returns:
        For each convolution, by qualified name, shape ``(out, in / groups)``, float32, at least 0; the lowest is
        pruned first. Gamma counts as 1 for the first convolution and for those that a residual sum feeds.

    Raises:
        ModelError: if the model cannot be traced, or a weight is parametrised.
        CriterionError: if weights hold NaN or infinity.
    """
    graph = PruningGraph(model, example_inputs)
    nodes = graph.depgraph.module2node
    scores = {}
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            gamma = _scales_of_inputs(nodes[module]) if module in nodes else None
            try:
                scores[name] = synaptic_strength(module.weight, gamma).abs()
            except CriterionError as error:
                raise CriterionError(f"{name!r}: {error}") from error
    return scores


def find_links(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[NormLink, ...]:
    """Find the batch norms whose outputs are read by convolutions alone, each through functions of one input.

    What lies between is named, not judged: the reparameterised training refuses what is not positively homogeneous.

    Args:
        model: the network, left as it is.
        example_inputs: the arguments of one forward pass.

    Returns:
        The links, in the order of the network's modules.

    Raises:
        ModelError: if the model cannot be traced, or a weight is parametrised.
    """
    graph = PruningGraph(model, example_inputs)
    names = {module: name for name, module in model.named_modules()}
    found = []
    for module, name in names.items():
        node = graph.depgraph.module2node.get(module)
        if isinstance(module, ops.TORCH_BATCHNORM) and module.affine and node is not None:
            readers, between = _readers(node)
            between |= {_label(node)} - _NORMALISING  # timm's batch norms hold their activation
            if readers and all(_reads(reader, module) for reader in readers):
                convolutions = tuple(names[reader.module] for reader in readers)
                found.append(NormLink(name, convolutions, tuple(sorted(between))))
    return tuple(found)


def _readers(norm: Any) -> tuple[list[Any], set[str]]:
    """Return the convolutions that read a norm and what lies between; none if something else reads it, too."""
    readers, between, waiting = [], set(), list(norm.outputs)
    if not waiting:
        return [], set()
    while waiting:
        node = waiting.pop(0)
        if node.type in (ops.OPTYPE.CONV, ops.OPTYPE.DEPTHWISE_CONV):
            readers.append(node)
        elif _passes_on(node) and node.outputs:
            between |= {_label(node)} - _NORMALISING
            waiting += node.outputs
        else:
            return [], set()
    return readers, between


def _reads(reader: Any, norm: nn.Module) -> bool:
    """Whether a convolution of torch's reads every channel of a norm, in order, and nothing else."""
    module = reader.module
    return (
        isinstance(module, _CONVOLUTIONS)
        and len(_data_inputs(reader)) == 1
        and module.in_channels == norm.num_features
    )


def _strength_of_inputs(node: Any) -> Tensor | None:
    """Sum the strengths of the connections that read each input channel of a layer: float64, on the CPU."""
    module = node.module
    if not isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
        return None  # transposed convolutions: the paper has none
    strength = synaptic_strength(module.weight, _scales_of_inputs(node))
    return input_strength(strength, getattr(module, "groups", 1)).to("cpu", torch.float64)


def _scales_of_inputs(node: Any) -> Tensor | None:
    """Return gamma for every input channel of a layer, or None where it is 1 for all."""
    module, inputs = node.module, _data_inputs(node)
    if len(inputs) != 1:
        return None
    is_linear = isinstance(module, nn.Linear)
    scales = _scales(inputs[0], flatten=is_linear)
    width = module.in_features if is_linear else module.in_channels
    if scales is None or width % len(scales) or (not is_linear and width != len(scales)):
        return None
    return scales.repeat_interleave(width // len(scales)).to(module.weight.device)


def _scales(node: Any, flatten: bool) -> Tensor | None:
    """Follow a layer's input against the data to the batch norm that scales it."""
    if node.type == ops.OPTYPE.BN:
        weight = node.module.weight
        return torch.ones(node.module.num_features) if weight is None else weight.detach().cpu().float()
    if node.grad_fn is not None and _label(node) == "Cat":
        return _joined(node, flatten)
    if not _passes_on(node, flatten):
        return None
    scales = _scales(_data_inputs(node)[0], flatten)
    if scales is None or _label(node) not in _SELECTING:
        return scales
    index = _selected(node)
    return None if index is None else scales[index]


def _selected(node: Any) -> Tensor | None:
    """Return which channels an indexing gives out; None if it does not index channels alone."""
    fn = node.grad_fn
    if _label(node) == "IndexSelect":
        return fn._saved_index.cpu() if fn._saved_dim == 1 else None
    used = [(dim, index) for dim, index in enumerate(fn._saved_indices) if index is not None]
    (dim, index) = used[0]
    return index.cpu() if len(used) == 1 and dim == 1 and index.ndim == 1 else None


def _joined(node: Any, flatten: bool) -> Tensor | None:
    """Return the scales of a concatenation of channels, 1 for parts that no batch norm feeds."""
    shape = node.grad_fn._input_metadata[0].shape
    if node.grad_fn._saved_dim % 2**64 not in (1, 2**64 - len(shape) + 1):  # torch shows -3 as unsigned
        return None
    known, parts = {source.grad_fn: source for source in node.inputs}, []
    for function_of_part, output in node.grad_fn.next_functions:
        if function_of_part is None:  # the image, or a constant
            return None
        source = known.get(function_of_part)
        scales = None if source is None else _scales(source, flatten)
        if scales is None:
            traced = function_of_part._input_metadata[output].shape[1]
            scales = torch.ones(_width(source, traced))
        parts.append(scales)
    return torch.cat(parts)


def _width(node: Any, traced: int) -> int:
    """Count the channels that a node gives: those of the layer they come from, which may have lost some since."""
    module = getattr(node, "module", None)
    known = next((getattr(module, name) for name in _WIDTHS if hasattr(module, name)), None)
    if known is not None:
        return int(known)
    return _width(_data_inputs(node)[0], traced) if node is not None and _keeps_width(node) else traced


def _keeps_width(node: Any) -> bool:
    """Whether a node gave as many channels as it read when the network was traced."""
    sources = _data_inputs(node)
    if not sources or node.grad_fn is None:
        return False
    read = [fn._input_metadata[nr] for fn, nr in node.grad_fn.next_functions if fn is sources[0].grad_fn]
    widths = {
        metadata.shape[1] for metadata in (*read, *node.grad_fn._input_metadata) if len(metadata.shape) > 1
    }
    return len(widths) == 1


def _passes_on(node: Any, flatten: bool = False) -> bool:
    """Whether a node is a function of one input that leaves the channels where they are, or selects some."""
    if node.type == ops.OPTYPE.PRELU:
        return True
    label = _label(node)
    is_function = node.type == ops.OPTYPE.ELEMENTWISE or (flatten and node.type == ops.OPTYPE.RESHAPE)
    if not is_function or len(_data_inputs(node)) != 1 or label.startswith((*_ARITHMETIC, *_MOVING)):
        return False
    return flatten if label.startswith(_FLATTENING) else label in _SELECTING or _keeps_width(node)


def _data_inputs(node: Any) -> list[Any]:
    """Return a node's inputs, leaving out what is computed from its weight, such as the weight times a mask."""
    return [source for source in node.inputs if source.type != ops.OPTYPE.ELEMENTWISE or source.inputs]


def _label(node: Any) -> str:
    """Name the function of a node, as autograd does, without its suffix."""
    if node.type == ops.OPTYPE.PRELU:
        return "PReLU"
    name: str = node.grad_fn.name() if node.grad_fn is not None else type(node.module).__name__
    return name.partition("Backward")[0]
