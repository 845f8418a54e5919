"""Rows for the other kernels from what the caller gave: mask, reduction factor, values spread over their sequences."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egpo_kernels.inputs import layout
from egpo_kernels.triton.arithmetic import divide
from egpo_kernels.triton.segments import bounds_of, counted_rows, sequence_of
from egpo_kernels.triton.settings import read_number

PER_TOKEN, PER_SEQUENCE = tl.constexpr(layout.PER_TOKEN), tl.constexpr(layout.PER_SEQUENCE)


class Numbers(NamedTuple):
    """What is given and made per token, in the order of `Rows` from the temperature on; pointers, or kinds of them."""

    temperature: Any
    advantages: Any
    factor: Any
    old_log_probs: Any
    ref_log_probs: Any
    rollout_weights: Any


class Whole(NamedTuple):
    """What the reduction divides by: pointers to a global count, to counted and active tokens of each sequence here,
    and to what is NaN where the layout is not sound; None where they are not.
    """

    count_ptr: Any
    lengths_ptr: Any
    actives_ptr: Any
    poison_ptr: Any


NUM_NUMBERS = tl.constexpr(len(Numbers._fields))


class Choices(NamedTuple):
    """What is known when a kernel is compiled: the reduction ("" without a loss), whether it ``sums`` only, whether
    its global count is a number, whether rows without a gradient are dropped.
    """

    reduction: Any
    sums: Any
    known: Any
    drops: Any


@triton.jit
def load_field(ptr, offs, sequence, valid, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Values of rows, of their sequences, or one for all."""
    if KIND == PER_TOKEN:
        place = offs
    elif KIND == PER_SEQUENCE:
        place = sequence
    else:
        place = offs * 0
    return tl.load(ptr + place, mask=valid, other=0.0).to(DTYPE)


@triton.jit
def is_active(given, kinds, offs, sequence, counted, DTYPE: tl.constexpr):
    """Counted rows whose gradient is not known to be 0."""
    active = counted & (load_field(given.advantages, offs, sequence, counted, kinds.advantages, DTYPE) != 0)
    if given.rollout_weights is not None:
        weight = load_field(given.rollout_weights, offs, sequence, counted, kinds.rollout_weights, DTYPE)
        active = active & (weight != 0)
    return active


@triton.jit(do_not_specialize=["length"])
def sequence_counts_kernel(
    flags, given, kinds: tl.constexpr, offsets_ptr, lengths_ptr, actives_ptr, length, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence per program: its counted tokens and, if asked for, those of them whose gradient is not 0."""
    sequence = tl.program_id(0)
    start, stop = bounds_of(offsets_ptr, sequence, length)
    total, active = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        counted = counted_rows(flags, 0, offs, stop)
        total += counted.to(tl.int32)
        if actives_ptr is not None:
            active += is_active(given, kinds, offs, offs * 0 + sequence, counted, DTYPE).to(tl.int32)
    tl.store(lengths_ptr + sequence, tl.sum(total, axis=0))
    if actives_ptr is not None:
        tl.store(actives_ptr + sequence, tl.sum(active, axis=0))


@triton.jit
def number_that_count(flags, whole, stop, num_sequences, choices, BLOCK: tl.constexpr):
    """Tokens of the batch that count, or sequences with such a token; every program counts them for itself."""
    total = tl.zeros([BLOCK], tl.int32)
    if choices.reduction == "token_mean":
        for first in range(0, stop, BLOCK):
            # Counted from a block's first row: places in 32 bits take half the registers.
            left = tl.minimum(stop - first, BLOCK).to(tl.int32)
            total += counted_rows(flags, first, tl.arange(0, BLOCK), left).to(tl.int32)
    else:
        for first in range(0, num_sequences, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            total += (tl.load(whole.lengths_ptr + offs, mask=offs < num_sequences, other=0) > 0).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def denominator_of(flags, whole, numbers, stop, num_sequences, choices, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """What every token's loss is divided by, but for the length of its own sequence."""
    if whole.count_ptr is not None:
        count = tl.load(whole.count_ptr).to(DTYPE)
    elif choices.known:
        count = read_number(numbers, 0, DTYPE)
    else:
        count = number_that_count(flags, whole, stop, num_sequences, choices, BLOCK).to(DTYPE)
    if choices.reduction == "seq_mean_token_sum_norm":
        count = count * read_number(numbers, 1, DTYPE)
    return count


@triton.jit
def mask_of(given, kinds, whole, offs, sequence, counted, choices, DTYPE: tl.constexpr):
    """Counted rows, without those whose gradient is known to be 0 where they are dropped."""
    if not choices.drops:
        return counted
    elif whole.actives_ptr is None:
        return is_active(given, kinds, offs, sequence, counted, DTYPE)
    else:
        return counted & (tl.load(whole.actives_ptr + sequence, mask=counted, other=0) > 0)


@triton.jit
def factor_of(whole, divisor, sequence, counted, choices, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """What each token's loss is multiplied by; see `egpo_kernels.formulas.reduction.reduction_factor`."""
    factor = tl.full([BLOCK], 1.0, DTYPE)
    if not choices.sums:
        own = factor * divisor
        if choices.reduction == "seq_mean_token_mean":
            own = own * tl.load(whole.lengths_ptr + sequence, mask=counted, other=1).to(DTYPE)
        sound = (own > 0) & (own < float("inf"))
        factor = tl.where(counted, tl.where(sound, divide(1.0, own), float("nan")), 0.0)
    if whole.poison_ptr is not None:
        factor = factor * tl.load(whole.poison_ptr).to(DTYPE)
    return factor


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "length"])
def token_rows_kernel(
    flags, given, kinds: tl.constexpr, made, mask_ptr, tokens_ptr, ids_ptr, offsets_ptr, whole, numbers,
    choices: tl.constexpr, num_rows, num_sequences, length, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th block of rows; what needs not be made has no pointer."""
    stop = tl.cast(num_rows, tl.int64)
    if offsets_ptr is not None:
        stop = tl.load(offsets_ptr + num_sequences)
    divisor = 1.0
    if made.factor is not None and not choices.sums:
        divisor = denominator_of(flags, whole, numbers, stop, num_sequences, choices, DTYPE, BLOCK_COUNT)
    for first in range(tl.program_id(0) * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
        offs = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        valid, inside = offs < num_rows, offs < stop
        counted = counted_rows(flags, 0, offs, stop)
        sequence = sequence_of(offsets_ptr, offs, inside, num_rows, num_sequences, length)
        if mask_ptr is not None:
            looked_at = mask_of(given, kinds, whole, offs, sequence, counted, choices, DTYPE)
            tl.store(mask_ptr + offs, looked_at.to(tl.uint8), mask=valid)
        if ids_ptr is not None:
            tl.store(ids_ptr + offs, tl.load(tokens_ptr + offs, mask=valid, other=0).to(tl.int64), mask=valid)
        if made.factor is not None:
            factor = factor_of(whole, divisor, sequence, counted, choices, DTYPE, BLOCK)
            tl.store(made.factor + offs, factor, mask=valid)
        for place in tl.static_range(NUM_NUMBERS):
            if given[place] is not None and made[place] is not None:
                values = load_field(given[place], offs, sequence, inside, kinds[place], DTYPE)
                tl.store(made[place] + offs, values, mask=valid)
