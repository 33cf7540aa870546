"""Discrimination-aware channel pruning for Torch-Pruning: a one-shot importance, and the greedy method as a pruner.

Source: Zhuang et al., *Discrimination-aware Channel Pruning for Deep Neural Networks*, arXiv 1810.11809.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from torch_pruning import importance as torch_pruning_importance
from torch_pruning.dependency import Group
from torch_pruning.pruner import function

from dscore_plugin.arguments import as_arguments
from dscore_plugin.criteria.discrimination_aware import channel_scores, check_reading
from dscore_plugin.errors import BudgetError, CriterionError, DataError
from dscore_plugin.filters import filters_first
from dscore_plugin.groups import removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.modes import in_eval_mode
from dscore_plugin.plan import ChannelRemoval
from dscore_plugin.selection.discrimination_aware import DiscriminationAwareSelector
from dscore_plugin.selection.discrimination_run import TuningData
from dscore_plugin.selection.layer_candidates import candidates
from dscore_plugin.training.evaluation import check_logits
from dscore_plugin.training.head_places import Segment, find_segments
from dscore_plugin.training.heads import Batch, Heads, tapped
from dscore_plugin.training.progress import Progress

__all__ = ["DiscriminationAwareImportance", "DiscriminationAwarePruner"]

_CONSUMING = (function.prune_conv_in_channels, function.prune_linear_in_channels)


class DiscriminationAwareImportance(torch_pruning_importance.Importance):
    """Score a channel by the gradient of the loss in the weights that read it, for all layers at once.

    This is the score of Algorithm 2 without its loop: ``sum_j ||G_jk||_F`` for input channel k of every layer that
    reads the group, added up. At the unpruned weights the reconstruction error and its gradient are zero, so that of
    the joint loss the discrimination-aware part remains: the cross-entropy of the first head behind the layer, or of
    the network itself.

    It takes gradients from one of two places. After :meth:`watch` it accumulates them, ``update`` by ``update``,
    with the heads' losses and summed over images, so that neither the size of the batches nor the number of processes
    matters; once channels have left, they are taken anew, after :meth:`reset`. Otherwise it reads ``.grad``, as
    Torch-Pruning's Taylor importance does: call ``loss.backward()`` first.

    Args:
        reading: ``"kernels"``, or ``"slice"`` for the norm of a channel's whole slice of the gradient.

    Raises:
        CriterionError: if ``reading`` is unknown.
    """

    def __init__(self, reading: str = "kernels") -> None:
        check_reading(reading)
        self.reading = reading
        self._model: nn.Module | None = None
        self._heads: Heads | None = None
        self._segments: tuple[Segment, ...] = ()
        self._sums: dict[str, Tensor] = {}
        self._reduced: dict[nn.Module, Tensor] | None = None

    def watch(
        self, model: nn.Module, example_inputs: Tensor | tuple[Any, ...], heads: Heads | None = None
    ) -> None:
        """Take the gradients of a network from now on from :meth:`update`.

        Args:
            model: gives logits.
            example_inputs: the arguments of one forward pass (a tensor stands for one argument).
            heads: trained heads of this network; None takes the network's own loss alone.
        """
        layers = [name for name, module in model.named_modules() if _reads_channels(module)]
        ends = heads.ends if heads else ()
        self._segments = find_segments(model, example_inputs, layers, None if ends else 0, ends)
        self._model, self._heads = model, heads
        self.reset()

    def reset(self) -> None:
        """Forget all gradients."""
        self._sums, self._reduced = {}, None

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add the gradients of a batch; the network's weights and ``.grad`` stay as they are.

        Args:
            images: shape ``(b, ...)``, on the network's device.
            labels: shape ``(b,)``.

        Raises:
            CriterionError: if no network is watched, or it has lost channels since the first batch.
            ModelError: if it gives no logits for the labels.
        """
        if self._model is None:
            raise CriterionError("no network to take gradients of; call watch(model, example_inputs) first")
        self._reduced = None
        ends = self._heads.ends if self._heads else ()
        with _differentiable(self._model, self._heads), tapped(self._model, ends) as features:
            output = check_logits(self._model(images), labels)
            for segment in self._segments:
                head = self._heads.of(segment.end) if self._heads and segment.end else None
                logits = head(features[segment.end]) if head else output
                loss = functional.cross_entropy(logits, labels, reduction="sum")
                weights = [self._model.get_submodule(name).weight for name in segment.layers]
                found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
                for name, gradient in zip(segment.layers, found, strict=True):
                    self._add(name, gradient)

    def compute(self) -> dict[str, Tensor]:
        """Return the gradients summed over all images of all processes, by layer; every process must call it.

        Raises:
            CriterionError: if no image has been seen.
        """
        assert self._model is not None
        if not self._sums:
            raise CriterionError("no image has been seen; call update(images, labels) on some batches first")
        if self._reduced is None:
            total = {name: gradient.clone() for name, gradient in self._sums.items()}
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                for name in sorted(total):
                    torch.distributed.all_reduce(total[name])
            self._reduced = {self._model.get_submodule(name): gradient for name, gradient in total.items()}
        return {name: self._reduced[self._model.get_submodule(name)] for name in self._sums}

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """Score the channels of a group.

        Args:
            group: a group of DepGraph's, with all channels of its root or some of them.

        Returns:
            Scores of shape ``(len(group[0].idxs),)``, float64 on the CPU, all distinct; the lowest is pruned first.
            None if nothing reads the channels.

        Raises:
            CriterionError: if there are no gradients, they are not finite, or channels have left since they were taken.
        """
        if self._model is not None:
            self.compute()
        place = {channel: position for position, channel in enumerate(group[0].idxs)}
        scores, found = torch.zeros(len(place), dtype=torch.float64), False
        for item in group:
            if item.dep.handler not in _CONSUMING or any(root not in place for root in item.root_idxs):
                continue
            module = item.dep.target.module
            inputs = _input_scores(module, self._gradient(module), self.reading).to("cpu", torch.float64)
            root = torch.as_tensor([place[channel] for channel in item.root_idxs])
            scores.index_add_(0, root, inputs[torch.as_tensor(item.idxs)])
            found = True
        if not found:
            return None
        apart = torch.arange(len(scores), dtype=torch.float64) / len(
            scores
        )  # equal scores must not reach topk
        return scores + 1e-9 * (float(scores.max()) or 1.0) * apart

    def _add(self, name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            before = self._sums.get(name)
            if before is not None:
                _require_same_width(before, gradient)
            self._sums[name] = gradient.double() if before is None else before + gradient.double()

    def _gradient(self, module: nn.Module) -> Tensor:
        if self._reduced is not None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            summed = self._reduced.get(module)
            if summed is None:
                return torch.zeros_like(weight)
            _require_same_width(summed, weight)
            return summed
        gradient = module.weight.grad
        if not isinstance(gradient, Tensor):
            raise CriterionError(
                f"a {type(module).__name__} that reads the channels has no gradient; call loss.backward() on some "
                "images first, or watch() and update()"
            )
        return gradient


def _require_same_width(gradient: Tensor, present: Tensor) -> None:
    if gradient.shape != present.shape:
        raise CriterionError(
            f"the gradients were taken of a wider network: a weight had the shape {tuple(gradient.shape)} and has "
            f"{tuple(present.shape)}; call reset() and then update() on some images after every removal"
        )


def _reads_channels(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim >= 2 and not isinstance(module, nn.Embedding)


def _input_scores(module: nn.Module, gradient: Tensor, reading: str) -> Tensor:
    """Score each input channel of a layer: shape ``(inputs,)``; convolutions may have groups or be transposed."""
    parts = filters_first(module, gradient).chunk(int(getattr(module, "groups", 1)))
    return torch.cat([channel_scores(part, reading) for part in parts])


@contextmanager
def _differentiable(model: nn.Module, heads: Heads | None) -> Iterator[None]:
    """Let every weight take gradients, in eval mode; on exit everything is as it was."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with in_eval_mode(model), in_eval_mode(heads or nn.ModuleList()), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class DiscriminationAwarePruner:
    """The full greedy method, with a face like Torch-Pruning's pruners; removal is DepGraph's.

    The layers that lose channels are optimised on the way, and with ``head_epochs`` the network is fine-tuned, as
    :class:`~dscore_plugin.selection.discrimination_aware.DiscriminationAwareSelector` says. Only groups that one
    convolution alone reads are pruned; residual streams stay.

    Example:
        >>> pruner = DiscriminationAwarePruner(model, example_inputs, loader, pruning_ratio=0.3)  # doctest: +SKIP
        >>> pruner.step()  # doctest: +SKIP

    Args:
        model: gives logits; pruned in place.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).
        batches: images and labels to choose by, such as a DataLoader; kept in memory. Its order should not be sorted
            by class.
        pruning_ratio: the share of every group's channels to remove, ``floor(ratio * n)``; with ``adapt=True`` the
            most that may leave.
        ignored_layers: modules whose channels stay; a container stands for everything in it.
        training: images and labels for ``head_epochs``, such as a DataLoader, run through anew every epoch; by default
            ``batches``.
        seed: of the heads' weights.
        work: a folder for checkpoints, one a layer; an interrupted choice goes on with them.
        progress: shows bars.
        **options: of :class:`DiscriminationAwareSelector`.

    Attributes:
        removals: what left, once :meth:`step` is done.

    Raises:
        BudgetError: if the ratio is out of range.
        CriterionError: if an option is unknown or out of range.
        DataError: if ``training`` can be run through only once.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        batches: Iterable[Batch],
        *,
        pruning_ratio: float = 0.5,
        ignored_layers: Sequence[nn.Module] = (),
        training: Iterable[Batch] | None = None,
        seed: int = 0,
        work: Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        if not 0 <= pruning_ratio < 1:
            raise BudgetError(f"pruning_ratio must lie in [0, 1), got {pruning_ratio:g}")
        if isinstance(training, Iterator):
            raise DataError(
                f"training must give its images anew for every epoch; a {type(training).__name__} gives them once: "
                "pass a DataLoader or a list"
            )
        try:
            self._selector = DiscriminationAwareSelector(**options)
        except TypeError as error:
            raise CriterionError(
                f"DiscriminationAwarePruner cannot take the options {options}: {error}"
            ) from error
        self.model = model
        self.example_inputs = as_arguments(example_inputs)
        self.pruning_ratio = pruning_ratio
        self.removals: tuple[ChannelRemoval, ...] = ()
        self._ignored, self._batches, self._training = ignored_layers, batches, training
        self._seed, self._work, self._progress = seed, work, progress

    def step(self) -> None:
        """Choose the channels, and remove the others from the network.

        Raises:
            DScoreError: as :meth:`DiscriminationAwareSelector.select`, and if the network does not run afterwards.
        """
        graph = PruningGraph(self.model, self.example_inputs, self._ignored)
        found = candidates(self.model, self.example_inputs, graph.prunable)
        units = {c.group.name: c.group.units for c in found}
        keep = {name: width - removal_count(self.pruning_ratio, width) for name, width in units.items()}
        batches = list(self._batches)
        orders = self._selector.choose(
            self.model, self.example_inputs, found, keep, batches, self._tuning(batches), seed=self._seed,
            work=self._work, progress=self._progress,
        )  # fmt: skip
        gone = [(c.group, set(range(c.group.units)) - set(orders[c.group.name])) for c in found]
        self.removals = tuple(
            ChannelRemoval(group.name, group.root_channels(units)) for group, units in gone if units
        )
        remove_channels(self.model, self.example_inputs, self.removals)

    def pruning_history(self) -> list[tuple[str, bool, list[int]]]:
        """Return what left, in the form that Torch-Pruning's ``load_pruning_history`` replays."""
        return [(removal.layer, True, list(removal.channels)) for removal in self.removals]

    def _tuning(self, batches: Sequence[Batch]) -> TuningData | None:
        training = self._training
        if not self._selector.head_epochs:
            return None
        if training is None:
            return TuningData.of(batches)
        if isinstance(training, DataLoader) and not isinstance(training.dataset, IterableDataset):
            return TuningData(lambda _: training, len(training), len(training.dataset))  # type: ignore[arg-type]
        sizes = [len(labels) for _, labels in training]
        return TuningData(lambda _: training, len(sizes), sum(sizes))
