"""The kernels, compiled on the spot, and how they are called."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCES = ("maps.c", "norm.c", "blocks.c")
REQUIREMENT = "these kernels need a processor with amx_bf16, Linux, and gcc 11 or later"
_FLAGS = ("-O3", "-march=native", "-mamx-tile", "-mamx-bf16", "-shared", "-fPIC")
_RECORDS = {
    "block_forward": "x scale offset weight y shift sum squares",
    "block_backward": (
        "dy y z scale offset a b t x x_scale x_offset x_mean weight dx skip_dy skip_y dw sum products"
    ),
}
_NUMBERS = ("n", "h", "w", "c", "o", "stride", "skipped", "first_skipped")


def available() -> bool:
    """Whether the processor has the instructions, and a compiler is there that knows them."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return bool(capabilities.get("amx_bf16")) and _library() is not None


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel; tensors give their addresses."""
    getattr(_loaded(), name)(*map(_passed, arguments))


def call_with_record(name: str, **fields: Tensor | int | None) -> None:
    """Call a kernel that takes one record; fields that are left out are null or 0."""
    record, pointers = _record(name), set(_RECORDS[name].split())
    unknown = set(fields) - pointers - set(_NUMBERS)
    assert not unknown, unknown
    values = {key: value.data_ptr() if isinstance(value, Tensor) else value for key, value in fields.items()}
    getattr(_loaded(), name)(ctypes.byref(record(**values)))


def laid_out(x: Tensor) -> Tensor:
    """Give ``x`` of shape ``(B, C, H, W)`` in bfloat16 and channels_last, without its history."""
    return x.detach().to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def sizes(x: Tensor) -> tuple[int, int]:
    """Give the number of positions in all images of ``x``, and of channels."""
    return x.numel() // x.shape[1], x.shape[1]


def _passed(argument: Tensor | int | float | None) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return None if argument is None else ctypes.c_long(argument)


@cache
def _record(name: str) -> type[ctypes.Structure]:
    pointers = [(field, ctypes.c_void_p) for field in _RECORDS[name].split()]
    numbers = [(field, ctypes.c_long) for field in _NUMBERS]
    return type(name, (ctypes.Structure,), {"_fields_": pointers + numbers})


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise OSError(REQUIREMENT)
    return library


@cache
def _library() -> ctypes.CDLL | None:
    compiler, here = shutil.which("gcc"), Path(__file__).parent
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="dscore-amx-") as folder:
        library = Path(folder) / "kernels.so"
        command = [compiler, *_FLAGS, *(str(here / source) for source in _SOURCES), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            loaded = ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):
            return None
    return loaded if loaded.start() == 0 else None
