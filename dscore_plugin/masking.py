"""Silence channels or kernels as their removal would.

:func:`masked` zeroes what the consumers of silenced channels receive, after norm and activation. :class:`Masks` does
the same to the consumers' weights, which costs no multiplications, and goes from one mask to the next in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.errors import PlanError
from dscore_plugin.groups import ChannelGroup, Role

Form = Callable[[nn.Module, Role, Tensor], Callable[[Tensor], Tensor] | None]
Silenced = Iterable[tuple[ChannelGroup, Iterable[int]]]
Kernels = Mapping[str, Tensor]  # convolution -> places o * (in / groups) + c, int64

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORMS: list[Form] = []


def register_form(form: Form) -> None:
    """Teach the masks a kind of layer that computes something over its channels, beside torch's own norms.

    Args:
        form: given a layer, what it is to the channels (``CONSUMER`` or ``NORM``) and a mask of them, 1 for those
            that stay, shape ``(width,)``, it returns a forward that leaves the others out, or None for
            layers of any other kind.
    """
    if form not in _FORMS:
        _FORMS.append(form)


@contextmanager
def masked(model: nn.Module, silenced: Silenced) -> Iterator[None]:
    """Run ``model`` as if the named units had been removed; on exit it is as before, come what may.

    Zeroing a filter is not its removal: the batch norm behind it still emits its shift. What the consumers
    receive is zeroed instead. Norms that average over channels (layer norm, group norm) leave the silenced ones
    out of their statistics, as they would after removal, and so do the layers of :func:`register_form`. Gradients
    pass, so one can train under the mask; through registered forms they reach the layer's inputs, not its weights.

    Args:
        model: the network that the groups were found in.
        silenced: pairs of a group and of its units to silence.
    """
    with ExitStack() as stack:
        for (name, role), mask in _keep_masks(silenced).items():
            _silence(stack, model.get_submodule(name), role, mask)
        yield


class Masks:
    """Switches a network from one mask to the next, in place, for evaluating many of them.

    A silenced channel's weights in its consumers become zero, which gives what :func:`masked` gives, at no cost for
    each image. Where that would not do, the input is zeroed instead: in layers that treat their weight before they
    use it, or that share it with another. A context manager: on exit the network is, bit for bit, as it was.

    Args:
        model: the network; nothing else may change its weights meanwhile.

    Attributes:
        changed: the modules that work otherwise under the present mask.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks = ExitStack()
        self._originals: dict[str, Tensor] = {}
        self._zeroed: set[str] = set()
        self.changed: tuple[nn.Module, ...] = ()
        self._uses = Counter(id(m.weight) for m in model.modules() if isinstance(_weight(m), nn.Parameter))

    def __enter__(self) -> Masks:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def silence(self, channels: Silenced = (), kernels: Kernels | None = None) -> None:
        """Silence these channels and kernels, and no others.

        Args:
            channels: pairs of a group and of its units.
            kernels: for each convolution, by name, the places of its kernels.

        Raises:
            PlanError: if kernels are named of what is no convolution, or that it does not have.
        """
        self.clear()
        changed = []
        for (name, role), mask in _keep_masks(channels).items():
            module = self._model.get_submodule(name)
            if role is Role.CONSUMER and self._has_weight_of_its_own(module):
                self._multiply(name, module, _over_inputs(module, mask))
                changed.append(module)
            elif _silence(self._hooks, module, role, mask):
                changed.append(module)
        for name, places in (kernels or {}).items():
            module = self._model.get_submodule(name)
            self._multiply(name, module, _over_kernels(name, module, places))
            changed.append(module)
        self.changed = tuple(changed)

    def clear(self) -> None:
        """Silence nothing."""
        self._hooks.close()
        with torch.no_grad():
            for name in self._zeroed:
                _weight(self._model.get_submodule(name)).copy_(self._originals[name])
        self._zeroed.clear()
        self.changed = ()

    def _has_weight_of_its_own(self, module: nn.Module) -> bool:
        return (
            type(module) in (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear) and self._uses[id(module.weight)] == 1
        )

    @torch.no_grad()
    def _multiply(self, name: str, module: nn.Module, mask: Tensor) -> None:
        weight = _weight(module)
        if name not in self._originals:
            self._originals[name] = weight.detach().clone()
        self._zeroed.add(name)
        weight.mul_(mask.to(weight))


def _weight(module: nn.Module) -> Any:
    return getattr(module, "weight", None)


def _over_inputs(module: nn.Module, mask: Tensor) -> Tensor:
    """Shape a mask of the input channels, ``(in,)``, so that it multiplies the weight of a layer."""
    if isinstance(module, nn.Linear):
        return mask
    ones = [1] * (_weight(module).ndim - 2)
    if isinstance(module, _TRANSPOSED):
        return mask.view(-1, 1, *ones)
    assert isinstance(module, _CONVOLUTIONS)
    of_each_filter = mask.view(module.groups, -1).repeat_interleave(
        module.out_channels // module.groups, dim=0
    )
    return of_each_filter.view(*of_each_filter.shape, *ones)


def _over_kernels(name: str, module: nn.Module, places: Tensor) -> Tensor:
    """Write places of kernels as a mask that multiplies the weight of a convolution."""
    if not isinstance(module, _CONVOLUTIONS):
        raise PlanError(f"{name!r} is a {type(module).__name__}; kernels leave convolutions only")
    shape = module.weight.shape
    mask = torch.ones(shape[0] * shape[1])
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(mask):
        raise PlanError(
            f"{name!r} has kernels 0..{len(mask) - 1}; got {int(places.min())}..{int(places.max())}"
        )
    mask[places] = 0
    return mask.view(*shape[:2], *[1] * (len(shape) - 2))


def _silence(stack: ExitStack, module: nn.Module, role: Role, mask: Tensor) -> bool:
    """Hook a mask onto a consumer or a norm until ``stack`` closes; False where the module works as before."""
    mask = mask.to(next((p.device for p in module.parameters()), torch.device("cpu")))
    any_left = bool(mask.any())
    forms = (form(module, role, mask) for form in _FORMS if any_left)
    own = next((forward for forward in forms if forward is not None), None)
    if own is not None:
        _replace_forward(stack, module, own)
    elif role is Role.CONSUMER:
        stack.callback(module.register_forward_pre_hook(_silence_input(mask)).remove)
    elif not any_left:
        return False  # statistics of nothing, for nobody
    elif isinstance(module, nn.LayerNorm):
        _replace_forward(stack, module, lambda x: _masked_layer_norm(module, x, mask.to(x.dtype)))
    elif isinstance(module, nn.GroupNorm):
        _replace_forward(stack, module, lambda x: _masked_group_norm(module, x, mask.to(x.dtype)))
    else:
        return False
    return True


def _keep_masks(silenced: Silenced) -> dict[tuple[str, Role], Tensor]:
    """Return, for each consumer and norm that a unit reaches, 1 for the channels that stay and 0 for the others."""
    keep: dict[tuple[str, Role], Tensor] = {}
    for group, units in silenced:
        gone = torch.as_tensor(list(units), dtype=torch.int64)
        for member in group.roles(Role.CONSUMER, Role.NORM):
            mask = keep.setdefault((member.module, member.role), torch.ones(member.width))
            mask[member.positions(gone)] = 0
    return keep


def _silence_input(mask: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def silence(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        return (x * _along_channels(mask.to(x.dtype), x, module), *rest)

    return silence


def _along_channels(mask: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    """Shape a mask so that it multiplies the channels of ``x``: the last dimension for linear layers, else dim 1."""
    return mask if isinstance(module, nn.Linear) else mask.view(-1, *[1] * (x.ndim - 2))


def _replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    stack.callback(_restore_forward, module, module.__dict__.get("forward"))
    module.forward = forward


def _restore_forward(module: nn.Module, own: Any) -> None:
    del module.__dict__["forward"]
    if own is not None:  # some other tool has wrapped the module
        module.__dict__["forward"] = own


def _masked_layer_norm(module: nn.LayerNorm, x: Tensor, mask: Tensor) -> Tensor:
    # timm's and torchvision's LayerNorm2d normalise over dim 1, which may be as long as the last one
    channels_first = x.shape[-1] != len(mask) or (x.ndim == 4 and "2d" in type(module).__name__)
    rows = x.movedim(1, -1) if channels_first else x
    normal = _normalise(rows, mask, mask.sum(), module.eps, dim=-1)
    out = normal if module.weight is None else normal * module.weight
    out = out if module.bias is None else out + module.bias
    return out.movedim(-1, 1) if channels_first else out


def _masked_group_norm(module: nn.GroupNorm, x: Tensor, mask: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    grouped = x.reshape(len(x), module.num_groups, -1)
    mask = mask.view(shape).expand_as(x[:1]).reshape(1, module.num_groups, -1)
    normal = _normalise(grouped, mask, mask.sum(-1, keepdim=True), module.eps, dim=-1).reshape(x.shape)
    out = normal if module.weight is None else normal * module.weight.view(shape)
    return out if module.bias is None else out + module.bias.view(shape)


def _normalise(x: Tensor, mask: Tensor, count: Tensor, eps: float, dim: int) -> Tensor:
    mean = (x * mask).sum(dim, keepdim=True) / count
    variance = ((x - mean).square() * mask).sum(dim, keepdim=True) / count
    return (x - mean) * torch.rsqrt(variance + eps)
