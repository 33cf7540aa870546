"""Sparsity training that steers itself: the L1 penalty rises until the wanted share of channels is near zero.

Source: *Dependency-Aware Filter Pruning*, arXiv 2005.02634, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.criteria.dependency_aware import TRAINING_THRESHOLD, dependency_aware, sparsity
from dscore_plugin.errors import TrainingError
from dscore_plugin.filters import filters_first

DELTA = 1e-5  # the paper's, for its 160 epochs
EPOCHS = 160

Penalty = Callable[[nn.Module, float], None]  # adds a penalty of strength lambda to the gradients, in place


@dataclass(frozen=True)
class ScoredLayer:
    """A batch norm whose channels are scored, and the layers that read them.

    Attributes:
        name: the group of channels, as a plan names it.
        norm: qualified name of the batch norm.
        consumers: qualified names of the convolutions and linear layers behind it.
    """

    name: str
    norm: str
    consumers: tuple[str, ...]

    def scores(self, model: nn.Module) -> Tensor:
        """Score the channels, summed over the consumers: shape ``(n,)``, float32."""
        gamma = _weight(model, self.norm)
        return torch.stack([dependency_aware(gamma, _weight(model, c)) for c in self.consumers]).sum(dim=0)


def measure_sparsity(
    model: nn.Module, layers: Sequence[ScoredLayer], threshold: float = TRAINING_THRESHOLD
) -> float:
    """Return the share of the scored channels that lie near zero, relative to their layer's maximum."""
    return sparsity([layer.scores(model) for layer in layers], threshold)


def scaled_delta(epochs: int, delta: float = DELTA, reference: int = EPOCHS) -> float:
    """Scale the step of lambda, made for 160 epochs, to a run of another length.

    Lambda begins at 0 and can rise by one step between two epochs, so ``N`` epochs reach ``(N - 1) delta`` in the
    last. Whether a scale dies is decided by lambda against the gradient of the loss; so the highest lambda, the sum
    of all steps, is what is kept: ``delta (160 - 1) / (N - 1)``, which is 1.8e-4 for 10 epochs. (Keeping lambda's
    sum over the epochs, ``delta N (N - 1) / 2``, would need 2.8e-3, and a final lambda of 0.025, sixteen times the
    paper's highest.)

    Args:
        epochs: of the run; one epoch has no step that counts and is treated as two.
        delta: the step for a run of ``reference`` epochs.
        reference: epochs.

    Returns:
        The step.
    """
    return delta * (reference - 1) / max(1, epochs - 1)


class SparsityController:
    """Raise the penalty while sparsity grows too slowly, lower it when the target is passed and it still grows.

    After epoch ``t`` (from 0) of ``N``, with the sparsity ``P_t`` and the target ``P*``::

        gain = P_t - P_(t-1);   expected = (P* - P_t) / (N - t)
        P_t < P* and gain < expected:            lambda += delta
        P_t > P* and gain > 0 and lambda > 0:    lambda -= delta

    Lambda starts at 0 and is never negative. It is counted in whole steps, so that no rounding adds up.

    Args:
        target: share ``P*`` of channels that shall be near zero, in (0, 1).
        epochs: length ``N`` of the run.
        delta: the step; see :func:`scaled_delta`.
        initial_sparsity: ``P_(-1)``, of the network before the first epoch.

    Raises:
        TrainingError: if an argument is out of range.

    Source: arXiv 2005.02634, the main loop of its code.
    """

    def __init__(
        self, target: float, epochs: int, delta: float = DELTA, *, initial_sparsity: float = 0.0
    ) -> None:
        if not 0 < target < 1:
            raise TrainingError(f"the target sparsity must lie between 0 and 1 (exclusive), got {target:g}")
        if epochs < 1 or not 0 < delta < float("inf"):
            raise TrainingError(f"expected epochs >= 1 and delta > 0, got {epochs} and {delta:g}")
        self.target = target
        self.epochs = epochs
        self.delta = delta
        self._previous = initial_sparsity
        self._epoch = 0
        self._steps = 0

    @property
    def strength(self) -> float:
        """The present lambda."""
        return self._steps * self.delta

    def update(self, sparsity: float) -> float:
        """Take the sparsity after an epoch; call it once per epoch, first after epoch 0.

        Returns:
            The lambda of the next epoch.

        Raises:
            TrainingError: if all epochs are over.
        """
        if self._epoch >= self.epochs:
            raise TrainingError(
                f"the controller was made for {self.epochs} epochs, which are over; make a new one"
            )
        gain = sparsity - self._previous
        expected = (self.target - sparsity) / (self.epochs - self._epoch)
        if sparsity < self.target and gain < expected:
            self._steps += 1
        elif sparsity > self.target and gain > 0:
            self._steps = max(0, self._steps - 1)
        self._previous = sparsity
        self._epoch += 1
        return self.strength

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs."""
        return {
            "target": self.target,
            "epochs": self.epochs,
            "delta": self.delta,
            "previous": self._previous,
            "epoch": self._epoch,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave; raise TrainingError if it is of another controller."""
        for name in ("target", "epochs", "delta"):
            if state[name] != getattr(self, name):
                raise TrainingError(
                    f"cannot resume: {name} of the sparsity training differs (checkpoint: {state[name]}, now: "
                    f"{getattr(self, name)}); resume as the run began, or train anew"
                )
        self._previous, self._epoch, self._steps = state["previous"], state["epoch"], state["steps"]


class DependencyAwareRegularizer:
    """The paper's sparsity training, as the training loop's regulariser.

    Each step adds ``lambda * sign(gamma)`` to the gradients of the scored scales; each epoch ends with a look at the
    sparsity and the controller's next lambda.

    Args:
        model: the network, for the sparsity before the first epoch.
        layers: what is scored, from :func:`dscore_plugin.integrations.torch_pruning.links.scored_layers`.
        target: share of the scored channels that shall be near zero.
        epochs: of the training run.
        delta: the step of lambda; None scales the paper's with :func:`scaled_delta`.
        threshold: what counts as near zero, relative to a layer's maximum.
        penalty: another way to press channels towards zero, given the model and lambda.

    Raises:
        TrainingError: if there is nothing to score, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ScoredLayer],
        target: float,
        epochs: int,
        *,
        delta: float | None = None,
        threshold: float = TRAINING_THRESHOLD,
        penalty: Penalty | None = None,
    ) -> None:
        if not layers:
            raise TrainingError(
                f"nothing in {type(model).__name__} can be trained towards sparsity: no batch norm alone feeds the "
                "layers behind it"
            )
        self.layers = tuple(layers)
        self.threshold = threshold
        self.controller = SparsityController(
            target,
            epochs,
            scaled_delta(epochs) if delta is None else delta,
            initial_sparsity=measure_sparsity(model, layers, threshold),
        )
        self._penalty = penalty or self._l1

    def after_backward(self, model: nn.Module) -> None:
        """Add the penalty to the gradients, with the present lambda."""
        if self.controller.strength > 0:
            self._penalty(model, self.controller.strength)

    def end_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Measure the sparsity and let the controller choose the next lambda.

        Returns:
            ``lambda`` of this epoch, ``sparsity`` after it, and the ``target``.
        """
        now = self.controller.strength
        reached = measure_sparsity(model, self.layers, self.threshold)
        self.controller.update(reached)
        return {"lambda": now, "sparsity": reached, "target": self.controller.target}

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs."""
        return {
            "threshold": self.threshold,
            "norms": [layer.norm for layer in self.layers],
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave; raise TrainingError if it is of another run."""
        if state["norms"] != [layer.norm for layer in self.layers] or state["threshold"] != self.threshold:
            raise TrainingError("cannot resume: the sparsity training scored other layers; train anew")
        self.controller.load_state_dict(state["controller"])

    def _l1(self, model: nn.Module, strength: float) -> None:
        for layer in self.layers:
            gamma = _weight(model, layer.norm)
            if gamma.grad is not None:
                gamma.grad.add_(gamma.detach().sign(), alpha=strength)


def _weight(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    assert isinstance(layer.weight, Tensor)
    return filters_first(layer, layer.weight)
