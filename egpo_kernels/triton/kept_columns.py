"""Products of hidden states with the columns of an output layer that their rows kept, and what flows back.

Every product is one of a vector with a vector: a column that another row kept serves no other. Nothing is there for
tensor cores to share, and memory is what they wait for.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.formulas.kept import Entries, Grouped
from egpo_kernels.triton.launcher import Launches, lie, size
from egpo_kernels.triton.settings import blocks_of, triton_dtype

BLOCK_E, BLOCK_H, OPTIONS = 16, 128, {"num_warps": 4}
SUM_BLOCK_E, SUM_BLOCK_H = 8, 256


class Rowed(NamedTuple):
    """A matrix ``[N, H]`` as a kernel sees it, whose elements may lie in any steps."""

    ptr: Any
    row_stride: Any
    stride: Any


def _rowed(tensor: Tensor) -> tuple[Rowed, Hashable]:
    """A matrix as an argument, and what of it a kernel is compiled for."""
    strides = tensor.stride()
    return Rowed(tensor, *strides), (lie((tensor,)), *map(size, strides))


@triton.jit
def load_rows(matrix, row, offs_h, inside, DTYPE: tl.constexpr):
    """Part of some rows of a matrix, 0 outside."""
    where = matrix.ptr + row.to(tl.int64)[:, None] * matrix.row_stride + offs_h[None, :] * matrix.stride
    return tl.load(where, mask=inside, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=["count"])
def gathered_products_kernel(
    left, right, rows_ptr, columns_ptr, alive_ptr, out_ptr, count, width, DTYPE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Products of a block of entries; of what is not alive nothing is read."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    alive = tl.load(alive_ptr + offs, mask=offs < count, other=0) != 0
    row = tl.load(rows_ptr + offs, mask=alive, other=0)
    column = tl.load(columns_ptr + offs, mask=alive, other=0)
    total = tl.zeros([BLOCK_E, BLOCK_H], DTYPE)
    for first in range(0, width, BLOCK_H):
        offs_h = first + tl.arange(0, BLOCK_H)
        inside = alive[:, None] & (offs_h < width)[None, :]
        total += load_rows(left, row, offs_h, inside, DTYPE) * load_rows(right, column, offs_h, inside, DTYPE)
    tl.store(out_ptr + offs, tl.sum(total, 1), mask=offs < count)


@triton.jit(do_not_specialize=["num_groups", "tiles"])
def gathered_sums_kernel(
    values_ptr, source, index_ptr, keys_ptr, order_ptr, offsets_ptr, out, num_groups, width, tiles, DTYPE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The program of a group's first entry adds up the group, some of its width; those of the others do nothing."""
    entry, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    group = tl.load(keys_ptr + entry)
    if group < num_groups:
        start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
        if start == entry:
            offs_h = tile * BLOCK_H + tl.arange(0, BLOCK_H)
            total = tl.zeros([BLOCK_E, BLOCK_H], DTYPE)
            for first in range(start, stop, BLOCK_E):
                offs = first + tl.arange(0, BLOCK_E)
                place = tl.load(order_ptr + offs, mask=offs < stop, other=0)
                value = tl.load(values_ptr + place, mask=offs < stop, other=0.0).to(DTYPE)
                row = tl.load(index_ptr + place, mask=offs < stop, other=0)
                inside = (offs < stop)[:, None] & (offs_h < width)[None, :]
                total += value[:, None] * load_rows(source, row, offs_h, inside, DTYPE)
            out_ptr = out.ptr + group * out.row_stride + offs_h * out.stride
            before = tl.load(out_ptr, mask=offs_h < width, other=0.0).to(DTYPE)
            tl.store(out_ptr, (before + tl.sum(total, 0)).to(out_ptr.dtype.element_ty), mask=offs_h < width)


def gathered_products(left: Tensor, right: Tensor, entries: Entries) -> Tensor:
    """Products ``[E]`` of entries' rows of ``left [N, H]`` and their tokens' rows of ``right [V, H]``, in the compute
    dtype; anything for what is not alive.
    """
    count, width = entries.ids.shape[0], right.shape[1]
    made = left.new_empty(count, dtype=compute_dtype(right.dtype))
    if count:
        (one, one_key), (other, other_key) = _rowed(left), _rowed(right)
        places = (entries.rows, entries.columns(right.shape[0]), entries.alive)
        launches = Launches(left.device, one_key, other_key, lie(places), count >> 31, size(width))
        arguments = (one, other, *places, made, count, width, triton_dtype(made.dtype), BLOCK_E, BLOCK_H)
        launches(gathered_products_kernel, blocks_of(count, BLOCK_E), arguments, OPTIONS)
    return made


def add_gathered(values: Tensor, source: Tensor, index: Tensor, grouped: Grouped, out: Tensor) -> None:
    """Add to each row of ``out [G, H]`` that has entries the rows ``index [E]`` of ``source``, times ``values [E]``.

    A group's entries are added up in their order.
    """
    count, (groups, width) = values.shape[0], out.shape
    if not (count and width and groups):
        return
    (read, read_key), (written, written_key) = _rowed(source), _rowed(out)
    places, tiles = (index, *grouped), blocks_of(width, SUM_BLOCK_H)
    numbers, lies = (groups, width, tiles), lie((values, *places))
    launches = Launches(source.device, read_key, written_key, lies, size(width), groups >> 31, tiles >> 31)
    constants = (triton_dtype(compute_dtype(source.dtype)), SUM_BLOCK_E, SUM_BLOCK_H)
    arguments = (values, read, *places, written, *numbers, *constants)
    launches(gathered_sums_kernel, count * tiles, arguments, OPTIONS)
