"""The criteria as NNI pruners."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.basic_pruner import _NormPruner
from nni.compression.utils.evaluator import Evaluator
from torch import Tensor, nn

from dscore_plugin.errors import CriterionError, ModelError
from dscore_plugin.integrations.nni.config import kernel_size, read_config
from dscore_plugin.integrations.nni.extension import MaskExtension, extend, remember
from dscore_plugin.integrations.nni.scoring import Scorer, gradients_set
from dscore_plugin.integrations.nni.sparsity import generate_sparsity
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.modes import in_eval_mode, modes_kept
from dscore_plugin.registry import list_criteria

Masks = dict[str, dict[str, Tensor]]
_GUESSED_SIZES = (32, 64, 224)


class CriterionPruner(_NormPruner):
    """Mask by any criterion of the registry, chosen in the config list.

    An entry may say ``"criterion": "d_step"`` and ``"criterion_options": {...}`` beside NNI's own keys. Scores are
    those of the Torch-Pruning face: all layers of a channel group get the scores of the group. Schedules
    (``AGPPruner``, ``LinearPruner``), fused compression and ``from_compressor`` work as with NNI's pruners.

    NNI's masks silence a weight, and the batch norm behind it still emits its shift: a masked network is not the
    network that removal leaves. With ``extend_to_norm`` the layers that read masked channels receive zeros for them,
    as long as the wrappers are on. Copy or save the network without its wrappers (``unwrap_model()``).

    Args:
        model: the network.
        config_list: NNI's config list.
        evaluator: NNI's, for criteria that look at data and for schedules.
        existed_wrappers: for NNI's own use.
        example_inputs: the arguments of one forward pass, with a batch dimension (a tensor stands for one argument).
            By default the evaluator's dummy input, or an image of a size that the network takes.
        extend_to_norm: whether masks are carried on up to the consumers.
        training_steps: for how many batches :meth:`compress` gathers gradients, for criteria that need them; the
            weights are put back. Under a schedule the gradients of its own steps are used instead.
        seed: for criteria that draw random numbers.

    Raises:
        CriterionError: if a criterion, an option, a granularity or another key cannot be served, an entry matches no
            layer, or a criterion needs data and there is no evaluator. The network is left as it was.
        ModelError: if the network cannot be traced, or already wears wrappers.
    """

    criterion = "d_score"
    _fixed = False

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Tensor | tuple[Any, ...] | None = None,
        extend_to_norm: bool = True,
        training_steps: int = 16,
        seed: int = 0,
    ) -> None:
        refuse_wrapped(model)
        entries, self._targets = read_config(model, config_list, self.criterion, fixed=self._fixed)
        needing = next((t.info.name for t in self._targets.values() if t.info.needs_data), None)
        if needing is not None and evaluator is None:
            raise CriterionError(
                f"criterion {needing!r} needs images; pass evaluator=TorchEvaluator(...), NNI's way to hand them over"
            )
        inputs = example_inputs if example_inputs is not None else guess_inputs(model, evaluator)
        graph = PruningGraph(model, inputs)
        self._scorer = Scorer(graph, self._targets, seed)
        self._needs_data = needing is not None
        if not self._needs_data:
            self._scorer.metrics(list(self._targets))  # what cannot be scored is refused here
        self._graph, self._extends, self._training_steps = graph, extend_to_norm, training_steps
        self._extended: set[str] | None = None
        self._gradients: dict[str, Tensor] = {}
        super().__init__(model, entries, evaluator, existed_wrappers)

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        **options: Any,
    ) -> CriterionPruner:
        """Go on from another compressor: its network, its wrappers and its evaluator.

        Args:
            compressor: NNI's or this package's.
            new_config_list: the config list of the new pruner.
            evaluator: used if the compressor has none.
            **options: the other keyword arguments of the class.
        """
        was_wrapped = compressor._is_wrapped
        try:
            made: CriterionPruner = super(_NormPruner, cls).from_compressor(
                compressor, new_config_list, evaluator=evaluator, **options
            )
        except Exception:
            if was_wrapped and not compressor._is_wrapped:
                compressor.wrap_model()
            raise
        return made

    def wrap_model(self) -> None:
        """Put all wrappers on, and with them what carries the masks on."""
        if self._extended != self._module_wrappers.keys():
            self._extended = set(self._module_wrappers)
            wrappers = self._module_wrappers
            extension = (
                MaskExtension(self.bound_model, self._graph.groups, wrappers) if self._extends else None
            )
            extend(wrappers, extension)
            remember(self.bound_model, extension)
        super().wrap_model()

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> list[int] | str | None:
        target = self._targets.get(target_space._wrapper.name)
        if target is not None and target.granularity == "kernel":
            return kernel_size(len(target_space.shape or ()))
        default: list[int] | str | None = super()._set_default_sparse_granularity(target_space)
        return default

    def _calculate_metrics(self, data: Masks) -> Masks:
        with _bare(self._module_wrappers), gradients_set(self.bound_model, self._checked_gradients()):
            metrics = self._scorer.metrics(list(data))
        return {layer: {"weight": metric} for layer, metric in metrics.items()}

    def _generate_sparsity(self, metrics: Masks) -> Masks:
        order = {name: place for place, (name, _) in enumerate(self.bound_model.named_modules())}
        spaces = dict(sorted(self._target_spaces.items(), key=lambda item: order.get(item[0], -1)))
        masks = generate_sparsity(metrics, spaces)
        return {
            layer: {name: self._whole(layer, mask).float() for name, mask in of_layer.items()}
            for layer, of_layer in masks.items()
        }

    def _whole(self, layer: str, mask: Tensor) -> Tensor:
        return self._scorer.complete(self._targets[layer], mask) if layer in self._targets else mask

    def _checked_gradients(self) -> dict[str, Tensor] | None:
        if self._needs_data and not self._gradients:
            raise CriterionError(
                "no gradients were gathered; the evaluator's training function must call backward() and the "
                "optimizer's step()"
            )
        return self._gradients if self._needs_data else None

    def _single_compress(self, max_steps: None, max_epochs: None) -> None:
        if self._needs_data:
            self._gather_gradients()
        super()._single_compress(max_steps, max_epochs)

    def _gather_gradients(self) -> None:
        """Run the evaluator's training and keep the sum of its gradients; weights and statistics stay."""
        model, before = self.bound_model, _state(self.bound_model)
        parameters = dict(model.named_parameters())

        def put_back() -> None:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])

        self.evaluator.bind_model(model, self._get_param_names_map())
        try:
            self._gradients = {}
            self.evaluator.patch_optimizer_step([self._add_gradients], [put_back])
            with modes_kept(model):
                self.evaluator.train(self._training_steps, None)
        finally:
            self.evaluator.unbind_model()
            model.load_state_dict(before)

    def _register_trigger(self, evaluator: Evaluator) -> None:
        if self._needs_data:
            self._gradients = {}
            evaluator.patch_optimizer_step([self._add_gradients], [])
        super()._register_trigger(evaluator)

    def generate_masks(self) -> Masks:
        """Score the weights as they are now, and make masks of the sparsity that is configured now."""
        masks: Masks = super().generate_masks()
        self._gradients = {}  # the next masks of a schedule look at the steps that follow
        return masks

    @torch.no_grad()
    def _add_gradients(self) -> None:
        for name, parameter in self.bound_model.named_parameters():
            if parameter.grad is not None:
                bare = name.replace("_nni_wrapper.", "")
                known = self._gradients.get(bare)
                self._gradients[bare] = parameter.grad.clone() if known is None else known + parameter.grad


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ModelError if a network wears NNI's wrappers."""
    worn = next((name for name, module in model.named_modules() if hasattr(module, "_nni_wrapper")), None)
    if worn is not None:
        raise ModelError(f"{worn!r} wears a wrapper of NNI's; call unwrap_model() on its pruner first")


def guess_inputs(model: nn.Module, evaluator: Evaluator | None) -> tuple[Any, ...]:
    """Find arguments for a forward pass: the evaluator's dummy input, or an image of zeros.

    Args:
        model: the network.
        evaluator: NNI's, or None.

    Raises:
        ModelError: if the network takes none of the images that are tried.
    """
    dummy = getattr(evaluator, "dummy_input", getattr(evaluator, "_dummy_input", None))
    if dummy is not None:
        values = dummy.values() if isinstance(dummy, Mapping) else dummy
        return (dummy,) if isinstance(dummy, Tensor) else tuple(values)
    shapes = list(_likely_shapes(model))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for shape in shapes:
        image = torch.zeros(1, *shape, device=device)
        if _runs(model, image):
            return (image,)
    raise ModelError(
        f"{type(model).__name__} takes no image of the shapes {shapes}; pass example_inputs=, the arguments of one "
        "forward pass"
    )


def _likely_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    config = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" in config:
        yield tuple(config["input_size"])
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None:
        yield from ((first.in_channels, size, size) for size in _GUESSED_SIZES)


def _runs(model: nn.Module, image: Tensor) -> bool:
    try:
        with torch.no_grad(), in_eval_mode(model):
            model(image)
    except Exception:
        return False
    return True


@contextmanager
def _bare(wrappers: Mapping[str, ModuleWrapper]) -> Iterator[None]:
    """Take the wrappers off that are on, so that the network's weights are where they belong; then put them on."""
    worn = [wrapper for wrapper in wrappers.values() if hasattr(wrapper.module, "_nni_wrapper")]
    try:
        for wrapper in worn:
            wrapper.unwrap()
        yield
    finally:
        for wrapper in worn:
            wrapper.wrap()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@cache
def named_pruners() -> dict[str, type[CriterionPruner]]:
    """Return one pruner class for each criterion that scores, by name: ``DScorePruner`` for ``d_score``, ..."""
    made = {}
    for info in list_criteria(lambda info: info.kind != "selector" and info.granularity != ("layer",)):
        name = "".join(part.capitalize() for part in re.split(r"\W|_", info.name)) + "Pruner"
        text = f"{info.summary[:1].upper()}{info.summary[1:]}.\n\n    {info.paper} ({info.arxiv})."
        text += "\n\n    The arguments are those of :class:`CriterionPruner`; entries need name no criterion.\n    "
        body = {"__doc__": text, "__module__": __name__, "criterion": info.name, "_fixed": True}
        made[name] = type(name, (CriterionPruner,), body)
    return made
