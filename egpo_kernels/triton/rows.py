"""Rows for the other kernels from what the caller gave: mask, reduction factor, values spread over their sequences."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.settings import Rows
from egpo_kernels.formulas.rows import Counts, Given, Purpose
from egpo_kernels.inputs import layout
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.triton.arithmetic import divide
from egpo_kernels.triton.launch import processors
from egpo_kernels.triton.launcher import Launches, lie, reach
from egpo_kernels.triton.segments import Flags, bounds_of, counted_rows, sequence_of
from egpo_kernels.triton.settings import as_arguments, blocks_of, dense, read_number, triton_dtype

BLOCK, BLOCK_COUNT, OPTIONS = 1024, 4096, {"num_warps": 8}
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


NOTHING, NO_WHOLE = Numbers(None, None, None, None, None, None), Whole(None, None, None, None)
NUM_NUMBERS = tl.constexpr(len(NOTHING))


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


def sequence_counts(flags: Flags, segments: Segments, device: torch.device) -> Tensor:
    """Counted tokens ``[S]`` int32 of each sequence."""
    return _sequence_counts(flags, NOTHING, NOTHING, segments, torch.float32, device, False)[0]


def _sequence_counts(
    flags: Flags,
    given: Numbers,
    kinds: Numbers,
    segments: Segments,
    dtype: torch.dtype,
    device: torch.device,
    active: bool,
) -> tuple[Tensor, Tensor | None]:
    count, offsets = segments.num_sequences, dense(segments.offsets)
    lengths = torch.empty(count, dtype=torch.int32, device=device)
    actives = torch.empty_like(lengths) if active else None
    if count:
        launches = Launches(device, dtype, lie((*flags, *given, offsets)), kinds, segments.length >> 31, active)
        arguments = (flags, given, kinds, offsets, lengths, actives, segments.length, triton_dtype(dtype), BLOCK)
        launches(sequence_counts_kernel, count, arguments, OPTIONS)
    return lengths, actives


class Plan(NamedTuple):
    """What is done with tensors of one description: rows to be made by their dtypes, None where what was given is one;
    whether those are token ids; what the kernel is compiled with.
    """

    made: tuple[torch.dtype | None, ...]
    ids: bool
    kinds: Numbers
    choices: Choices
    constants: tuple[Any, ...]


def _plan(given: Given, kinds: Sequence[int], packed: bool, known: bool, purpose: Purpose) -> Plan:
    fresh, dtype = purpose.made(given, kinds, packed), purpose.dtype
    dtypes = (torch.bool, torch.long, *[dtype] * len(NOTHING))
    reduction = "" if purpose.config is None else purpose.config.reduction
    return Plan(
        tuple(each if new else None for each, new in zip(dtypes, fresh, strict=True)),
        fresh[1],
        Numbers(*kinds[2:]),
        Choices(reduction, reduction in ("sum", "none"), known, purpose.drops),
        (triton_dtype(dtype), BLOCK, BLOCK_COUNT),
    )


def token_rows(
    given: Given,
    kinds: Sequence[int],
    segments: Segments,
    poison: Tensor | None,
    counts: Counts,
    purpose: Purpose,
    device: torch.device,
) -> Rows:
    """Rows in the dtypes that kernels read, contiguous; ``poison`` (0-d, NaN where the layout is not sound) is in the
    factor.
    """
    num_rows, config, dtype = segments.num_rows, purpose.config, purpose.dtype
    mask, tokens, *others = given = [None if tensor is None else tensor.contiguous() for tensor in given]
    flags, numbers = Flags(mask, tokens if mask is None else None, None), Numbers(*others)
    whole, known, norm_length = NO_WHOLE, None, 0.0
    if config is not None:
        whole, known = _whole(flags, numbers, kinds, segments, poison, counts, purpose, device)
        norm_length = config.norm_length or 0.0
    offsets, sizes = dense(segments.offsets), (num_rows, segments.num_sequences, segments.length)
    launches = Launches(
        device, dtype, lie((*given, offsets, *whole)), tuple(kinds), config and config.reduction, purpose.drops,
        known is not None, reach(*sizes),
    )  # fmt: skip
    plan = launches.worked_out(_plan, given, kinds, offsets is not None, known is not None, purpose)
    like = next(tensor for tensor in given if tensor is not None)
    made = [None if each is None else like.new_empty(num_rows, dtype=each) for each in plan.made]
    if num_rows:
        new_mask, new_ids, *new = made
        ids, values = tokens if plan.ids else None, as_arguments((known or 0.0, norm_length), dtype)
        rows = (flags, numbers, plan.kinds, Numbers(*new), new_mask, ids, new_ids)
        arguments = (*rows, offsets, whole, values, plan.choices, *sizes, *plan.constants)
        launches(token_rows_kernel, min(blocks_of(num_rows, BLOCK), processors(device)), arguments, OPTIONS)
    mask, *others = [old if new is None else new for new, old in zip(made, given, strict=True)]
    assert mask is not None
    return Rows(mask, *others)


def _whole(
    flags: Flags,
    given: Numbers,
    kinds: Sequence[int],
    segments: Segments,
    poison: Tensor | None,
    counts: Counts,
    purpose: Purpose,
    device: torch.device,
) -> tuple[Whole, float | None]:
    """What the reduction divides by, and the global count where it is a number; counts sequences where it must."""
    config = purpose.config
    assert config is not None
    of_sequences = config.reduction.startswith("seq_mean")
    count = counts.sequences if of_sequences else counts.tokens
    lengths = actives = None
    pooled = purpose.drops and config.pools
    if pooled or (of_sequences and (count is None or config.reduction == "seq_mean_token_mean")):
        lengths, actives = _sequence_counts(flags, given, Numbers(*kinds[2:]), segments, purpose.dtype, device, pooled)
    if isinstance(count, Tensor):
        return Whole(count, lengths, actives, poison), None
    return Whole(None, lengths, actives, poison), count
