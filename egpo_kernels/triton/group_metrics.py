"""The raw slots of the group level's metrics, filled by a block of sequences."""

import triton
import triton.language as tl

from egpo_kernels.formulas import metrics
from egpo_kernels.triton.metrics import store_maxima, store_sums

NUM_SUMMARIES = tl.constexpr(len(metrics.SUMMARIES))
NUM_SUMS = tl.constexpr(len(metrics.GROUP.sums))
NUM_SLOTS = tl.constexpr(len(metrics.GROUP.slots))


@triton.jit
def store_summary(row_ptr, SUMMARY: tl.constexpr, values, where):
    """Count, sum, maximum and maximum of the negated ``values``: the slots of one of `metrics.SUMMARIES`."""
    store_sums(row_ptr + 2 * SUMMARY, (where, tl.where(where, values, 0.0)))
    high, low = tl.where(where, values, float("-inf")), tl.where(where, -values, float("-inf"))
    store_maxima(row_ptr + NUM_SUMS + 2 * SUMMARY, (high, low))


@triton.jit
def store_metrics(row_ptr, pointers, mine, group, rules, advantages, weights, incomplete, settings):
    """The slots of `egpo_kernels.formulas.metrics.GROUP`, in its order."""
    valid, right, wrong = mine.valid, mine.valid & mine.correct, mine.valid & ~mine.correct
    store_summary(row_ptr, 0, mine.uncertainty, mine.known)
    store_summary(row_ptr, 1, mine.uncertainty, mine.known & right)
    store_summary(row_ptr, 2, mine.uncertainty, mine.known & wrong)
    store_summary(row_ptr, 3, weights, valid)
    store_summary(row_ptr, 4, weights, right)
    store_summary(row_ptr, 5, weights, wrong)
    store_summary(row_ptr, 6, advantages, valid)
    if pointers.counts_ptr is None:
        empty = valid & False
    else:
        empty = tl.load(pointers.counts_ptr + mine.offs, mask=valid, other=1) == 0
    first = valid & (group.first == mine.offs)
    rest = first & ~(rules.single | rules.unusable)
    collapsed, solved = rules.collapsed, rules.any_correct
    flags = (
        valid & (weights == settings.weight_low), valid & (weights == 1),
        valid & (weights == settings.weight_high), empty, valid & ~mine.usable,
        first & incomplete, first, first & rules.single, first & rules.unusable,
        rest & collapsed & ~solved, rest & collapsed & solved,
        rest & ~collapsed & ~solved, rest & ~collapsed & solved,
    )  # fmt: skip
    store_sums(row_ptr + 2 * NUM_SUMMARIES, flags)
