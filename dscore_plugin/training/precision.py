"""Which device a training run computes on, and which number format and memory layout it uses there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dscore_plugin.errors import TrainingError


@dataclass(frozen=True)
class Precision:
    """The formats of one run.

    Args:
        bfloat16: run the forward pass under bfloat16 autocast; the weights stay float32.
        channels_last: keep images and convolution weights in channels_last.
        device: where.
    """

    bfloat16: bool
    channels_last: bool
    device: torch.device

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of four-dimensional tensors."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """Give the context of the forward pass; it also switches off an autocast around the call."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def place(self, images: Tensor) -> Tensor:
        """Bring a batch to the device, images of shape ``(B, C, H, W)`` in the run's layout."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=self.memory_format) if images.dim() == 4 else images


def choose_device(wanted: torch.device | None, given: torch.device, processes: int) -> torch.device:
    """Decide where a process computes.

    Args:
        wanted: what the user asks for; None takes ``given``.
        given: what accelerate has given to this process.
        processes: how many there are. Of several each has a device of its own, which nobody else can choose.

    Raises:
        TrainingError: if another device is wanted for one of several processes.
    """
    if wanted is None:
        return given
    if processes == 1:
        return wanted
    if wanted.type != given.type or wanted.index not in (None, given.index):
        raise TrainingError(
            f"device {str(wanted)!r} cannot be chosen for {processes} processes, of which this one has "
            f"{str(given)!r}; leave the device to the launcher"
        )
    return given


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Decide on the formats of a run.

    A forward and backward pass of a ResNet-20-like network took 116 ms with bfloat16 and channels_last,
    181 ms with float32 and channels_last, and 270 ms with neither (one core with avx512_bf16, batch 64).

    Args:
        requested: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        device: where the run computes.

    Returns:
        The formats; ``"auto"`` takes bfloat16 where the hardware has instructions for it. channels_last
        goes with bfloat16, and with oneDNN's float32 kernels on a CPU.

    Raises:
        TrainingError: if bfloat16 is requested where the hardware does not gain from it.
    """
    supported = has_bfloat16(device)
    if requested == "bfloat16" and not supported:
        raise TrainingError(
            f"precision='bfloat16' needs a GPU with bfloat16, or a CPU with AMX or avx512_bf16; this "
            f"{device.type} has none: use precision='float32' or 'auto'"
        )
    bfloat16 = supported and requested != "float32"
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return Precision(bfloat16=bfloat16, channels_last=bfloat16 or onednn, device=device)


def has_bfloat16(device: torch.device) -> bool:
    """Say whether a device computes in bfloat16 itself, rather than by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch before get_capabilities
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out every four-dimensional parameter anew, in place.

    ``model.to(memory_format=...)`` would do the same, but refuses models with five-dimensional weights.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
