"""Metrics: a partial vector of raw slots per program, merged and turned into what is reported by one small launch."""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.formulas.metrics import Table, runs_of
from egpo_kernels.triton.arithmetic import divide

LOSS = "policy/loss/sum"


class Run(NamedTuple):
    """`egpo_kernels.formulas.metrics.Run` inside a kernel: where slots, counts and results begin, by what they go on.

    Of a gap, ``first`` and ``count`` are those of the mean that is subtracted from, the steps those of the other.
    """

    kind: Any
    place: Any
    length: Any
    first: Any
    step: Any
    count: Any
    count_step: Any


@functools.cache
def _runs(table: Table) -> tuple[Run, ...]:
    made: list[Run] = []
    for run in runs_of(table):
        place = made[-1].place + made[-1].length if made else 0
        if run.kind == "gap":
            (upper, at), (lower, below) = ((made[part], offset) for part, offset in (run.slots, run.counts))
            ends = (upper.first + at * upper.step, lower.first + below * lower.step)
            counts = (upper.count + at * upper.count_step, lower.count + below * lower.count_step)
            made.append(Run("gap", place, 1, ends[0], ends[1], counts[0], counts[1]))
        else:
            length = len(range(run.slots.start, run.slots.stop, run.slots.step))
            steps = (run.slots.step, run.counts.step if run.counts.stop - run.counts.start > 1 else 0)
            made.append(Run(run.kind, place, length, run.slots.start, steps[0], run.counts.start, steps[1]))
    return tuple(Run(*(tl.constexpr(value) for value in run)) for run in made)


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


@triton.jit
def finish_run(raw_ptr, vector_ptr, run, BLOCK: tl.constexpr):
    """Metrics of one kind from their slots; a mean, minimum or maximum over nothing is NaN."""
    if run.kind == "gap":
        upper = divide(tl.load(raw_ptr + run.first), tl.load(raw_ptr + run.count))
        lower = divide(tl.load(raw_ptr + run.step), tl.load(raw_ptr + run.count_step))
        tl.store(vector_ptr + run.place, upper - lower)
    else:
        lanes = tl.arange(0, BLOCK)
        valid = lanes < run.length
        values = tl.load(raw_ptr + run.first + lanes * run.step, mask=valid, other=0.0)
        if run.kind != "sum":
            counts = tl.load(raw_ptr + run.count + lanes * run.count_step, mask=valid, other=0.0)
            if run.kind == "mean":
                values = divide(values, counts)
            else:
                if run.kind == "min":
                    values = -values
                values = tl.where(counts > 0, values, float("nan"))
        tl.store(vector_ptr + run.place + lanes, values, mask=valid)


@triton.jit(do_not_specialize=["num_partials"])
def combine_kernel(
    partials_ptr, raw_ptr, vector_ptr, loss_ptr, num_partials, runs, NUM_SUMS: tl.constexpr, NUM_SLOTS: tl.constexpr,
    LOSS_SLOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Merge partial raw metrics: the first ``NUM_SUMS`` slots add up, of the others the largest stays; then report."""
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
    sums = tl.sum(total, axis=0)
    if loss_ptr is not None:
        tl.store(loss_ptr, tl.sum(tl.where(slots == LOSS_SLOT, sums, 0.0), axis=0))
    if vector_ptr is not None:
        tl.store(raw_ptr + slots, tl.where(slots < NUM_SUMS, sums, highest(best)), mask=slots < NUM_SLOTS)
        # Other threads read the slots than those that wrote them.
        tl.debug_barrier()
        for number in tl.static_range(len(runs)):
            finish_run(raw_ptr, vector_ptr, runs[number], BLOCK_SLOTS)


def combine(partials: Tensor, table: Table, loss: Tensor | None, reported: bool) -> Tensor:
    """Merge ``partials [programs, K]`` to the reported vector of ``table`` (empty unless so); fill ``loss``, 0-d."""
    num_partials, num_slots = partials.shape
    vector, raw = partials.new_empty(len(table.keys) if reported else 0), None
    if reported:
        raw = partials.new_empty(num_slots)
    block_slots = triton.next_power_of_2(num_slots)
    combine_kernel[(1,)](
        partials,
        raw,
        vector if reported else None,
        loss,
        num_partials,
        _runs(table),
        NUM_SUMS=len(table.sums),
        NUM_SLOTS=num_slots,
        LOSS_SLOT=table.slots.index(LOSS) if LOSS in table.slots else 0,
        BLOCK=2048 // block_slots,
        BLOCK_SLOTS=block_slots,
    )
    return vector
