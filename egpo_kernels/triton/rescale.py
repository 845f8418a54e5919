"""Scaling a gradient that was computed ahead of its upstream gradient."""

import functools
from collections.abc import Hashable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.triton.arithmetic import divide
from egpo_kernels.triton.launcher import Launches, lie, size
from egpo_kernels.triton.settings import as_arguments, blocks_of, read_number, triton_dtype

BLOCK = 4096
MAX_PROGRAMS = 2048


@triton.jit(do_not_specialize=["num_chunks", "inner", "width"])
def rescale_kernel(
    gradient_ptr, upstream_ptr, numbers, num_chunks, inner, width, outer_stride, inner_stride,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply ``[outer, inner, width]`` by upstream / expected; when they are equal, leave at once."""
    expected = read_number(numbers, 0, DTYPE)
    upstream = tl.load(upstream_ptr).to(DTYPE)
    if upstream != expected:
        ratio = divide(upstream, expected)
        # Rounding up could pass 2^31.
        chunks_per_row = tl.cdiv(tl.cast(width, tl.int64), BLOCK)
        for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
            row = tl.cast(chunk // chunks_per_row, tl.int64)
            first = tl.cast(chunk % chunks_per_row, tl.int64) * BLOCK
            row_ptr = gradient_ptr + row // inner * outer_stride + row % inner * inner_stride
            offs = first + tl.arange(0, BLOCK)
            # Without a mask the compiler makes wide accesses whatever the width.
            if first + BLOCK <= width:
                tl.store(row_ptr + offs, tl.load(row_ptr + offs) * ratio)
            else:
                valid = offs < width
                tl.store(row_ptr + offs, tl.load(row_ptr + offs, mask=valid, other=0.0) * ratio, mask=valid)


class Extent(NamedTuple):
    """Gradients as the kernel goes over them: ``[outer, inner, width]``, in chunks of at most `BLOCK`."""

    num_chunks: int
    inner: int
    width: int
    outer_stride: int
    inner_stride: int


@functools.lru_cache(maxsize=256)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Extent, Hashable]:
    """And what the kernel is compiled for of it."""
    missing = 3 - len(shape)
    outer, inner, width = (1,) * missing + tuple(shape)
    outer_stride, inner_stride, _ = (0,) * missing + strides
    num_chunks = outer * inner * blocks_of(width, BLOCK)
    key = (size(outer_stride), size(inner_stride), num_chunks >> 31, inner >> 31, width >> 31)
    return Extent(num_chunks, inner, width, outer_stride, inner_stride), key


def rescale_(gradient: Tensor, upstream: Tensor, expected: float) -> None:
    """Multiply ``gradient`` (last stride 1) by ``upstream / expected`` in place; no pass if equal."""
    if gradient.numel() == 0:
        return
    if gradient.is_contiguous():
        extent, key = _extent((gradient.numel(),), (1,))
    elif gradient.dim() <= 3:
        extent, key = _extent(gradient.shape, gradient.stride())
    else:
        for part in gradient.unbind(0):
            rescale_(part, upstream, expected)
        return
    dtype = compute_dtype(gradient.dtype)
    launches = Launches(gradient.device, lie((gradient, upstream)), key)
    arguments = (gradient, upstream, as_arguments((expected,), dtype), *extent, triton_dtype(dtype), BLOCK)
    launches(rescale_kernel, min(extent.num_chunks, MAX_PROGRAMS), arguments)
