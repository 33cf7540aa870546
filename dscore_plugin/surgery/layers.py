"""Whole residual branches that leave a network: what remains is the shortcut, and the activation behind the sum.

Blocks are known by their class; a table says, for each class, which module gives out what a branch adds to the
shortcut, and what stays when it leaves. What stays keeps its name, so that state dicts, plans and artifacts go on
naming it. A block whose ``forward()`` has been overridden, or that has no shortcut, has no branch here.

Source: the removal of layers in arXiv 2201.11209 ("the shortcut stays, then ReLU; DenseNet: its channels become
zeros").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.errors import PlanError, did_you_mean
from dscore_plugin.plan import LayerRemoval
from dscore_plugin.rollback import check_runs, rolled_back_on_error


@dataclass(frozen=True)
class Branch:
    """A residual branch that can leave.

    Attributes:
        name: qualified name of its block; of the attention or the MLP in a transformer's block, which has two.
        output: qualified name of the module whose output is added to the shortcut.
    """

    name: str
    output: str


class RemovedBranch(nn.Module):
    """Stands where a branch has been removed."""


class Bypass(nn.Sequential, RemovedBranch):
    """What is left of a block: the modules of its shortcut, if any, and the activation behind the sum, if any."""


class NoUpdate(RemovedBranch):
    """What is left of attention or of an MLP: a zero to add, whatever the input."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Map anything to a zero without dimensions, of the type of ``x``."""
        return x.new_zeros(())


class ZeroChannels(RemovedBranch):
    """What is left of a dense layer: channels of zeros, which the layers behind it go on reading.

    Args:
        channels: how many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Map ``(B, C, H, W)``, or several of them, to zeros ``(B, channels, H, W)``."""
        like = x if isinstance(x, Tensor) else x[0]
        return like.new_zeros(like.shape[0], self.channels, *like.shape[2:])


class PaddedShortcut(nn.Module):
    """Take every ``stride``-th pixel and pad with channels of zeros, half in front and half behind.

    Args:
        channels: width of the output.
        stride: of the subsampling.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        missing = self.channels - x.shape[1]
        pixels = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(pixels, (0, 0, 0, 0, missing // 2, missing - missing // 2))


Replacements = dict[str, nn.Module]  # path below the block ("" is the block itself) -> what takes its place


@dataclass(frozen=True)
class Rule:
    """One branch of a class of blocks.

    Attributes:
        outputs: children that may give out what is added; the first that is there does ("" is the block).
        replace: gives what takes the place of the block, or of some of its children, when the branch leaves; None
            where this block has no shortcut.
        child: which child gives the branch its name; "" is the block.
    """

    outputs: tuple[str, ...]
    replace: Callable[[nn.Module], Replacements | None]
    child: str = ""


def bypass(*shortcut: str, after: str = "", only_if: str = "") -> Callable[[nn.Module], Replacements | None]:
    """Say what stays of a block that is bypassed.

    Args:
        *shortcut: the children that the shortcut passes through, in order; if the last is None, it passes through none.
        after: the activation behind the sum.
        only_if: an attribute that is False or None where the block has no shortcut.
    """

    def replace(block: nn.Module) -> Replacements | None:
        if only_if and getattr(block, only_if) in (None, False):
            return None
        passed = shortcut if shortcut and getattr(block, shortcut[-1]) is not None else ()
        kept = {name: getattr(block, name) for name in passed}
        if after:
            kept[after] = _not_in_place(getattr(block, after))
        return {"": _bypass(kept)}

    return replace


def silence(*parts: str, core: str) -> Callable[[nn.Module], Replacements]:
    """Say what stays of a block with several branches: ``core`` gives zero, and ``parts`` around it do nothing."""

    def replace(block: nn.Module) -> Replacements:
        return {core: NoUpdate(), **{part: nn.Identity() for part in parts if hasattr(block, part)}}

    return replace


def zeros(last: str) -> Callable[[nn.Module], Replacements]:
    """Say what stays of a dense layer whose channels the convolution ``last`` makes."""

    def replace(block: nn.Module) -> Replacements:
        channels: Any = getattr(block, last).out_channels
        return {"": ZeroChannels(channels)}

    return replace


def _cifar_resnet(block: Any) -> Replacements:
    """Keep the shortcut of our CIFAR ResNets: nothing, a fixed convolution, or a padding that has no module."""
    kept: Replacements = {}
    if block.shortcut is not None:
        kept["shortcut"] = block.shortcut
    elif block.stride != 1:
        kept["shortcut"] = PaddedShortcut(block.bn2.num_features, block.stride)
    return {"": _bypass({**kept, "relu": nn.ReLU()})}


_EFFICIENTNET = Rule(("drop_path",), bypass(only_if="has_skip"))
_PRE_ACTIVATION = Rule(("drop_path",), bypass("norm1", "downsample"))

RULES: Mapping[str, tuple[Rule, ...]] = {
    "dscore_plugin.models.cifar_resnet.BasicBlock": (Rule(("bn2",), _cifar_resnet),),
    "dscore_plugin.models.cifar_preresnet.PreActivationBottleneck": (Rule(("conv3",), bypass("shortcut")),),
    "dscore_plugin.models.cifar_densenet.DenseLayer": (Rule(("",), zeros("conv2")),),
    "timm.models.resnet.BasicBlock": (
        Rule(("drop_path", "se", "bn2"), bypass("downsample", after="act2")),
    ),
    "timm.models.resnet.Bottleneck": (
        Rule(("drop_path", "se", "bn3"), bypass("downsample", after="act3")),
    ),
    "timm.models.resnetv2.Bottleneck": (Rule(("drop_path",), bypass("downsample", after="act3")),),
    "timm.models.resnetv2.PreActBasic": (_PRE_ACTIVATION,),
    "timm.models.resnetv2.PreActBottleneck": (_PRE_ACTIVATION,),
    "timm.models.regnet.Bottleneck": (
        Rule(("drop_path",), bypass("downsample", after="act3", only_if="downsample")),
    ),
    "timm.models.regnet.PreBottleneck": (
        Rule(("drop_path",), bypass("norm1", "downsample", only_if="downsample")),
    ),
    **{
        f"timm.models._efficientnet_blocks.{kind}": (_EFFICIENTNET,)
        for kind in (
            "ConvBnAct", "DepthwiseSeparableConv", "InvertedResidual", "UniversalInvertedResidual",
            "MobileAttention", "CondConvResidual", "EdgeResidual",
        )
    },
    "timm.models.convnext.ConvNeXtBlock": (Rule(("drop_path",), bypass("shortcut")),),
    "timm.models.densenet.DenseLayer": (Rule(("",), zeros("conv2")),),
    "timm.models.vision_transformer.Block": (
        Rule(("drop_path1",), silence("norm1", "ls1", "drop_path1", core="attn"), child="attn"),
        Rule(("drop_path2",), silence("norm2", "ls2", "drop_path2", core="mlp"), child="mlp"),
    ),
}  # fmt: skip


def find_branches(model: nn.Module, rules: Mapping[str, tuple[Rule, ...]] = RULES) -> tuple[Branch, ...]:
    """List the residual branches of a network that can leave it, from input to output.

    Nothing is computed: the network may lie on the meta device.

    Args:
        model: the network; branches that have been removed are not listed.
        rules: for classes of blocks, by ``module.Class``; extend :data:`RULES` for blocks of your own.

    Returns:
        The branches. A network without a known block has none.
    """
    return tuple(branch for branch, _, _ in _find(model, rules))


def removed_branches(model: nn.Module) -> list[str]:
    """Name the branches that have been removed from a network, from input to output."""
    return [name for name, module in model.named_modules() if isinstance(module, RemovedBranch)]


def remove_branches(
    model: nn.Module, names: Iterable[str], rules: Mapping[str, tuple[Rule, ...]] = RULES
) -> nn.Module:
    """Remove residual branches, in place, without a forward pass; the network may lie on the meta device.

    Args:
        model: the network.
        names: of its branches, as :func:`find_branches` gives them.
        rules: as for :func:`find_branches`.

    Returns:
        ``model``; the modules that stay keep their names, modes and parameters.

    Raises:
        PlanError: if a name is no branch of the network, was removed already, or is given twice; then the network is
            as it was.
    """
    names = list(names)
    found = {branch.name: (block, rule) for branch, block, rule in _find(model, rules)}
    _check(model, names, found)
    for name in names:
        block, rule = found[name]
        for path, replacement in (rule.replace(model.get_submodule(block)) or {}).items():
            place = f"{block}.{path}" if path else block
            replacement.train(model.get_submodule(place).training)
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    return model


def carry_out(
    model: nn.Module, example_inputs: tuple[Any, ...], removals: Sequence[LayerRemoval]
) -> nn.Module:
    """Remove the branches that a plan names, in place.

    Args:
        model: the network.
        example_inputs: the arguments of one forward pass, for the check at the end.
        removals: which branches leave.

    Returns:
        ``model``, in eval mode.

    Raises:
        PlanError: if a removal does not fit the network.
        ModelError: if the network does not run afterwards; then it is as it was.
    """
    with rolled_back_on_error(model):
        remove_branches(model, [removal.layer for removal in removals])
        check_runs(model, example_inputs, "layers", "report the architecture")
    return model


def _find(model: nn.Module, rules: Mapping[str, tuple[Rule, ...]]) -> Iterator[tuple[Branch, str, Rule]]:
    for name, block in model.named_modules():
        for rule in (
            _rules_of(block, rules) if name else ()
        ):  # a network that is one block has nothing around it
            core = getattr(block, rule.child) if rule.child else block
            if isinstance(core, RemovedBranch) or rule.replace(block) is None:
                continue
            output = next(child for child in rule.outputs if not child or _has(block, child))
            yield Branch(_join(name, rule.child), _join(name, output)), name, rule


def _rules_of(block: nn.Module, rules: Mapping[str, tuple[Rule, ...]]) -> tuple[Rule, ...]:
    """The rules of the class whose ``forward()`` the block runs."""
    for kind in type(block).__mro__:
        if "forward" in vars(kind):
            return rules.get(f"{kind.__module__}.{kind.__qualname__}", ())
    return ()


def _has(block: nn.Module, child: str) -> bool:
    return isinstance(getattr(block, child, None), nn.Module)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _bypass(kept: Replacements) -> Bypass:
    made = Bypass()
    for name, module in kept.items():
        made.add_module(name, module)
    return made


def _not_in_place(activation: nn.Module) -> nn.Module:
    """Copy an activation so that it leaves its input alone, which is now another block's output."""
    copied: Any = copy.copy(activation)
    if hasattr(copied, "inplace"):
        copied.inplace = False
    kept: nn.Module = copied
    return kept


def _check(model: nn.Module, names: Sequence[str], found: Mapping[str, Any]) -> None:
    gone = removed_branches(model)
    for place, name in enumerate(names):
        if name in names[:place]:
            raise PlanError(f"the plan removes {name!r} twice; name each branch once")
        if name in gone:
            raise PlanError(f"the branch {name!r} has been removed already; make a new plan")
        if name not in found:
            hint = did_you_mean(name, found) or ";"
            raise PlanError(
                f"{name!r} is no residual branch of {type(model).__name__}{hint} find_branches(model) lists "
                f"{len(found)} of them"
            )
