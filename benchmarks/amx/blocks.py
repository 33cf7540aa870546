"""A residual block of two 3x3 convolutions as one function: what lies between them is never written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amx.library import call, call_with_record, laid_out, sizes

_MOST = 128  # channels
_ALIGNED = 16  # positions of a map are a multiple of it


def residual_block(
    x: Tensor, convs: Sequence[nn.Conv2d], norms: Sequence[nn.BatchNorm2d], skip: Tensor | None = None
) -> Tensor:
    """Compute ``relu(norm2(conv2(relu(norm1(conv1(x))))) + skip)`` in bfloat16.

    Args:
        x: shape ``(B, C, H, W)``.
        convs: both; see :func:`fits`.
        norms: both.
        skip: shape of the output; None is ``x`` itself, or what option A makes of it where the first stride is 2: every
            second position, and as many zero channels before as behind.
    """
    return _Block.apply(x, skip, tuple(convs), tuple(norms), *_parameters(convs, norms))


def stem(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Compute ``relu(norm(conv(x)))`` in bfloat16 where ``x`` wants no gradient; see :func:`fits`."""
    return _Stem.apply(x, conv, norm, *_parameters([conv], [norm]))


def _parameters(convs: Sequence[nn.Conv2d], norms: Sequence[nn.BatchNorm2d]) -> list[Tensor]:
    return [p for conv, norm in zip(convs, norms, strict=True) for p in (conv.weight, norm.weight, norm.bias)]


def fits(x: Tensor, convs: Sequence[nn.Conv2d]) -> bool:
    """Whether :func:`residual_block` computes these convolutions of ``x``."""
    strides = [conv.stride for conv in convs]
    return (
        all(
            (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.bias)
            == ((3, 3), (1, 1), (1, 1), 1, None)
            and max(conv.in_channels, conv.out_channels) <= _MOST
            for conv in convs
        )
        and strides[0] in ((1, 1), (2, 2))
        and all(stride == (1, 1) for stride in strides[1:])
        and x.shape[2] % strides[0][0] == x.shape[3] % strides[0][0] == 0
        and x.shape[2] * x.shape[3] // strides[0][0] ** 2 % _ALIGNED == 0
    )


class _Norm(NamedTuple):
    """What a batch norm does with its input, ``z * scale + offset``, and where that comes from; shape ``(C,)`` each."""

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    offset: Tensor


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, skip: Tensor | None, convs: tuple[nn.Conv2d, ...], norms: tuple[nn.BatchNorm2d, ...],
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        x, weights, stride = laid_out(x), [laid_out(conv.weight) for conv in convs], convs[0].stride[0]
        first, norm1 = _forward(x, None, weights[0], convs[0], norms[0])
        second, norm2 = _forward(first, norm1, weights[1], convs[1], norms[1])
        if skip is not None:
            added = laid_out(skip)
        elif stride == 1:
            added = x
        else:
            added = torch.empty_like(second)
            channels = second.shape[1]
            call(
                "pad_skipped",
                x,
                len(x),
                *x.shape[2:],
                x.shape[1],
                channels,
                (channels - x.shape[1]) // 2,
                added,
            )
        y = torch.empty_like(second)
        call("norm_relu", second, added, *sizes(second), norm2.scale, norm2.offset, y)
        ctx.save_for_backward(
            x, first, second, y, *weights, *norm1, *norm2, parameters[1].detach(), parameters[4].detach()
        )
        ctx.stride, ctx.skips = stride, skip is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, first, second, y, weight1, weight2, *rest = ctx.saved_tensors
        norm1, norm2, gamma1, gamma2 = _Norm(*rest[:4]), _Norm(*rest[4:8]), rest[8], rest[9]
        dy = laid_out(dy)
        dskip = torch.empty_like(dy) if ctx.skips or ctx.stride == 2 else None
        sums = torch.empty(2, y.shape[1], dtype=torch.float64)
        call("block_sums", dy, y, second, *sizes(y), norm2.mean, dskip, sums[0], sums[1])
        numbers2, dgamma2, dbeta2 = _back_numbers(sums, sizes(y)[0], norm2, gamma2)
        dfirst, dweight2 = torch.empty_like(first), torch.empty_like(weight2, dtype=torch.float32)
        sums = torch.empty(2, first.shape[1], dtype=torch.float64)
        call_with_record(
            "block_backward", dy=dy, y=y, z=second, **numbers2, x=first, x_scale=norm1.scale, x_offset=norm1.offset,
            x_mean=norm1.mean, weight=weight2, dx=dfirst, dw=dweight2, sum=sums[0], products=sums[1],
            **_shape(first, weight2, 1),
        )  # fmt: skip
        numbers1, dgamma1, dbeta1 = _back_numbers(sums, sizes(first)[0], norm1, gamma1)
        dx, dweight1 = torch.empty_like(x), torch.empty_like(weight1, dtype=torch.float32)
        added: dict[str, Any] = {}
        if not ctx.skips:
            missing = y.shape[1] - x.shape[1]
            added = (
                {"skip_dy": dy, "skip_y": y} if ctx.stride == 1 else {"skip_dy": dskip, "skipped": y.shape[1]}
            )
            added["first_skipped"] = missing // 2
        call_with_record(
            "block_backward", dy=dfirst, z=first, scale=norm1.scale, offset=norm1.offset, **numbers1, x=x,
            weight=weight1, dx=dx, dw=dweight1, **added, **_shape(x, weight1, ctx.stride),
        )  # fmt: skip
        return (
            dx,
            dskip if ctx.skips else None,
            None,
            None,
            dweight1,
            dgamma1,
            dbeta1,
            dweight2,
            dgamma2,
            dbeta2,
        )


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, *parameters: Tensor
    ) -> Tensor:
        x, weight = laid_out(x), laid_out(conv.weight)
        z, found = _forward(x, None, weight, conv, norm)
        y = torch.empty_like(z)
        call("norm_relu", z, None, *sizes(z), found.scale, found.offset, y)
        ctx.save_for_backward(x, z, y, weight, *found, parameters[1].detach())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, z, y, weight, *found, gamma = ctx.saved_tensors
        dy, norm = laid_out(dy), _Norm(*found)
        sums = torch.empty(2, y.shape[1], dtype=torch.float64)
        call("block_sums", dy, y, z, *sizes(y), norm.mean, None, sums[0], sums[1])
        numbers, dgamma, dbeta = _back_numbers(sums, sizes(y)[0], norm, gamma)
        dweight = torch.empty_like(weight, dtype=torch.float32)
        call_with_record(
            "block_backward",
            dy=dy,
            y=y,
            z=z,
            **numbers,
            x=x,
            weight=weight,
            dw=dweight,
            **_shape(x, weight, 1),
        )
        return None, None, None, dweight, dgamma, dbeta


def _forward(
    x: Tensor, before: _Norm | None, weight: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> tuple[Tensor, _Norm]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    stride, channels = conv.stride[0], len(weight)
    y = x.new_empty(len(x), x.shape[2] // stride, x.shape[3] // stride, channels).permute(0, 3, 1, 2)
    sums = torch.empty(2, channels, dtype=torch.float64)
    wanted = {"shift": norm.running_mean, "sum": sums[0], "squares": sums[1]} if norm.training else {}
    read = {"scale": before.scale, "offset": before.offset} if before else {}
    call_with_record("block_forward", x=x, weight=weight, y=y, **read, **wanted, **_shape(x, weight, stride))
    if not norm.training:
        invstd = (norm.running_var + norm.eps).rsqrt()
        scale = norm.weight.detach() * invstd
        return y, _Norm(norm.running_mean, invstd, scale, norm.bias.detach() - norm.running_mean * scale)
    found = _Norm(*torch.empty(4, channels))
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    call(
        "norm_numbers", *sums, norm.running_mean, y.numel() // channels, channels, float(norm.eps),
        float(norm.momentum), norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var, *found,
    )  # fmt: skip
    return y, found


def _back_numbers(
    sums: Tensor, count: int, norm: _Norm, gamma: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Give the numbers a, b and t of ``dz = a * g + b * z + t``, and the gradients of scale and shift."""
    a, b, t, dgamma, dbeta = torch.empty(5, len(gamma))
    call("back_numbers", *sums, norm.mean, norm.invstd, gamma, count, len(gamma), a, b, t, dgamma, dbeta)
    return {"a": a, "b": b, "t": t}, dgamma, dbeta


def _shape(x: Tensor, weight: Tensor, stride: int) -> dict[str, int]:
    return {
        "n": len(x),
        "h": x.shape[2],
        "w": x.shape[3],
        "c": x.shape[1],
        "o": len(weight),
        "stride": stride,
    }
