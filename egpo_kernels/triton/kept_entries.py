"""Kept tokens with their row's own before them, their logits, and where the gradient of these goes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.kept import Entries
from egpo_kernels.triton.launcher import Launches, lie
from egpo_kernels.triton.metrics import combine, new_partials
from egpo_kernels.triton.settings import blocks_of, dense, triton_dtype
from egpo_kernels.triton.softmax import matrix

BLOCK, OPTIONS = 128, {"num_warps": 1}
NUM_SLOTS = tl.constexpr(len(metrics.SUPPORT.slots))


@triton.jit
def load_ids(ids_ptr, offs, stop):
    """Kept ids as they were given, and which lanes hold one."""
    valid = offs < stop
    return tl.load(ids_ptr + offs, mask=valid, other=0).to(tl.int64), valid


@triton.jit(do_not_specialize=["num_rows", "count", "vocab"])
def kept_entries_kernel(
    ids_ptr, offsets_ptr, tokens_ptr, mask_ptr, made, num_rows, count, vocab, BLOCK: tl.constexpr
):  # fmt: skip
    """Fields of `egpo_kernels.formulas.kept.Entries` for a row; one program more does what is behind the last."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    tl.store(made.offsets + row, start + row)
    if row < num_rows:
        stop, token = tl.load(offsets_ptr + row + 1), tl.load(tokens_ptr + row)
        counted = (tl.load(mask_ptr + row) != 0) & (stop > start)
        tl.store(made.ids + start + row, token)
        tl.store(made.rows + start + row, row)
        tl.store(made.alive + start + row, counted.to(tl.uint8))
        broken = ((token < 0) | (token >= vocab)).to(tl.int32)
        for first in range(start, stop, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            kept, valid = load_ids(ids_ptr, offs, stop)
            alive = valid & (kept != token) & counted
            broken += tl.sum((valid & ((kept < 0) | (kept >= vocab))).to(tl.int32), 0)
            place = offs + row + 1
            tl.store(made.ids + place, kept, mask=valid)
            tl.store(made.rows + place, row + tl.zeros_like(offs), mask=valid)
            tl.store(made.alive + place, alive.to(tl.uint8), mask=valid)
        tl.store(made.mask + row, counted.to(tl.uint8))
        tl.store(made.broken + row, (counted & (broken > 0)).to(tl.uint8))
    else:
        for first in range(start, count, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            nothing, valid = tl.zeros_like(offs), offs < count
            tl.store(made.ids + num_rows + offs, nothing, mask=valid)
            tl.store(made.rows + num_rows + offs, nothing + num_rows, mask=valid)
            tl.store(made.alive + num_rows + offs, nothing.to(tl.uint8), mask=valid)


@triton.jit
def places_of(rows_ptr, ids_ptr, alive_ptr, matrix, offs, count, length):
    """Where the logits of entries lie, of which alive ones are to be looked at, and their ids."""
    alive = tl.load(alive_ptr + offs, mask=offs < count, other=0) != 0
    row, column = tl.load(rows_ptr + offs, mask=alive, other=0), tl.load(ids_ptr + offs, mask=alive, other=0)
    where = matrix.ptr + row // length * matrix.batch_stride + row % length * matrix.row_stride
    return where, column, alive


@triton.jit(do_not_specialize=["count", "length", "vocab"])
def kept_logits_kernel(
    logits, rows_ptr, ids_ptr, alive_ptr, values_ptr, count, length, vocab, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Read a block of kept logits: NaN where an id is none, -inf where an entry is not alive."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where, column, alive = places_of(rows_ptr, ids_ptr, alive_ptr, logits, offs, count, length)
    inside = alive & (column >= 0) & (column < vocab)
    values = tl.load(where + column, mask=inside, other=float("nan")).to(DTYPE)
    tl.store(values_ptr + offs, tl.where(alive, values, float("-inf")), mask=offs < count)


@triton.jit(do_not_specialize=["count", "length", "vocab"])
def put_kept_kernel(
    gradient, rows_ptr, ids_ptr, alive_ptr, values_ptr, count, length, vocab, BLOCK: tl.constexpr
):  # fmt: skip
    """Write a block of kept gradients; no two alive entries of a row have one place."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where, column, alive = places_of(rows_ptr, ids_ptr, alive_ptr, gradient, offs, count, length)
    inside = alive & (column >= 0) & (column < vocab)
    values = tl.load(values_ptr + offs, mask=inside, other=0.0)
    tl.store(where + column, values.to(gradient.ptr.dtype.element_ty), mask=inside)


@triton.jit
def kept_metrics_kernel(ids_ptr, offsets_ptr, tokens_ptr, mask_ptr, partials_ptr, BLOCK: tl.constexpr):
    """The slots of `egpo_kernels.formulas.metrics.SUPPORT` for one row."""
    row = tl.program_id(0).to(tl.int64)
    start, stop, token = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1), tl.load(tokens_ptr + row)
    counted = ((tl.load(mask_ptr + row) != 0) & (stop > start)).to(tl.int64)
    others = tl.zeros((), tl.int64)
    for first in range(start, stop, BLOCK):
        kept, valid = load_ids(ids_ptr, first + tl.arange(0, BLOCK), stop)
        others += tl.sum((valid & (kept != token)).to(tl.int64), 0)
    size = counted * (others + 1)
    missing = counted * (others == stop - start).to(tl.int64)
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    slot_ptr = partials_ptr + row * NUM_SLOTS
    tl.store(slot_ptr, counted.to(dtype))
    tl.store(slot_ptr + 1, size.to(dtype))
    tl.store(slot_ptr + 2, (size == 1).to(dtype))
    tl.store(slot_ptr + 3, missing.to(dtype))
    tl.store(slot_ptr + 4, tl.where(counted > 0, size.to(dtype), float("-inf")))


def kept_entries(ids: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor, vocab: int) -> Entries:
    """See `egpo_kernels.formulas.kept.entries_of`."""
    num_rows, count = tokens.shape[0], ids.shape[0]
    wide = [offsets.new_empty(length) for length in (count + num_rows, count + num_rows, num_rows + 1)]
    flags = [offsets.new_empty(length, dtype=torch.bool) for length in (count + num_rows, num_rows, num_rows)]
    made = Entries(wide[0], wide[1], flags[0], wide[2], flags[1], flags[2])
    given = [tensor.contiguous() for tensor in (ids, offsets, tokens, mask)]
    launches = Launches(ids.device, lie(given), *[number >> 31 for number in (num_rows, count, vocab)])
    launches(kept_entries_kernel, num_rows + 1, (*given, made, num_rows, count, vocab, BLOCK), OPTIONS)
    return made


def kept_logits(logits: Tensor, entries: Entries) -> Tensor:
    """Logits ``[E]`` of kept tokens in the compute dtype, NaN where an id is none."""
    count = entries.ids.shape[0]
    values = logits.new_empty(count, dtype=compute_dtype(logits.dtype))
    _over_entries(kept_logits_kernel, logits, entries, values, (triton_dtype(values.dtype),))
    return values


def put_kept_(gradient: Tensor, entries: Entries, values: Tensor) -> None:
    """Write the gradient ``[E]`` of kept tokens to its places in ``gradient [B, T, V]``."""
    _over_entries(put_kept_kernel, gradient, entries, values, ())


def _over_entries(kernel, logits: Tensor, entries: Entries, values: Tensor, constants: tuple) -> None:
    (where, length, key), count = matrix(logits), entries.ids.shape[0]
    places = (entries.rows, entries.ids, entries.alive, values)
    if count and logits.numel():
        launches = Launches(logits.device, kernel, key, lie(places), count >> 31)
        arguments = (where, *places, count, length, logits.shape[-1], *constants, BLOCK)
        launches(kernel, blocks_of(count, BLOCK), arguments, OPTIONS)


def support_metrics(ids: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The vector of `egpo_kernels.formulas.metrics.SUPPORT` over rows of ``mask [N]``."""
    num_rows, given = tokens.shape[0], tuple(dense(tensor) for tensor in (ids, offsets, tokens, mask))
    partials = new_partials(torch.empty(0, dtype=dtype, device=ids.device), num_rows, metrics.SUPPORT)
    launches = Launches(ids.device, dtype, lie(given), num_rows == 0)
    if num_rows:
        launches(kept_metrics_kernel, num_rows, (*given, partials, BLOCK), OPTIONS)
    return combine(launches, partials, metrics.SUPPORT, None, True)
