"""Training in which every connection has a strength of its own: unit kernels times a free factor, gamma folded away.

Behind a batch norm ``gamma x + beta`` and a positively homogeneous function f, ``f(a x) = a f(x)`` for ``a >= 0``,

    W[o, c] * f(gamma_c x_c + beta_c)  =  s[o, c] v[o, c] * f(sign(gamma_c) x_c + beta_c / |gamma_c|)

with ``s[o, c] = |gamma_c| ||W[o, c]||`` and the unit kernel ``v[o, c] = W[o, c] / ||W[o, c]||``. The strengths s are
trained under an L1 penalty, beta / |gamma| is the norm's new shift, and sign(gamma) stays as a buffer.

Source: *Synaptic Strength For Convolutional Neural Network*, arXiv 1811.02454, sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from dscore_plugin.arguments import as_arguments
from dscore_plugin.criteria.synaptic_strength import LAMBDAS
from dscore_plugin.errors import BudgetError, TrainingError
from dscore_plugin.loading import load_object
from dscore_plugin.modes import in_eval_mode
from dscore_plugin.rollback import rolled_back_on_error
from dscore_plugin.training.config import TrainingConfig

GAMMA_THRESHOLD = 1e-4
NEAR_ZERO = 0.01  # of the largest strength: what counts as near zero in the history
_TOLERANCE = 1e-4
_TRAINED = "weight_was_trained"  # what a norm remembers of a scale that is folded away
_LINKS = "dscore_plugin.integrations.torch_pruning.synaptic:find_links"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOMOGENEOUS = (
    "Relu", "LeakyRelu", "PReLU", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "MkldnnAdaptiveAvgPool",
    "Mean", "ConstantPadNd", "ReflectionPad", "ReplicationPad", "Upsample", "Slice", "IndexSelect", "Clone", "Alias",
    "ToCopy", "NativeDropout", "FeatureDropout",
)  # fmt: skip


@dataclass(frozen=True)
class NormLink:
    """A batch norm whose output is read by convolutions alone.

    Attributes:
        norm: qualified name of the batch norm.
        convolutions: qualified names of its readers.
        between: what its output passes through on the way, as autograd names it: ``("Relu",)``.
    """

    norm: str
    convolutions: tuple[str, ...]
    between: tuple[str, ...] = ()


@dataclass(frozen=True)
class SynapticGoal:
    """What a training with synaptic strengths shall end with.

    Attributes:
        ratio: share of the kernels to remove, in (0, 1).
        training: of the sparse phase.
        strength: lambda, the weight of the penalty.
        sweep: other ratios, whose accuracy on the validation images is reported before the retraining.
        skip_first: leave the first convolution whole.
        method: the criterion.
    """

    ratio: float
    training: TrainingConfig
    strength: float = LAMBDAS["resnet18"]
    sweep: tuple[float, ...] = ()
    skip_first: bool = True
    method: str = "synaptic_strength"

    def check(self) -> None:
        """Refuse what can be refused without a model; raise a DScoreError."""
        wrong = next((ratio for ratio in (self.ratio, *self.sweep) if not 0 < ratio < 1), None)
        if wrong is not None:
            raise BudgetError(f"ratio must lie between 0 and 1 (exclusive), got {wrong:g}")
        if not 0 <= self.strength < float("inf"):
            raise TrainingError(f"lambda must be a number >= 0, got {self.strength:g}")


def synaptic_schedule(
    epochs: int = 240, retraining: int = 50, **options: Any
) -> tuple[TrainingConfig, TrainingConfig]:
    """Return the paper's two phases on CIFAR-10: the sparse training and the retraining.

    Stochastic gradient descent with momentum 0.9, weight decay 1e-4 and batches of 128, from a learning rate of 0.1
    that falls to a tenth after one half and after three quarters. The paper does not state the learning rate of the
    retraining; ours starts at a tenth of the first, and falls in the same way.

    Args:
        epochs: of the sparse training.
        retraining: epochs of the retraining.
        **options: other fields of both, such as ``seed`` or ``precision``.

    Raises:
        TrainingError: if an option is out of range.

    Source: arXiv 1811.02454, sec. 4.
    """
    common = {"learning_rate": 0.1, "weight_decay": 1e-4, "batch_size": 128, **options}
    later = {**common, "learning_rate": common["learning_rate"] / 10}
    return _in_steps(epochs, common), _in_steps(retraining, later)


def _in_steps(epochs: int, options: dict[str, Any]) -> TrainingConfig:
    milestones = tuple(sorted({epochs // 2, epochs * 3 // 4} - {0}))
    steps = {"schedule": "steps", "milestones": milestones} if milestones else {"schedule": "constant"}
    return TrainingConfig(epochs, **{**options, **steps})


class SynapticKernels(nn.Module):
    """The parametrisation of a convolution's weight: a strength for each kernel, and its direction.

    ``original0`` of the parametrised weight is the strength, ``(out, in / groups)``; ``original1`` the direction, of
    the weight's shape and any length.
    """

    def forward(self, strength: Tensor, direction: Tensor) -> Tensor:
        """Return the weight: each kernel has the magnitude of its strength."""
        factor = strength / _lengths(direction).clamp(min=torch.finfo(direction.dtype).tiny)
        return direction * factor.view(*factor.shape, *[1] * (direction.ndim - 2))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Split a weight into strengths, at least 0, and unit kernels; a kernel of zeros gets an even direction."""
        lengths = _lengths(weight).view(*weight.shape[:2], *[1] * (weight.ndim - 2))
        even = torch.full_like(weight, weight[0, 0].numel() ** -0.5)
        return lengths.flatten(1).clone(), torch.where(lengths > 0, weight / lengths, even)


def to_synaptic(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    links: Sequence[NormLink] | None = None,
    skip_first: bool = True,
    gamma_threshold: float = GAMMA_THRESHOLD,
) -> nn.Module:
    """Write a network's convolutions as strengths times unit kernels, in place; its outputs stay as they are.

    Gamma is folded away where a batch norm feeds convolutions alone. Elsewhere (a residual sum, a classifier) the norm
    stays as it is, and gamma counts as 1. Depthwise and frozen convolutions are not split.

    Readings: a channel with ``|gamma|`` below the threshold is made constant, ``f(beta)``: its sign becomes 0, and
    beta and its kernels stay as they are, because beta / gamma would explode.

    Args:
        model: the network, without parametrised weights and kernel masks.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).
        links: which batch norm feeds which convolutions; None finds them with Torch-Pruning.
        skip_first: leave the first convolution as it is.
        gamma_threshold: see above; raise it only for networks whose small gammas do not matter.

    Returns:
        ``model``, with its mode; :func:`from_synaptic` turns it back.

    Raises:
        TrainingError: if a function in front of a convolution is not positively homogeneous, a convolution is
            parametrised or masked, nothing can be split, or the outputs would change by more than 1e-4 of their
            largest magnitude; the network is then as it was.
        ModelError: if the model cannot be traced.

    Source: arXiv 1811.02454, eq. 3 to 6.
    """
    _refuse_unusual(model)
    inputs = as_arguments(example_inputs)
    found = load_object(_LINKS)(model, inputs) if links is None else links
    _refuse_inhomogeneous(found)
    split = _splittable(model, inputs, skip_first)
    with rolled_back_on_error(model), _outputs_kept(model, inputs):
        for link in found:
            _fold_gamma(model, link, gamma_threshold)
    for module in split:
        parametrize.register_parametrization(module, "weight", SynapticKernels())
    return model


def from_synaptic(model: nn.Module) -> nn.Module:
    """Turn strengths and directions into plain weights again, in place; the outputs stay as they are.

    Gamma is +1 or -1 behind the fold, and 0 for the channels that were made constant: there gamma times the kernel's
    norm no longer is the strength. Take :func:`strengths` before, to prune by what was trained.

    Args:
        model: a network that :func:`to_synaptic` has written.

    Returns:
        ``model``.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and "weight" in module._buffers:
            sign = module._buffers.pop("weight")
            assert sign is not None
            module.register_parameter(
                "weight", nn.Parameter(sign.clone(), module.__dict__.pop(_TRAINED, True))
            )
    for _, module in list(_synaptic(model)):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        plain: Any = module
        plain.weight = nn.Parameter(plain.weight.detach())
    return model


def strengths(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained strengths, with their signs, by convolution: shape ``(out, in / groups)``."""
    return {name: _originals(module)[0] for name, module in _synaptic(model)}


class SynapticRegularizer:
    """The paper's penalty, ``lambda * sum |s|``, as the training loop's regulariser.

    It also takes the optimiser's weight decay back from strengths and directions (the paper is silent; decay would act
    on a direction's length alone, and on a strength as a second penalty).

    Args:
        model: in the form of :func:`to_synaptic`.
        strength: lambda, at least 0; the paper's are :data:`dscore_plugin.criteria.synaptic_strength.LAMBDAS`.
        weight_decay: of the optimiser.

    Raises:
        TrainingError: if the model has no strengths, or a number is out of range.

    Source: arXiv 1811.02454, eq. 7.
    """

    def __init__(self, model: nn.Module, strength: float, weight_decay: float = 0.0) -> None:
        self._layers = [name for name, _ in _synaptic(model)]
        if not self._layers:
            raise TrainingError(
                "the network has no strengths to penalise; convert it with to_synaptic() first"
            )
        if not 0 <= strength < float("inf") or not 0 <= weight_decay < float("inf"):
            raise TrainingError(
                f"expected lambda and weight decay to be numbers >= 0, got {strength:g} and {weight_decay:g}"
            )
        self.strength, self.weight_decay = strength, weight_decay

    @torch.no_grad()
    def after_backward(self, model: nn.Module) -> None:
        """Add the penalty's sub-gradient, ``lambda sign(s)``, and take back the weight decay."""
        for _, module in _synaptic(model):
            strength, direction = _originals(module)
            for parameter in (strength, direction):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter, alpha=-self.weight_decay)
            if strength.grad is not None:
                strength.grad.add_(strength.sign(), alpha=self.strength)

    @torch.no_grad()
    def end_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Look at the strengths.

        Returns:
            ``lambda``; ``l1``, the sum of all magnitudes; ``sparsity``, the share of strengths within 1 % of the
            network's largest.
        """
        every = torch.cat([strength.abs().flatten() for strength in strengths(model).values()])
        near = float((every <= NEAR_ZERO * every.max()).float().mean())
        return {"lambda": self.strength, "l1": float(every.sum()), "sparsity": near}

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs."""
        return {"lambda": self.strength, "weight_decay": self.weight_decay, "layers": self._layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave; raise TrainingError if it is of another run."""
        if state != self.state_dict():
            raise TrainingError(
                "cannot resume: lambda, weight decay or the layers of the sparsity training differ; resume as the run "
                "began, or train anew"
            )


def _synaptic(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        listed: Any = getattr(module, "parametrizations", {})
        if "weight" in listed and isinstance(listed["weight"][0], SynapticKernels):
            yield name, module


def _originals(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    listed: Any = module.parametrizations
    return listed["weight"].original0, listed["weight"].original1


def _lengths(kernels: Tensor) -> Tensor:
    """Return the Frobenius norm of each kernel: shape ``(out, in / groups)``."""
    return kernels.flatten(2).norm(dim=2)


def _refuse_unusual(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise TrainingError(
                f"{name!r} has a parametrised weight; expected plain ones: call from_synaptic(), or remove it"
            )
        if "kernel_mask" in module._buffers:
            raise TrainingError(
                f"{name!r} has lost kernels; convert the network before its kernels are removed"
            )


def _refuse_inhomogeneous(links: Sequence[NormLink]) -> None:
    for link in links:
        wrong = next((label for label in link.between if not label.startswith(_HOMOGENEOUS)), None)
        if wrong is not None:
            raise TrainingError(
                f"{wrong} stands between {link.norm!r} and {link.convolutions[0]!r}; gamma passes only functions with "
                "f(a x) = a f(x) for a > 0, such as ReLU, leaky ReLU and pooling: use one of them"
            )


def _splittable(model: nn.Module, example_inputs: tuple[Any, ...], skip_first: bool) -> list[nn.Module]:
    called: list[Any] = _called_convolutions(model, example_inputs)
    split: list[nn.Module] = [
        module
        for module in called[1 if skip_first else 0 :]
        if module.weight.requires_grad and module.weight.shape[1] > 1
    ]
    if not split:
        raise TrainingError(
            f"nothing in {type(model).__name__} has a strength to train; expected convolutions behind the first"
        )
    return split


def _called_convolutions(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[nn.Module]:
    called: dict[nn.Module, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, _: called.setdefault(module))
        for module in model.modules()
        if isinstance(module, _CONVOLUTIONS)
    ]
    try:
        _outputs(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


def _fold_gamma(model: nn.Module, link: NormLink, threshold: float) -> None:
    norm: Any = model.get_submodule(link.norm)
    gamma = norm.weight.detach()
    kept = gamma.abs() >= threshold
    scale = torch.where(kept, gamma.abs(), 1.0)
    sign = torch.where(kept, gamma.sign(), 0.0)
    setattr(norm, _TRAINED, norm.weight.requires_grad)
    del norm.weight
    norm.register_buffer("weight", sign)
    norm.bias = nn.Parameter(norm.bias.detach() / scale, norm.bias.requires_grad)
    for name in link.convolutions:
        convolution: Any = model.get_submodule(name)
        weight = convolution.weight.detach()
        spread = scale.view(convolution.groups, -1).repeat_interleave(
            len(weight) // convolution.groups, dim=0
        )
        folded = weight * spread.view(*spread.shape, *[1] * (weight.ndim - 2))
        convolution.weight = nn.Parameter(folded, convolution.weight.requires_grad)


@contextmanager
def _outputs_kept(model: nn.Module, example_inputs: tuple[Any, ...]) -> Iterator[None]:
    """Refuse what happens in the block if it changes the network's outputs on random inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        torch.randn(x.shape, generator=generator).to(x)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in example_inputs
    )
    before = _outputs(model, inputs)
    yield
    after = _outputs(model, inputs)
    change, largest = float((after - before).abs().max()), float(before.abs().max())
    if not change <= _TOLERANCE * max(largest, 1e-6):
        raise TrainingError(
            f"folding gamma away would change the outputs by {change:.2g} (largest: {largest:.2g}); lower "
            "gamma_threshold, or keep what stands between norms and convolutions to ReLU and pooling"
        )


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with in_eval_mode(model):
        output = model(*inputs)
    if not isinstance(output, Tensor):
        raise TrainingError(f"expected a network that returns one tensor, got {type(output).__name__}")
    return output
