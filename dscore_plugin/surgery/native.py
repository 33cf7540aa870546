"""The product of a kernel-sparse weight with an image, in C, compiled on the spot where there is a compiler.

For every output channel the sum over its live kernels is kept in registers while the taps of each kernel pass over
shifted rows of the padded input: one load and one multiplication for 16 pixels. Where a tenth of the kernels is left
it does about a fifth of what a dense convolution does a second (``benchmarks/kernel_sparsity.py``): no value that was
loaded serves several outputs. Machines without a compiler do without.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

WIDTH = 16  # floats in a vector of the C code: rows of the output are padded to a multiple
REACH = 128  # floats that a block may read beyond the last position
_TIMEOUT = 60  # seconds for the compiler

_SOURCE = r"""
typedef float vec __attribute__((vector_size(64), aligned(4)));
#ifdef __AVX512F__
#define SUMS 8
#else
#define SUMS 4
#endif
#define BLOCK (16 * SUMS)
#define OUTPUTS 32

#define DEFINE(COUNT)                                                                              \
static void sum_##COUNT(const float *x, long x_stride, int from, int to, const int *input,         \
                        const float *weight, const long *offset, int taps, float bias, float *y)   \
{                                                                                                  \
    vec sum[COUNT];                                                                                \
    _Pragma("GCC unroll 8")                                                                        \
    for (int v = 0; v < COUNT; v++) sum[v] = (vec){0} + bias;                                      \
    for (int k = from; k < to; k++) {                                                              \
        const float *row = x + (long)input[k] * x_stride, *w = weight + (long)k * taps;            \
        for (int t = 0; t < taps; t++) {                                                           \
            const vec *in = (const vec *)(row + offset[t]);                                        \
            vec factor = (vec){0} + w[t];                                                          \
            _Pragma("GCC unroll 8")                                                                \
            for (int v = 0; v < COUNT; v++) sum[v] += factor * in[v];                              \
        }                                                                                          \
    }                                                                                              \
    _Pragma("GCC unroll 8")                                                                        \
    for (int v = 0; v < COUNT; v++) ((vec *)y)[v] = sum[v];                                        \
}
DEFINE(1)
DEFINE(2)
DEFINE(4)
#if SUMS == 8
DEFINE(8)
#define WHOLE sum_8
#else
#define WHOLE sum_4
#endif

void kernel_sparse(const float *x, long x_stride, const int *first, const int *input, const float *weight,
                   const long *offset, int taps, const float *bias, float *y, long y_stride, long n,
                   int outputs, int threads)
{
    long blocks = (n + BLOCK - 1) / BLOCK, parts = (outputs + OUTPUTS - 1) / OUTPUTS;
    #pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long task = 0; task < blocks * parts; task++) {
        long start = task / parts * BLOCK, end = n < start + BLOCK ? n : start + BLOCK;
        int from = task % parts * OUTPUTS, to = outputs < from + OUTPUTS ? outputs : from + OUTPUTS;
        for (int o = from; o < to; o++) {
            float *out = y + o * y_stride;
            float b = bias ? bias[o] : 0.0f;
#define PART(FUNCTION, AT) \
    FUNCTION(x + (AT), x_stride, first[o], first[o + 1], input, weight, offset, taps, b, out + (AT))
            long i = start;
            if (end - i == BLOCK) { PART(WHOLE, i); continue; }
            for (; end - i > 48; i += 64) PART(sum_4, i);
            for (; end - i > 16; i += 32) PART(sum_2, i);
            for (; end - i > 0; i += 16) PART(sum_1, i);
        }
    }
}
"""


def native_product(
    x: Tensor,
    x_stride: int,
    first: Tensor,
    inputs: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    y: Tensor,
    positions: int,
) -> None:
    """Write ``y[o, i] = bias[o] + sum_k sum_t weight[k, t] * x[inputs[k] * x_stride + offsets[t] + i]``.

    Args:
        x: float32 in a row, with :data:`REACH` floats behind the last that a position reads.
        x_stride: floats from one input channel to the next.
        first: where each output's kernels begin, int32, shape ``(out + 1,)``.
        inputs: the input channel of each kernel, int32, shape ``(kernels,)``.
        weight: the kernels, float32, shape ``(kernels, taps)``.
        offsets: of the taps, int64, shape ``(taps,)``.
        bias: float32, shape ``(out,)``.
        y: float32, shape ``(out, columns)``, columns a multiple of :data:`WIDTH` and at least ``positions``.
        positions: how many columns to compute.

    Raises:
        OSError: if there is no compiler; ask :func:`has_compiler` first.
    """
    library = _library()
    if library is None:
        raise OSError("no C compiler is to be had; choose another backend")
    library.kernel_sparse(
        _at(x), x_stride, _at(first), _at(inputs), _at(weight), _at(offsets), weight.shape[1], _at(bias), _at(y),
        y.stride(0), positions, len(y), torch.get_num_threads(),
    )  # fmt: skip


def has_compiler() -> bool:
    """Whether the product in C can be compiled and loaded here; the first call tries, in less than a second."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None or os.name != "posix":
        return None
    with tempfile.TemporaryDirectory(prefix="dscore-plugin-") as folder:
        for linking in _LINKINGS:
            try:
                return _declared(_compile(compiler, linking, Path(folder)))
            except (OSError, subprocess.SubprocessError, AttributeError):
                continue  # this compiler cannot do it so
    return None


# With the threads of torch's own OpenMP, which is loaded already; with the system's; in one thread.
_LINKINGS: tuple[tuple[Sequence[str], Sequence[str]], ...] = (
    (("-fopenmp",), ()),
    (("-fopenmp",), ("-fopenmp",)),
    ((), ()),
)


def _compile(compiler: str, linking: tuple[Sequence[str], Sequence[str]], folder: Path) -> ctypes.CDLL:
    source, compiled = folder / "kernels.c", folder / "kernels.o"
    library = folder / f"kernels{_LINKINGS.index(linking)}.so"
    source.write_text(_SOURCE, encoding="ascii")
    optimised = ["-O3", "-march=native", "-ffast-math", "-fno-math-errno", "-fPIC"]
    _run([compiler, *optimised, *linking[0], "-c", str(source), "-o", str(compiled)])
    # without -ffast-math: linking with it would change how the whole process treats denormal numbers
    _run([compiler, "-shared", *linking[1], str(compiled), "-o", str(library)])
    return ctypes.CDLL(str(library))


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.kernel_sparse.restype = None
    library.kernel_sparse.argtypes = [
        pointer, long, pointer, pointer, pointer, pointer, number, pointer, pointer, long, long, number, number,
    ]  # fmt: skip
    return library


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
