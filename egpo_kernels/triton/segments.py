"""Rows and the sequences they belong to: which rows count, how many of each sequence, and the mean over a sequence.

Sequences are as long as one another (``length``), or lie between offsets.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.formulas.rows import Measured
from egpo_kernels.inputs import segments
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.triton.arithmetic import divide
from egpo_kernels.triton.launcher import Launches, lie
from egpo_kernels.triton.settings import dense

IGNORED = tl.constexpr(segments.IGNORED)
# Fewer warps, and the float64 kernel spills on a B200.
BLOCK, OPTIONS = 1024, {"num_warps": 8}


class Flags(NamedTuple):
    """What decides which rows count, each None where it was not given; tokens only where there is no mask."""

    mask_ptr: Any
    tokens_ptr: Any
    entropy_mask_ptr: Any


def flags_of(mask: Tensor | None, tokens: Tensor | None, entropy_mask: Tensor | None = None) -> Flags:
    """Tensors as a kernel reads them."""
    return Flags(dense(mask), dense(tokens) if mask is None else None, dense(entropy_mask))


@triton.jit
def counted_rows(flags, first, offs, stop):
    """Which of the rows ``first + offs`` count, of those before ``first + stop``."""
    counted = offs < stop
    if flags.mask_ptr is not None:
        counted = counted & (tl.load(flags.mask_ptr + first + offs, mask=counted, other=0) != 0)
    elif flags.tokens_ptr is not None:
        tokens = tl.load(flags.tokens_ptr + first + offs, mask=counted, other=0)
        counted = counted & (tokens.to(tl.int64) != IGNORED)
    if flags.entropy_mask_ptr is not None:
        counted = counted & (tl.load(flags.entropy_mask_ptr + first + offs, mask=counted, other=0) != 0)
    return counted


@triton.jit
def bounds_of(offsets_ptr, sequence, length):
    """First row of a sequence, and the first after it."""
    if offsets_ptr is None:
        start = tl.cast(sequence, tl.int64) * length
        return start, start + length
    else:
        return tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)


@triton.jit
def sequence_of(offsets_ptr, offs, inside, num_rows, num_sequences, length):
    """The sequence of each row ``offs`` that is ``inside`` one: by division, or by halving between offsets."""
    if offsets_ptr is None:
        # In no more bits than the rows need: a division in 64 takes registers enough for a kernel to spill.
        return offs.to(num_rows.dtype) // length
    else:
        low = offs * 0
        high = low + num_sequences - 1
        span = num_sequences
        while span > 1:
            middle = (low + high) // 2
            ended = tl.load(offsets_ptr + middle + 1, mask=inside, other=0) <= offs
            low, high = tl.where(ended, tl.minimum(middle + 1, high), low), tl.where(ended, high, middle)
            span = (span + 1) // 2
        return low


@triton.jit(do_not_specialize=["length"])
def segment_mean_kernel(
    values_ptr, flags, offsets_ptr, means_ptr, counts_ptr, length, NEGATED: tl.constexpr, BLOCK: tl.constexpr
):
    """One sequence per program: the mean of its counted values, at least 0; NaN where it is not finite."""
    sequence = tl.program_id(0)
    dtype: tl.constexpr = means_ptr.dtype.element_ty
    start, stop = bounds_of(offsets_ptr, sequence, length)
    total, count = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        counted = counted_rows(flags, 0, offs, stop)
        total += tl.load(values_ptr + offs, mask=counted, other=0.0).to(dtype)
        count += counted.to(tl.int32)
    number = tl.sum(count, axis=0)
    mean = divide(tl.sum(total, axis=0), tl.maximum(number, 1).to(dtype))
    if NEGATED:
        mean = -mean
    known = (number > 0) & (tl.abs(mean) < float("inf"))
    tl.store(means_ptr + sequence, tl.where(known, tl.maximum(mean, 0.0), float("nan")))
    tl.store(counts_ptr + sequence, number)


def sequence_uncertainty(measured: Measured, rows: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return H ``[S]`` (Eq. 5/6), NaN where a sequence has none, and its counted tokens ``[S]`` int32."""
    values = measured.values
    assert values is not None
    uncertainty = values.new_empty(rows.num_sequences, dtype=dtype)
    counts = values.new_empty(rows.num_sequences, dtype=torch.int32)
    flags = flags_of(measured.mask, measured.tokens, measured.entropy_mask)
    values, offsets = values.contiguous(), dense(rows.offsets)
    launches = Launches(values.device, dtype, lie((values, offsets, *flags)), rows.length >> 31, measured.negated)
    arguments = (values, flags, offsets, uncertainty, counts, rows.length, measured.negated, BLOCK)
    launches(segment_mean_kernel, rows.num_sequences, arguments, OPTIONS)
    return uncertainty, counts
