"""A convolution, its batch norm, and the ReLU behind them as one function, whatever the convolution; max-pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amx.library import call, laid_out, sizes

_SMALL = 64  # positions of a map up to which the convolutions here are faster than oneDNN's
_WIDE = 32  # channels and outputs from which the weight gradient here is faster


def conv_norm_relu(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, skip: Tensor | None = None) -> Tensor:
    """Compute ``relu(norm(conv(x)) + skip)`` in bfloat16; ``x`` and ``skip`` of shape ``(B, C, H, W)``."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return _ConvNormReLU.apply(x, conv.weight, norm.weight, norm.bias, skip, conv, norm)


def max_pool(x: Tensor) -> Tensor:
    """Take the larger of each 2 x 2 positions of ``x``, of shape ``(B, C, H, W)`` with even H and W, behind a ReLU."""
    return _MaxPool.apply(x)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x = laid_out(x)
        y = torch.empty_like(x[:, :, ::2, ::2], memory_format=torch.channels_last)
        call("pool", x, *_shape(x), y)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        x, y = ctx.saved_tensors
        dx = torch.empty_like(x)
        call("pool_back", laid_out(dy), x, y, *_shape(x), dx)
        return dx


class _ConvNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, skip: Tensor | None,
        conv: nn.Conv2d, norm: nn.BatchNorm2d,
    ) -> Tensor:  # fmt: skip
        x, weight = laid_out(x), laid_out(weight)
        skip = None if skip is None else laid_out(skip)
        convolved = _convolve(x, weight, conv)
        mean, invstd = _statistics(convolved, norm)
        y = torch.empty_like(convolved)
        scale = gamma * invstd
        offset = beta - mean * scale
        call("norm_relu", convolved, skip, *sizes(convolved), scale, offset, y)
        ctx.save_for_backward(x, weight, gamma, convolved, y, mean, invstd)
        ctx.conv, ctx.skips = conv, skip is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, gamma, convolved, y, mean, invstd = ctx.saved_tensors
        dy = laid_out(dy)
        dskip = torch.empty_like(dy) if ctx.skips else None
        dgamma, dbeta, dconvolved = torch.empty_like(gamma), torch.empty_like(gamma), torch.empty_like(dy)
        call(
            "norm_relu_back", dy, y, convolved, *sizes(dy), mean, invstd, gamma.detach(), dskip, dconvolved,
            dgamma, dbeta,
        )  # fmt: skip
        dx, dweight = _convolve_back(dconvolved, x, weight, ctx.conv, ctx.needs_input_grad[0])
        return dx, dweight, dgamma, dbeta, dskip, None, None


def _statistics(x: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation, and follow the running ones if the layer is training."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if not norm.training:
        return norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    mean, variance = torch.empty_like(norm.running_mean), torch.empty_like(norm.running_var)
    count, channels = sizes(x)
    call("moments", x, count, channels, norm.running_mean, mean, variance)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum  # type: ignore[arg-type]
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
    return mean, (variance + norm.eps).rsqrt()


def _convolve(x: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
    if _is_plain(conv) and x.shape[2] * x.shape[3] <= _SMALL:
        y = x.new_empty(len(x), len(weight), *x.shape[2:]).to(memory_format=torch.channels_last)
        call("conv", x, weight, y, *_shape(x), len(weight))
        return y
    return laid_out(torch.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups))


def _convolve_back(
    dy: Tensor, x: Tensor, weight: Tensor, conv: nn.Conv2d, wants_dx: bool
) -> tuple[Tensor | None, Tensor]:
    dx = dweight = None
    if _is_plain(conv) and wants_dx and x.shape[2] * x.shape[3] <= _SMALL:
        dx = torch.empty_like(x)
        call("conv_dx", dy, weight, dx, *_shape(x), len(weight))
    if _is_plain(conv) and min(x.shape[1], len(weight)) >= _WIDE:
        dweight = torch.empty_like(weight, dtype=torch.float32)
        call("conv_dw", x, dy, dweight, *_shape(x), len(weight))
    mask = [wants_dx and dx is None, dweight is None, False]
    if any(mask):
        found = torch.ops.aten.convolution_backward(
            dy, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, mask
        )
        dx = found[0] if mask[0] else dx
        dweight = found[1].float() if mask[1] else dweight
    assert dweight is not None
    return dx, dweight


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether the kernels compute this convolution: 3 x 3, one position further at each step, one group."""
    numbers = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return numbers == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3], x.shape[1]
