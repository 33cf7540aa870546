"""The criteria this package knows: their papers, what they prune, what they need, and where they live.

The command line, the docs, NNI and the tests read this list; nobody asks for a criterion's name, only for its kind.
Third parties add criteria through the entry-point group ``dscore_plugin.criteria``: each entry point names a
:class:`CriterionInfo`, or a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from dscore_plugin.errors import CriterionError, did_you_mean
from dscore_plugin.loading import load_object

if TYPE_CHECKING:
    from dscore_plugin.selection.selector import Selector

Kind = Literal["score", "data_score", "trained", "selector"]
Granularity = Literal["channel", "kernel", "layer"]
ENTRY_POINTS = "dscore_plugin.criteria"

_INTEGRATION = "dscore_plugin.integrations.torch_pruning.importance"
_TORCH_PRUNING = "torch_pruning.pruner.importance"


@dataclass(frozen=True)
class CriterionInfo:
    """What one needs to know to choose and to build a criterion.

    Attributes:
        name: as on the command line.
        kind: ``score`` (weights only), ``data_score`` (accumulates over batches), ``trained`` (needs training of
            its own) or ``selector`` (makes a plan by search).
        paper: authors and title.
        arxiv: the paper's arXiv id, or its venue where it has none.
        granularity: what it can prune.
        summary: one line.
        importance: ``module:attribute`` of its importance class for Torch-Pruning; empty where it only searches.
        options: keyword arguments of that class, or of the selector.
        function: ``module:attribute`` of its pure function, or an empty string.
        selector: ``module:attribute`` of its :class:`~dscore_plugin.selection.selector.Selector`; kind ``selector``.
        kernel_scores: ``module:attribute`` of a function ``(model, example_inputs) -> {layer: scores}`` that scores
            the kernels of every convolution, shape ``(out, in / groups)``; granularity ``kernel``.
        needs_data: whether it looks at images.
        needs_gradients: whether it needs a backward pass.
        needs_batchnorm: whether it reads batch norm's scales.
        stops_by_itself: whether it can do without a goal, which is then the most that may leave.
        seeded: whether its scores are drawn by the seed.
        baseline: whether it is Torch-Pruning's own, listed for comparison.
    """

    name: str
    kind: Kind
    paper: str
    arxiv: str
    granularity: tuple[Granularity, ...]
    summary: str
    importance: str = ""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    function: str = ""
    selector: str = ""
    kernel_scores: str = ""
    needs_data: bool = False
    needs_gradients: bool = False
    needs_batchnorm: bool = False
    stops_by_itself: bool = False
    seeded: bool = False
    baseline: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise CriterionError(f"criterion {self.name!r} has kind {self.kind!r}; expected {get_args(Kind)}")
        unknown = set(self.granularity) - set(get_args(Granularity))
        if unknown or not self.granularity:
            raise CriterionError(
                f"criterion {self.name!r} has granularity {self.granularity}; expected some of {get_args(Granularity)}"
            )
        if not (self.selector if self.kind == "selector" else self.importance):
            raise CriterionError(
                f"criterion {self.name!r} of kind {self.kind!r} names no class; set importance=, or selector="
            )

    def build(self, **options: Any) -> Callable[[Any], Any]:
        """Return the importance object: called with a group of DepGraph's, it scores the group's channels.

        Args:
            **options: override those of the criterion.

        Raises:
            CriterionError: if an option is unknown or wrong, or the importance class cannot be imported.
        """
        built: Callable[[Any], Any] = self._build(self.importance, "importance", options)
        return built

    def build_selector(self, **options: Any) -> Selector:
        """Return the selector: its ``select(model, data, request)`` makes a plan.

        Args:
            **options: override those of the criterion.

        Raises:
            CriterionError: if an option is unknown or wrong, or the class cannot be imported.
        """
        built: Selector = self._build(self.selector, "selector", options)
        return built

    def _build(self, path: str, what: str, options: Mapping[str, Any]) -> Any:
        if not path:
            raise CriterionError(f"criterion {self.name!r} of kind {self.kind!r} has no {what}")
        try:
            build = load_object(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise CriterionError(
                f"the {what} {path!r} of criterion {self.name!r} cannot be imported: {error}"
            ) from error
        try:
            return build(**{**self.options, **options})
        except TypeError as error:
            raise CriterionError(
                f"criterion {self.name!r} cannot take the options {options}: {error}"
            ) from error


_DCP = "Zhuang et al., Discrimination-aware Channel Pruning for Deep Neural Networks"
_D_SCORE = "Park et al., D-Score: A Synapse-Inspired Approach for Filter Pruning"
_ENERGY = "Soltani et al., On the Energy Statistics of Feature Maps in Pruning of Neural Networks with Skip-Connections"
_BUILT_IN = (
    CriterionInfo(
        "d_score", "score", _D_SCORE, "2308.04470", ("channel",),
        "ranks of the positive and of the negative mass of a filter, added",
        f"{_INTEGRATION}:DScoreImportance", function="dscore_plugin.criteria.d_score:d_score",
    ),
    CriterionInfo(
        "d_step", "score", _D_SCORE, "2308.04470", ("channel",),
        "filters that are small in both signs first: order by the larger of the two ranks",
        f"{_INTEGRATION}:DStepImportance", function="dscore_plugin.criteria.d_score:d_step",
    ),
    CriterionInfo(
        "d_step_gm", "score", _D_SCORE, "2308.04470", ("channel",),
        "D-Step on summed distances to the other filters, for each sign",
        f"{_INTEGRATION}:DStepGMImportance", function="dscore_plugin.criteria.d_score:d_step_gm",
    ),
    CriterionInfo(
        "dependency_aware", "score", "Zhao et al., Dependency-Aware Filter Pruning", "2005.02634",
        ("channel",), "batch norm's scale times the mean weight that reads the channel (made for sparse training)",
        f"{_INTEGRATION}:DependencyAwareImportance",
        function="dscore_plugin.criteria.dependency_aware:dependency_aware",
    ),
    CriterionInfo(
        "coarse", "selector", "Anwar and Sung, Compact Deep Convolutional Neural Networks with Coarse Pruning",
        "1610.09639", ("channel", "kernel"), "of N random masks over the whole network, the one that errs least",
        selector="dscore_plugin.selection.coarse:CoarseSelector", function="dscore_plugin.criteria.coarse:draw_leaving",
        needs_data=True,
    ),
    CriterionInfo(
        "synaptic_strength", "score", "Lin et al., Synaptic Strength For Convolutional Neural Network", "1811.02454",
        ("kernel", "channel"), "batch norm's scale times the norm of each kernel that reads the channel",
        "dscore_plugin.integrations.torch_pruning.synaptic:SynapticStrengthImportance",
        kernel_scores="dscore_plugin.integrations.torch_pruning.synaptic:kernel_scores",
    ),
    CriterionInfo(
        "energy", "selector", _ENERGY, "2201.11209", ("layer",),
        "residual branches, clustered by how far apart their feature maps of different classes lie",
        selector="dscore_plugin.selection.energy:EnergySelector",
        function="dscore_plugin.criteria.energy:layer_energy", needs_data=True,
    ),
    CriterionInfo(
        "energy_rank", "selector", _ENERGY, "2201.11209", ("layer",),
        "the baseline without clusters: the residual branches of the lowest energy scores leave",
        options=MappingProxyType({"choice": "rank"}),
        selector="dscore_plugin.selection.energy:EnergySelector", needs_data=True,
    ),
    CriterionInfo(
        "random_layers", "selector", "none: the baseline that every criterion must beat", "-", ("layer",),
        "random residual branches leave, by seed", options=MappingProxyType({"choice": "random"}),
        selector="dscore_plugin.selection.energy:EnergySelector", seeded=True,
    ),
    CriterionInfo(
        "dcp", "selector", _DCP, "1810.11809", ("channel",),
        "channels that lower a reconstruction and a classification loss most, taken one by one",
        selector="dscore_plugin.selection.discrimination_aware:DiscriminationAwareSelector",
        function="dscore_plugin.criteria.discrimination_aware:channel_scores", needs_data=True, needs_gradients=True,
    ),
    CriterionInfo(
        "dcp_adapt", "selector", _DCP, "1810.11809", ("channel",),
        "the same, until one more channel hardly lowers the loss",
        options=MappingProxyType({"adapt": True}),
        selector="dscore_plugin.selection.discrimination_aware:DiscriminationAwareSelector",
        function="dscore_plugin.criteria.discrimination_aware:channel_scores", needs_data=True, needs_gradients=True,
        stops_by_itself=True,
    ),
    CriterionInfo(
        "discrimination_aware", "data_score", _DCP, "1810.11809", ("channel",),
        "norm of the loss's gradient in the layers that read a channel, at once for all",
        "dscore_plugin.integrations.torch_pruning.discrimination_aware:DiscriminationAwareImportance",
        function="dscore_plugin.criteria.discrimination_aware:channel_scores", needs_data=True, needs_gradients=True,
    ),
    CriterionInfo(
        "l1", "score", "Li et al., Pruning Filters for Efficient ConvNets", "1608.08710", ("channel",),
        "group L1 norm (Torch-Pruning's)",
        f"{_TORCH_PRUNING}:GroupMagnitudeImportance", MappingProxyType({"p": 1}), baseline=True,
    ),
    CriterionInfo(
        "l2", "score", "Fang et al., DepGraph: Towards Any Structural Pruning", "2301.12900", ("channel",),
        "group L2 norm (Torch-Pruning's)",
        f"{_TORCH_PRUNING}:GroupMagnitudeImportance", MappingProxyType({"p": 2}), baseline=True,
    ),
    CriterionInfo(
        "fpgm", "score", "He et al., Filter Pruning via Geometric Median", "1811.00250", ("channel",),
        "summed distance to the other filters (Torch-Pruning's)",
        f"{_TORCH_PRUNING}:FPGMImportance", baseline=True,
    ),
    CriterionInfo(
        "bn_scale", "score", "Liu et al., Learning Efficient Convolutional Networks through Network Slimming",
        "1708.06519", ("channel",), "magnitude of batch norm's scale (Torch-Pruning's)",
        f"{_TORCH_PRUNING}:BNScaleImportance", needs_batchnorm=True, baseline=True,
    ),
    CriterionInfo(
        "lamp", "score", "Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning", "2010.07611",
        ("channel",), "layer-adaptive magnitude (Torch-Pruning's)",
        f"{_TORCH_PRUNING}:LAMPImportance", baseline=True,
    ),
    CriterionInfo(
        "taylor", "data_score", "Molchanov et al., Importance Estimation for Neural Network Pruning", "1906.10771",
        ("channel",), "first-order Taylor expansion of the loss (Torch-Pruning's)",
        f"{_TORCH_PRUNING}:GroupTaylorImportance", needs_data=True, needs_gradients=True, baseline=True,
    ),
    CriterionInfo(
        "random", "score", "none: the baseline that every criterion must beat", "-", ("channel",),
        "random scores, by seed (Torch-Pruning's)",
        f"{_TORCH_PRUNING}:RandomImportance", baseline=True, seeded=True,
    ),
)  # fmt: skip


def _load(entry: metadata.EntryPoint) -> list[Any]:
    try:
        loaded = entry.load()
        return [loaded] if isinstance(loaded, CriterionInfo) else list(loaded)
    except Exception as error:
        raise CriterionError(
            f"entry point {entry.name!r} of {ENTRY_POINTS!r} cannot be loaded: {error}; repair or uninstall the "
            f"package that brings it ({entry.value})"
        ) from error


@cache
def _criteria() -> dict[str, CriterionInfo]:
    known = {info.name: info for info in _BUILT_IN}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        for info in _load(entry):
            if not isinstance(info, CriterionInfo):
                raise CriterionError(
                    f"entry point {entry.name!r} of {ENTRY_POINTS!r} is no CriterionInfo: {info!r}"
                )
            if info.name in known:
                raise CriterionError(
                    f"entry point {entry.name!r} redefines the criterion {info.name!r}; rename it"
                )
            known[info.name] = info
    return known


def list_criteria(filter: Callable[[CriterionInfo], bool] | None = None) -> list[CriterionInfo]:
    """Return the known criteria, ours first, then the baselines.

    Args:
        filter: keep those for which it is true, e.g. ``lambda info: not info.needs_data``.
    """
    infos = sorted(_criteria().values(), key=lambda info: info.baseline)
    return [info for info in infos if filter is None or filter(info)]


def get_criterion(name: str) -> CriterionInfo:
    """Return what is known of a criterion; raise CriterionError with the nearest names if it is unknown."""
    known = _criteria()
    if name not in known:
        raise CriterionError(f"criterion {name!r} is unknown{did_you_mean(name, known)} (see: dscore list)")
    return known[name]
