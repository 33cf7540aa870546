"""What timm's modules need so that their channels can be pruned: a table of rules by class.

The graph follows channels by what a forward pass did. It cannot see what the code would do at another width; that is
said here, for each class of timm that matters: whether it cuts and folds channels by what it finds, which of its
layers' channels must stay because a number in its code or in a buffer fixes them, which tensors beside weight and bias
run along a layer's outputs, and which attributes must follow a width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Rule:
    """What the graph and the removal must know of a class.

    Attributes:
        splits: its code cuts channels into equal parts, whatever the width (``chunk``).
        folds: its code divides channels by a fixed number of groups, whatever the width.
        keeps: names below the module whose output channels must stay; of parameters, too.
        reads: names below the module whose input channels must stay.
        reason: why.
        along: its own tensors that run along its output channels; for a convolution those beside weight and bias.
        channel_dim: of a layer that gives out the channels it reads, the dimension that holds them, or the name of
            the attribute that says so.
        widths: attributes of such a layer that hold its width.
        averages: such a layer computes something over its channels, as a norm does.
        refresh: sets attributes after a removal.
    """

    splits: bool = False
    folds: bool = False
    keeps: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    reason: str = "its code fixes the width"
    along: tuple[str, ...] = ()
    channel_dim: int | str | None = None
    widths: tuple[str, ...] = ()
    averages: bool = False
    refresh: Callable[[Any], None] | None = None


def _attention(*reads: str, keeps: tuple[str, ...] = ()) -> Rule:
    return Rule(
        reads=reads, keeps=keeps, reason="attention divides the width it finds in front of it by its heads"
    )


def _set_scale_shape(scale: Any) -> None:
    scale.shape = (len(scale.scale), *scale.shape[1:])


_STD_CONV = Rule(along=("gain",))

_NORM = Rule(along=("weight", "bias"), channel_dim=-1, widths=("normalized_shape",), averages=True)
_NORM_2D = replace(_NORM, channel_dim=1)

RULES: dict[str, Rule] = {
    # layers
    "RmsNorm": _NORM,
    "RmsNormFp32": _NORM,
    "RmsNorm2d": _NORM_2D,
    "RmsNorm2dFp32": _NORM_2D,
    "SimpleNorm": _NORM,
    "SimpleNormFp32": _NORM,
    "SimpleNorm2d": _NORM_2D,
    "SimpleNorm2dFp32": _NORM_2D,
    "GlobalResponseNorm": replace(_NORM, channel_dim="channel_dim", widths=()),
    "BlurPool2d": Rule(along=("filt",), channel_dim=1, widths=("channels",)),
    "GluMlp": Rule(splits=True),
    "SpatialGatingUnit": Rule(splits=True),
    "ScaledStdConv2d": _STD_CONV,
    "ScaledStdConv2dSame": _STD_CONV,
    "metaformer.Scale": Rule(refresh=_set_scale_shape),
    # attention
    "AttentionPoolLatent": _attention("kv"),
    "cait.ClassAttn": _attention("q", "k", "v"),
    "cait.TalkingHeadAttn": _attention("qkv", keeps=("proj_l", "proj_w")),
    "coat.FactorAttnConvRelPosEnc": _attention("qkv"),
    "convit.GPSA": _attention("v", "qk", keeps=("pos_proj",)),
    "convit.MHSA": _attention("qkv"),
    "crossvit.CrossAttention": _attention("wq", "wk", "wv"),
    "davit.ChannelAttention": _attention("qkv"),
    "davit.ChannelAttentionV2": _attention("qkv"),
    "davit.WindowAttention": _attention("qkv"),
    "efficientformer_v2.Attention2d": _attention(keeps=("talking_head1", "talking_head2")),
    "efficientformer_v2.Attention2dDownsample": _attention(keeps=("talking_head1", "talking_head2")),
    "nest.Attention": _attention("qkv"),
    "pvt_v2.Attention": _attention("q", "kv"),
    "tnt.PixelEmbed": Rule(keeps=("proj",)),
    "swin_transformer_v2_cr.WindowMultiHeadAttention": _attention("qkv", keeps=("meta_mlp.fc2",)),
    "twins.LocallyGroupedAttn": _attention("qkv"),
    "twins.GlobalSubSampleAttn": _attention("q", "kv"),
    "vision_transformer_relpos.RelPosAttention": _attention("qkv"),
    "volo.OutlookAttention": _attention("v", "attn"),
    "volo.Attention": _attention("qkv"),
    "volo.ClassAttention": _attention("q", "kv"),
    "xcit.XCA": _attention("qkv"),
}


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a module of timm's; looked up as ``"file.Class"``, then as ``"Class"``, its bases too."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("timm."):
            file = kind.__module__.rpartition(".")[2]
            found = RULES.get(f"{file}.{kind.__name__}") or RULES.get(kind.__name__)
            if found is not None:
                return found
    return None


def channel_dim(module: nn.Module) -> int | None:
    """Return the dimension of the channels that a layer of timm's reads and gives out; None for all others."""
    rule = rule_of(module)
    if rule is None or rule.channel_dim is None or any(getattr(module, name) is None for name in rule.widths):
        return None
    return getattr(module, rule.channel_dim) if isinstance(rule.channel_dim, str) else rule.channel_dim


def rules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule]]:
    """Walk the modules of a network that have a rule."""
    for name, module in model.named_modules():
        rule = rule_of(module)
        if rule is not None:
            yield name, module, rule


def protected(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Say what must stay.

    Returns:
        Two tables from qualified names to reasons: whose output channels (layers, parameters), and whose inputs.
    """
    outputs: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for name, _, rule in rules(model):
        prefix = f"{name}." if name else ""
        outputs |= {prefix + child: rule.reason for child in rule.keeps}
        inputs |= {prefix + child: rule.reason for child in rule.reads}
    return outputs, inputs


def refresh(model: nn.Module) -> None:
    """Bring attributes that follow widths up to date after a removal."""
    for _, module, rule in rules(model):
        if rule.refresh is not None:
            rule.refresh(module)
    if type(model).__module__.startswith("timm."):
        _follow_classifier(model)


def _follow_classifier(model: Any) -> None:
    """Give timm's models the width in front of their classifier, so that ``reset_classifier`` builds one that fits."""
    find = getattr(model, "get_classifier", None)
    classifier = find() if callable(find) else None
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        return
    width = classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels
    pool = next((m for m in model.modules() if hasattr(m, "feat_mult")), None)
    pooled = pool.feat_mult() if pool is not None else 1
    width //= pooled
    before = getattr(model, "head_hidden_size", getattr(model, "num_features", None))
    hidden = getattr(model, "conv_head", None)
    if isinstance(hidden, nn.Conv2d) and getattr(model, "num_features", before) != before:
        model.num_features = (
            hidden.in_channels // pooled
        )  # a layer stands between the pooling and the classifier
    heads = [m for m in model.modules() if type(m).__name__.endswith("ClassifierHead")]
    for module in (model, *heads):
        for name in ("num_features", "head_hidden_size", "embed_dim", "in_features"):
            if isinstance(value := getattr(module, name, None), int) and value == before:
                setattr(module, name, width)
