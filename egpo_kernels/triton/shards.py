"""Rows whose columns are spread over ranks: what this rank tells the others, and what follows from all ranks' tables.

Tables are those of `egpo_kernels.formulas.shards`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.formulas import shards
from egpo_kernels.formulas.shards import Merged, num_headers
from egpo_kernels.triton.arithmetic import LOG2_E, divide
from egpo_kernels.triton.launch import choice_of, launch_for
from egpo_kernels.triton.launcher import Launches, lie, reach
from egpo_kernels.triton.row_statistics import KERNEL
from egpo_kernels.triton.settings import (
    RowPointers,
    blocks_of,
    read_temperature,
    row_pointers,
    temperature_of,
    triton_dtype,
)
from egpo_kernels.triton.softmax import (
    LN_2,
    LOWEST,
    START,
    START_FLOAT64,
    RowStatistics,
    matrix,
    row_inverse_temperature,
    row_pointer,
    sweep_statistics,
    token_statistics,
)

BLOCK, OPTIONS = 128, {"num_warps": 4}
WIDTH, HEADED, PRIME, SHIFT, CHECKED = (
    tl.constexpr(each) for each in (shards.WIDTH, shards.HEADED, shards.PRIME, shards.SHIFT, shards.CHECKED)
)

NUM_FIELDS = tl.constexpr(len(RowPointers._fields))


@triton.jit
def mixed_with(mixed, pointer, offs, counted):
    """A checksum with 32 bits of one field of rows."""
    if pointer is not None:
        field = tl.load(pointer + offs, mask=counted, other=0)
        if field.dtype == tl.float64:
            wide = field.to(tl.int64, bitcast=True)
            mixed = mixed ^ (wide ^ (wide >> 32)).to(tl.int32)
        elif field.dtype == tl.float32:
            mixed = mixed ^ field.to(tl.int32, bitcast=True)
        else:
            mixed = mixed ^ field.to(tl.int32)
    mixed = mixed * PRIME
    return mixed ^ (mixed >> SHIFT)


@triton.jit(do_not_specialize=["num_rows", "seed", "start", "columns"])
def shard_headers_kernel(rows, table_ptr, num_rows, seed, start, columns):
    """One header a program."""
    offs = tl.program_id(0) * HEADED + tl.arange(0, HEADED)
    counted = tl.load(rows.mask_ptr + offs, mask=offs < num_rows, other=0) != 0
    mixed = offs.to(tl.int32)
    for place in tl.static_range(NUM_FIELDS):
        mixed = mixed_with(mixed, rows[place], offs, counted)
    checksum = (tl.sum(tl.where(counted, mixed, 0).to(tl.int64), 0) + seed) & CHECKED
    header_ptr = table_ptr + tl.program_id(0) * WIDTH
    dtype: tl.constexpr = table_ptr.dtype.element_ty
    tl.store(header_ptr, tl.cast(start, dtype))
    tl.store(header_ptr + 1, tl.cast(columns, dtype))
    tl.store(header_ptr + 2, checksum.to(dtype))
    tl.store(header_ptr + 3, tl.cast(0, dtype))


@triton.jit(do_not_specialize=["length", "start"])
def shard_statistics_kernel(
    logits, rows, table_ptr, numbers, length, start, extent, launch: tl.constexpr, DTYPE: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """As `row_statistics_kernel`, of some columns, in natural units; one program a row, zeros outside the mask."""
    row = tl.program_id(0)
    line_ptr = table_ptr + row.to(tl.int64) * WIDTH
    zero = tl.zeros((), DTYPE)
    maximum, sum_exp, own, weighted = zero, zero, zero, zero
    if tl.load(rows.mask_ptr + row) != 0:
        row_ptr = row_pointer(logits, row, length, launch.aligned)
        scale = LOG2_E * row_inverse_temperature(rows, row, read_temperature(numbers, DTYPE))
        column = tl.load(rows.tokens_ptr + row) - start
        inside = (column >= 0) & (column < extent.vocab)
        own = tl.load(row_ptr + tl.where(inside, column, 0), mask=inside, other=0.0).to(DTYPE)
        found = sweep_statistics(row_ptr, extent, scale, launch, DTYPE, ENTROPY)
        maximum, sum_exp, weighted = found.maximum, found.sum_exp, found.weighted * LN_2
    tl.store(line_ptr, maximum)
    tl.store(line_ptr + 1, sum_exp)
    tl.store(line_ptr + 2, own)
    tl.store(line_ptr + 3, weighted)


@triton.jit
def misfits(tables_ptr, ranks, stride, vocab, headers, BLOCK: tl.constexpr):
    """See `egpo_kernels.formulas.shards.misfits`."""
    wrong, stop = 0, 0
    for rank in range(ranks):
        apart = tl.zeros((BLOCK,), tl.int32)
        table_ptr = tables_ptr + tl.cast(rank, tl.int64) * stride
        columns = tl.load(table_ptr + 1).to(tl.int32)
        for first in range(0, headers, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            valid = offs < headers
            line_ptr = table_ptr + offs * WIDTH
            apart |= (tl.load(line_ptr, mask=valid, other=0).to(tl.int32) != stop) & valid
            other = tl.load(tables_ptr + offs * WIDTH + 2, mask=valid, other=0)
            apart |= (tl.load(line_ptr + 2, mask=valid, other=0) != other) & valid
        stop += columns
        short = (rank == ranks - 1) & (stop != vocab)
        wrong += tl.maximum(tl.max(apart, 0), short.to(tl.int32))
    return wrong


@triton.jit(do_not_specialize=["ranks", "stride", "headers", "vocab", "num_rows"])
def merge_shards_kernel(
    tables_ptr, rows, log_probs_ptr, entropy_ptr, maximum_ptr, sum_exp_ptr, status_ptr, numbers, ranks, stride,
    headers, vocab, num_rows, DTYPE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows, of which every rank told some columns; see `egpo_kernels.formulas.shards.merged`."""
    wrong = misfits(tables_ptr, ranks, stride, vocab, headers, BLOCK)
    poison = tl.where(wrong > 0, float("nan"), 1.0).to(DTYPE)
    if tl.program_id(0) == 0:
        tl.store(status_ptr, wrong.to(DTYPE))
        tl.store(status_ptr + 1, poison)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < num_rows
    counted = tl.load(rows.mask_ptr + offs, mask=valid, other=0) != 0
    inverse_temperature = tl.zeros((BLOCK,), DTYPE) + read_temperature(numbers, DTYPE).inverse_temperature
    if rows.temperature_ptr is not None:
        heat = tl.load(rows.temperature_ptr + offs, mask=counted, other=1.0)
        inverse_temperature = tl.where(heat > 0, divide(1.0, heat), float("nan"))
    lowest: tl.constexpr = START_FLOAT64 if DTYPE == tl.float64 else START
    maximum = tl.zeros((BLOCK,), DTYPE) + lowest
    lines_ptr = tables_ptr + (headers + offs) * WIDTH
    for rank in range(ranks):
        maximum = tl.maximum(maximum, tl.load(lines_ptr + tl.cast(rank, tl.int64) * stride, mask=valid, other=0.0))
    sum_exp, own = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    weighted = tl.zeros((BLOCK,), DTYPE)
    for rank in range(ranks):
        line_ptr = lines_ptr + tl.cast(rank, tl.int64) * stride
        theirs, sums = tl.load(line_ptr, mask=valid, other=0.0), tl.load(line_ptr + 1, mask=valid, other=0.0)
        shift = tl.maximum((theirs - maximum) * (LOG2_E * inverse_temperature), LOWEST)
        decay = tl.exp2(shift)
        sum_exp += decay * sums
        own += tl.load(line_ptr + 2, mask=valid, other=0.0)
        if ENTROPY:
            theirs = tl.load(line_ptr + 3, mask=valid, other=0.0)
            weighted += decay * (theirs * LOG2_E + shift * sums)
    token = tl.load(rows.tokens_ptr + offs, mask=counted, other=0)
    own = tl.where((token >= 0) & (token < vocab), own, float("nan"))
    found = RowStatistics(maximum, sum_exp, weighted)
    log_prob, entropy = token_statistics(found, own, inverse_temperature)
    tl.store(log_probs_ptr + offs, tl.where(counted, log_prob, 0.0) * poison, mask=valid)
    tl.store(maximum_ptr + offs, maximum, mask=valid)
    tl.store(sum_exp_ptr + offs, sum_exp * poison, mask=valid)
    if ENTROPY:
        tl.store(entropy_ptr + offs, tl.where(counted, entropy, 0.0) * poison, mask=valid)


def shard_statistics(
    logits: Tensor,
    rows: Rows,
    temperature: float,
    want_entropy: bool,
    capacity: int,
    alike: Rows,
    seed: int,
    start: int,
) -> Tensor:
    """What this rank tells of its columns, from ``start`` on: see `egpo_kernels.formulas.shards.told`."""
    num_rows, dtype, columns = rows.mask.numel(), compute_dtype(logits.dtype), logits.shape[-1]
    headers, checked = num_headers(capacity), row_pointers(alike)
    table = logits.new_empty(headers + capacity, shards.WIDTH, dtype=dtype)
    launches = Launches(logits.device, dtype, lie(checked), reach(num_rows))
    launches(shard_headers_kernel, headers, (checked, table, num_rows, seed, start, columns), OPTIONS)
    if num_rows < capacity:
        table[headers + num_rows :].zero_()
    lines = table[headers : headers + num_rows]
    if num_rows and columns:
        _launch_statistics(logits, rows, temperature, want_entropy, start, lines)
    elif num_rows:
        lines.zero_()
        lines[:, 0] = torch.finfo(dtype).min
    return table


def _launch_statistics(
    logits: Tensor, rows: Rows, temperature: float, want_entropy: bool, start: int, lines: Tensor
) -> None:
    pointers, (where, length, where_key) = row_pointers(rows), matrix(logits)
    launches = Launches(logits.device, choice_of(KERNEL, logits), where_key, lie((*pointers, lines)), want_entropy)
    launched = launches.worked_out(launch_for, KERNEL, logits)
    constants = (launched.launch, triton_dtype(lines.dtype), want_entropy)
    numbers = temperature_of(temperature, lines.dtype)
    arguments = (where, pointers, lines, numbers, length, start, launched.extent, *constants)
    launches(shard_statistics_kernel, lines.shape[0], arguments, launched.options)


def merged_shards(
    gathered: Tensor, rows: Rows, temperature: float, want_entropy: bool, vocab: int, capacity: int
) -> Merged:
    """See `egpo_kernels.formulas.shards.merged`."""
    num_rows, (ranks, lines, wide), dtype = rows.mask.numel(), gathered.shape, gathered.dtype
    entropy = gathered.new_empty(num_rows if want_entropy else 0)
    log_probs, maximum, sum_exp = (gathered.new_empty(num_rows) for _ in range(3))
    found, pointers = Merged(log_probs, entropy, maximum, sum_exp, gathered.new_empty(2)), row_pointers(rows)
    sizes = (ranks, lines * wide, num_headers(capacity), vocab, num_rows)
    reached = reach(lines * wide, num_rows)
    launches = Launches(gathered.device, dtype, lie(pointers), lie((gathered,)), want_entropy, reached)
    arguments = (gathered, pointers, *found, temperature_of(temperature, dtype), *sizes)
    constants = (triton_dtype(dtype), want_entropy, BLOCK)
    launches(merge_shards_kernel, max(1, blocks_of(num_rows, BLOCK)), arguments + constants, OPTIONS)
    return found
