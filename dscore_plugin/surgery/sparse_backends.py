"""Ways to run a 2-d convolution that has lost kernels.

``native`` and ``csr`` share one layout: the padded input as a row of numbers for each channel, in which a tap of the
kernel is a shift. No unfolded input is written, nine times as large as the input itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.surgery.kernel_masks import dense_class
from dscore_plugin.surgery.native import REACH, WIDTH, has_compiler, native_product

DENSE = "dense"
BACKENDS = (DENSE, "gathered", "csr", "native")
_NARROW = 16  # maps narrower than this are laid out image by image within each pixel, to fill vectors


@dataclass(frozen=True)
class Layout:
    """How the input lies in memory for one input shape.

    Phases are the input's pixels by their place modulo the stride, so that a tap is a shift for any stride.

    Attributes:
        images: of the batch.
        size: of the input maps, ``(H, W)``.
        out: of the output maps, ``(H', W')``.
        plane: of a padded map of one phase.
        inner: images that lie side by side at each pixel; ``images`` or 1.
        channels: of the input.
        offsets: shift of each tap.
        positions: columns of the product that are needed.
    """

    images: int
    size: tuple[int, int]
    out: tuple[int, int]
    plane: tuple[int, int]
    inner: int
    channels: int
    offsets: tuple[int, ...]
    positions: int

    @property
    def stride(self) -> int:
        """Numbers from one channel to the next."""
        return self.images * self.plane[0] * self.plane[1]


class SparseConv2d(nn.Module):
    """A convolution whose removed kernels take no part in the computation; for inference.

    Under autocast it computes in its own type. What its backend is not made for runs dense: a single image without a
    batch, and everything after the layer has been moved to another type or device.

    Args:
        convolution: the layer; its zero kernels are left out.
        backend: one of :data:`BACKENDS` but ``"dense"``.

    Attributes:
        backend: how it runs.
    """

    mask: Tensor
    first: Tensor
    inputs: Tensor
    kernels: Tensor
    bias: Tensor | None

    def __init__(self, convolution: nn.Conv2d, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.geometry = (
            _pair(convolution.kernel_size),
            _pair(convolution.stride),
            _pair(convolution.padding),
            _pair(convolution.dilation),
        )
        self.groups = convolution.groups
        weight = convolution.weight.detach()
        mask = live_kernels(convolution)
        outputs, places = mask.nonzero(as_tuple=True)
        group = outputs // (len(mask) // convolution.groups)
        inputs = group * mask.shape[1] + places
        first = functional.pad(mask.sum(dim=1).cumsum(0), (1, 0))
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("first", first.to(torch.int32), persistent=False)
        self.register_buffer("inputs", inputs.to(torch.int32), persistent=False)
        self.register_buffer("kernels", weight[mask].flatten(1).contiguous(), persistent=False)
        bias = None if convolution.bias is None else convolution.bias.detach().clone()
        self.register_buffer("bias", bias, persistent=False)
        self._prepare(convolution, mask)
        self._home = self._place(self.kernels)
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._free: dict[Layout, list[Tensor]] = {}

    def _prepare(self, convolution: nn.Conv2d, mask: Tensor) -> None:
        if self.backend == "gathered":
            ins, outs = mask.any(dim=0).nonzero().flatten(), mask.any(dim=1).nonzero().flatten()
            self.register_buffer("live_inputs", ins, persistent=False)
            self.register_buffer("live_outputs", outs, persistent=False)
            weight = convolution.weight.detach()[outs][:, ins].contiguous()
            self.register_buffer("gathered", weight, persistent=False)
        if self.backend == "csr":
            self._write_matrices()

    def _write_matrices(self) -> None:
        self.matrices = [self._matrix(tap) for tap in range(self.kernels.shape[1])]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseConv2d:
        super()._apply(fn, recurse)
        if self.backend == "csr" and self._place(self.kernels) == self._home:
            self._write_matrices()  # from kernels that may have lost digits on the way
        return self

    def _matrix(self, tap: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its sparse tensors a beta
            return torch.sparse_csr_tensor(
                self.first.long(), self.inputs.long(), self.kernels[:, tap].contiguous(),
                (self.out_channels, self.in_channels), check_invariants=False,
            )  # fmt: skip

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in, H, W)`` to ``(B, out, H', W')``, contiguous, without a gradient."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.to(self.kernels.dtype))
        if not self._is_home(x):
            return self._dense(x)
        return self._gathered(x) if self.backend == "gathered" else self._rowwise(x)

    def _is_home(self, x: Tensor) -> bool:
        """Whether the backend can take an input; the C code looks at no type, device or size itself."""
        fits = x.ndim == 4 and x.shape[1] == self.in_channels and x.numel() > 0
        is_unmoved = self._place(x) == self._place(self.kernels) == self._home
        return fits and is_unmoved and min(self._layout(x).out) > 0

    @staticmethod
    def _place(x: Tensor) -> tuple[torch.dtype, torch.device]:
        return x.dtype, x.device

    def _dense(self, x: Tensor) -> Tensor:
        """Convolve as torch does; what does not fit raises torch's own errors."""
        kernel, stride, padding, dilation = self.geometry
        weight = self.kernels.new_zeros(*self.mask.shape, *kernel)
        weight[self.mask] = self.kernels.view(-1, *kernel)
        y = functional.conv2d(x, weight, self.bias, stride, padding, dilation, self.groups)
        return y.contiguous()

    def _rowwise(self, x: Tensor) -> Tensor:
        layout = self._layout(x)
        rows = self._padded(x, layout)
        columns = -(-layout.stride // WIDTH) * WIDTH
        y = x.new_empty(self.out_channels, columns)
        (self._native if self.backend == "native" else self._csr)(rows, layout, y)
        self._free.setdefault(layout, []).append(rows)
        return self._image(y[:, : layout.stride], layout)

    def _gathered(self, x: Tensor) -> Tensor:
        _, stride, padding, dilation = self.geometry
        live = functional.conv2d(
            x.index_select(1, self.live_inputs),  # type: ignore[arg-type]
            self.gathered, None, stride, padding, dilation,  # type: ignore[arg-type]
        )  # fmt: skip
        y = x.new_zeros(len(x), self.out_channels, *live.shape[2:])
        y.index_copy_(1, self.live_outputs, live)  # type: ignore[arg-type]
        return y if self.bias is None else y.add_(self.bias.view(-1, 1, 1))

    def _native(self, rows: Tensor, layout: Layout, y: Tensor) -> None:
        offsets = torch.tensor(layout.offsets)
        native_product(
            rows,
            layout.stride,
            self.first,
            self.inputs,
            self.kernels,
            offsets,
            self.bias,
            y,
            layout.positions,
        )

    def _csr(self, rows: Tensor, layout: Layout, y: Tensor) -> None:
        y = y[:, : layout.positions]
        y.zero_() if self.bias is None else y.copy_(self.bias.view(-1, 1).expand_as(y))
        for matrix, offset in zip(self.matrices, layout.offsets, strict=True):
            shifted = rows.as_strided((self.in_channels, layout.positions), (layout.stride, 1), offset)
            torch.addmm(y, matrix, shifted, out=y)

    def _layout(self, x: Tensor) -> Layout:
        key = tuple(x.shape)
        if key not in self._layouts:
            self._layouts[key] = _layout(key, *self.geometry)
        return self._layouts[key]

    def _padded(self, x: Tensor, layout: Layout) -> Tensor:
        """Copy the input into rows with zeros around every map; a used row is taken again, its borders still zero."""
        free = self._free.get(layout)
        (down, right), (up, left) = self.geometry[1], self.geometry[2]
        phases = down * right
        if free:
            rows = free.pop()
        else:
            with torch.inference_mode(False):  # what is made inside that mode cannot be written outside of it
                rows = x.new_zeros(phases * layout.channels * layout.stride + max(layout.offsets) + REACH)
        maps = rows[: phases * layout.channels * layout.stride]
        for dy in range(down):
            for dx in range(right):
                part = maps.view(phases, -1)[dy * right + dx]
                pixels, at = _phase(x, (dy, dx), (down, right), (up, left))
                target = _as_maps(part, layout, layout.channels)
                target[:, :, at[0] : at[0] + pixels.shape[2], at[1] : at[1] + pixels.shape[3]].copy_(pixels)
        return rows

    def _image(self, y: Tensor, layout: Layout) -> Tensor:
        return _as_maps(y, layout, self.out_channels)[:, :, : layout.out[0], : layout.out[1]].contiguous()

    def extra_repr(self) -> str:
        """Say what is computed, and how."""
        every = self.in_channels * self.out_channels
        return (
            f"{self.in_channels}, {self.out_channels}, kernels={len(self.kernels)} of {every}, {self.backend}"
        )


def live_kernels(convolution: nn.Conv2d) -> Tensor:
    """Return which kernels of a convolution are not zero: bool, shape ``(out, in / groups)``."""
    return convolution.weight.detach().flatten(2).ne(0).any(dim=2)


def usable_backends(convolution: nn.Conv2d) -> tuple[str, ...]:
    """Return the backends that can run a convolution, ``"dense"`` first."""
    mask = live_kernels(convolution)
    simple = dense_class(convolution) is nn.Conv2d  # a subclass may do anything in its forward()
    simple &= convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    if not simple or bool(mask.all()) or not mask.any() or convolution.weight.dtype != torch.float32:
        return (DENSE,)
    has_dead = not (mask.any(dim=0).all() and mask.any(dim=1).all())
    usable = [DENSE, *(["gathered"] if convolution.groups == 1 and has_dead else []), "csr"]
    on_cpu = convolution.weight.device.type == "cpu"
    return tuple([*usable, "native"] if on_cpu and has_compiler() else usable)


def _layout(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Layout:
    images, channels, *size = shape
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    full = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    out = [(n - r - 1) // s + 1 for n, r, s in zip(full, reach, stride, strict=True)]
    # With stride 1 a map's left border serves as the right border of the row before it, and so do top and bottom.
    plane = [n - p if s == 1 else -(-n // s) for n, p, s in zip(full, padding, stride, strict=True)]
    plane[1] = max(plane[1], out[1])
    plane[0] = max(plane[0], out[0])
    inner = images if images > 1 and size[1] < _NARROW else 1
    per_channel = images * plane[0] * plane[1]
    offsets = []
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            (down, dy), (right, dx) = divmod(y * dilation[0], stride[0]), divmod(x * dilation[1], stride[1])
            phase = dy * stride[1] + dx
            offsets.append(phase * channels * per_channel + (down * plane[1] + right) * inner)
    within = (out[0] - 1) * plane[1] + out[1]
    positions = within * inner if inner > 1 else (images - 1) * plane[0] * plane[1] + within
    return Layout(
        images,
        (size[0], size[1]),
        (out[0], out[1]),
        (plane[0], plane[1]),
        inner,
        channels,
        tuple(offsets),
        positions,
    )


def _as_maps(rows: Tensor, layout: Layout, channels: int) -> Tensor:
    """View rows, one for each channel, as ``(B, channels, plane)``."""
    if layout.inner > 1:
        return rows.view(channels, *layout.plane, layout.images).permute(3, 0, 1, 2)
    return rows.view(channels, layout.images, *layout.plane).transpose(0, 1)


def _phase(
    x: Tensor, phase: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Return the pixels whose padded place is ``phase`` modulo the stride, and where the first goes."""
    starts = [(p - q) % s for p, q, s in zip(phase, padding, stride, strict=True)]
    at = [(first + q) // s for first, q, s in zip(starts, padding, stride, strict=True)]
    return x[:, :, starts[0] :: stride[0], starts[1] :: stride[1]], (at[0], at[1])


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, tuple) else (int(value), int(value))
