"""Sums over segments of rows, and raw metrics: a partial vector per program, merged by one small launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.formulas.metrics import NOTHING, Table
from egpo_kernels.triton.arithmetic import divide

# Fewer warps, and the float64 kernel spills on a B200.
SEGMENT = {"BLOCK": 1024, "num_warps": 8}


@triton.jit
def segment_total(values_ptr, mask_ptr, start, stop, BLOCK: tl.constexpr):
    """Sum and number of the counted ``values[start:stop]``; values that do not count are never read."""
    total = tl.zeros([BLOCK], values_ptr.dtype.element_ty)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        counted = offs < stop
        if mask_ptr is not None:
            counted = counted & (tl.load(mask_ptr + offs, mask=counted, other=0) != 0)
        total += tl.load(values_ptr + offs, mask=counted, other=0.0)
        count += counted.to(tl.int32)
    return tl.sum(total, axis=0), tl.sum(count, axis=0)


@triton.jit
def segment_mean_kernel(values_ptr, mask_ptr, offsets_ptr, means_ptr, counts_ptr, BLOCK: tl.constexpr):
    """One segment per program: the mean of its counted values, at least 0; NaN where it is not finite."""
    segment = tl.program_id(0)
    start, stop = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    total, count = segment_total(values_ptr, mask_ptr, start, stop, BLOCK)
    mean = divide(total, tl.maximum(count, 1).to(total.dtype))
    known = (count > 0) & (tl.abs(mean) < float("inf"))
    tl.store(means_ptr + segment, tl.where(known, tl.maximum(mean, 0.0), float("nan")))
    tl.store(counts_ptr + segment, count)


def sequence_uncertainty(values: Tensor, mask: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return H ``[S]`` (Eq. 5/6), NaN where a sequence has none, and its counted tokens ``[S]``."""
    num_sequences = offsets.shape[0] - 1
    uncertainty, counts = values.new_empty(num_sequences), offsets.new_empty(num_sequences, dtype=torch.int32)
    segment_mean_kernel[(num_sequences,)](
        values.contiguous(), as_bytes(mask), offsets.contiguous(), uncertainty, counts, **SEGMENT
    )
    return uncertainty, counts


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Bools as a kernel reads them."""
    return None if flags is None else flags.contiguous().view(torch.uint8)


@triton.jit
def highest(values):
    """Largest along the first axis, NaN if any is NaN: alone, tl.max drops NaN on a GPU."""
    broken = tl.sum((values != values).to(tl.int32), axis=0)
    return tl.where(broken > 0, float("nan"), tl.max(values, axis=0))


@triton.jit
def store_sums(slot_ptr, values):
    """Store the sum of each block of lanes in the tuple ``values``, one slot after the other."""
    for slot in tl.static_range(len(values)):
        tl.store(slot_ptr + slot, tl.sum(values[slot].to(slot_ptr.dtype.element_ty), axis=0))


@triton.jit
def store_maxima(slot_ptr, values):
    """Store the largest lane of each block in the tuple ``values``, one slot after the other."""
    for slot in tl.static_range(len(values)):
        tl.store(slot_ptr + slot, highest(values[slot].to(slot_ptr.dtype.element_ty)))


@triton.jit(do_not_specialize=["num_partials"])
def combine_kernel(
    partials_ptr, raw_ptr, num_partials, NUM_SUMS: tl.constexpr, NUM_SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Merge partial raw metrics: the first ``NUM_SUMS`` slots add up, of the others the largest stays."""
    dtype = partials_ptr.dtype.element_ty
    slots = tl.arange(0, BLOCK_SLOTS)
    is_sum = (slots < NUM_SUMS)[None, :]
    total = tl.zeros([BLOCK, BLOCK_SLOTS], dtype)
    best = tl.full([BLOCK, BLOCK_SLOTS], float("-inf"), dtype)
    for first in range(0, num_partials, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        valid = (offs < num_partials)[:, None] & (slots < NUM_SLOTS)[None, :]
        partial_ptrs = partials_ptr + offs[:, None] * NUM_SLOTS + slots[None, :]
        partial = tl.load(partial_ptrs, mask=valid, other=float("-inf"))
        total += tl.where(valid & is_sum, partial, 0.0)
        best = tl.where((partial > best) | (partial != partial), partial, best)
    raw = tl.where(slots < NUM_SUMS, tl.sum(total, axis=0), highest(best))
    tl.store(raw_ptr + slots, raw, mask=slots < NUM_SLOTS)


def combine(partials: Tensor, table: Table) -> Tensor:
    """Merge ``partials [programs, K]`` to the raw vector ``[K]`` of ``table``."""
    num_partials, num_slots = partials.shape
    raw = partials.new_zeros(num_slots)
    if num_partials:
        block_slots = triton.next_power_of_2(num_slots)
        sizes = {"NUM_SUMS": len(table.sums), "NUM_SLOTS": num_slots, "BLOCK": 2048 // block_slots}
        combine_kernel[(1,)](partials, raw, num_partials, **sizes, BLOCK_SLOTS=block_slots)
    else:
        raw[len(table.sums) :] = NOTHING
    return raw
