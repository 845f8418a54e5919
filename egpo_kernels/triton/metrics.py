"""Metrics: a partial vector of raw slots per program, merged and turned into what is reported by one small launch."""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.formulas.metrics import Table, runs_of
from egpo_kernels.triton.arithmetic import divide
from egpo_kernels.triton.launcher import Launches

LOSS = "policy/loss/sum"
# Kinds of metrics as a kernel sees them.
KINDS = ("sum", "mean", "min", "max", "gap")
SUM, MEAN, MIN, GAP = (tl.constexpr(KINDS.index(kind)) for kind in ("sum", "mean", "min", "gap"))


class Runs(NamedTuple):
    """`egpo_kernels.formulas.metrics.Run` inside a kernel, a tuple of each column: where slots, counts and results of a
    run begin, by what they go on. Of a gap, first and count are those of the mean that is subtracted from, the steps
    those of the other.
    """

    kinds: Any
    places: Any
    lengths: Any
    firsts: Any
    steps: Any
    counts: Any
    count_steps: Any


@functools.cache
def _runs(table: Table) -> Runs:
    made: list[tuple[int, ...]] = []
    for run in runs_of(table):
        place = made[-1][1] + made[-1][2] if made else 0
        if run.kind == "gap":
            ends = [(made[part][3] + at * made[part][4], made[part][5] + at * made[part][6]) for part, at in run[1:]]
            (first, count), (other, other_count) = ends
            made.append((KINDS.index("gap"), place, 1, first, other, count, other_count))
        else:
            length = len(range(run.slots.start, run.slots.stop, run.slots.step))
            count_step = run.counts.step if run.counts.stop - run.counts.start > 1 else 0
            begin, count = run.slots.start, run.counts.start
            made.append((KINDS.index(run.kind), place, length, begin, run.slots.step, count, count_step))
    return Runs(*zip(*made, strict=True))


@functools.cache
def _sizes(table: Table) -> tuple[Any, ...]:
    """What is known of a table when the kernel is compiled, from ``RUNS`` on."""
    block = triton.next_power_of_2(len(table.slots))
    loss = table.slots.index(LOSS) if LOSS in table.slots else 0
    return _runs(table), len(table.sums), len(table.slots), loss, 2048 // block, block


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
def finish_run(raw_ptr, vector_ptr, RUNS: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
    """Metrics of one kind from their slots; a mean, minimum or maximum over nothing is NaN."""
    kind: tl.constexpr = RUNS.kinds[NUMBER]
    first, step = RUNS.firsts[NUMBER], RUNS.steps[NUMBER]
    count, count_step = RUNS.counts[NUMBER], RUNS.count_steps[NUMBER]
    result_ptr = vector_ptr + RUNS.places[NUMBER]
    if kind == GAP:
        upper = divide(tl.load(raw_ptr + first), tl.load(raw_ptr + count))
        lower = divide(tl.load(raw_ptr + step), tl.load(raw_ptr + count_step))
        tl.store(result_ptr, upper - lower)
    else:
        lanes = tl.arange(0, BLOCK)
        valid = lanes < RUNS.lengths[NUMBER]
        values = tl.load(raw_ptr + first + lanes * step, mask=valid, other=0.0)
        if kind != SUM:
            counts = tl.load(raw_ptr + count + lanes * count_step, mask=valid, other=0.0)
            if kind == MEAN:
                values = divide(values, counts)
            else:
                if kind == MIN:
                    values = -values
                values = tl.where(counts > 0, values, float("nan"))
        tl.store(result_ptr + lanes, values, mask=valid)


@triton.jit(do_not_specialize=["num_partials"])
def combine_kernel(
    partials_ptr, vector_ptr, loss_ptr, num_partials, RUNS: tl.constexpr, NUM_SUMS: tl.constexpr,
    NUM_SLOTS: tl.constexpr, LOSS_SLOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Merge partial raw metrics: the first ``NUM_SUMS`` slots add up, of the others the largest stays; then report.

    What is merged goes behind the partials.
    """
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
        raw_ptr = partials_ptr + num_partials * NUM_SLOTS
        tl.store(raw_ptr + slots, tl.where(slots < NUM_SUMS, sums, highest(best)), mask=slots < NUM_SLOTS)
        # Other threads read the slots than those that wrote them.
        tl.debug_barrier()
        for number in tl.static_range(len(RUNS.kinds)):
            finish_run(raw_ptr, vector_ptr, RUNS, number, BLOCK_SLOTS)


def new_partials(like: Tensor, programs: int, table: Table) -> Tensor:
    """Memory ``[programs + 1, K]`` for raw metrics of each program, and for what they are merged to."""
    return like.new_empty((programs + 1, len(table.slots)))


def combine(launches: Launches, partials: Tensor, table: Table, loss: Tensor | None, reported: bool) -> Tensor:
    """Merge `new_partials` to the reported vector of ``table`` (empty unless so); fill ``loss``, 0-d."""
    vector = partials.new_empty(len(table.keys) if reported else 0)
    reported_to = vector if reported else None
    launches(combine_kernel, 1, (partials, reported_to, loss, partials.shape[0] - 1, *_sizes(table)))
    return vector
