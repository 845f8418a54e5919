"""What a sequence's tokens share: their ratio (GSPO, arXiv 2507.18071, Eq. 7), and the slope through it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egpo_kernels.triton.arithmetic import divide
from egpo_kernels.triton.segments import bounds_of
from egpo_kernels.triton.settings import read_settings
from egpo_kernels.triton.surrogates import token_log_ratio, token_terms


class Scores(NamedTuple):
    """What a policy gave each token; with a shared ratio also the sequences' offsets and what their tokens share.

    ``log_ratio_ptr`` is the ratio's logarithm. ``slope_ptr``, unless each token has a gradient of its own, is that of a
    sequence's losses through the ratio, with respect to the log-prob of any one of its tokens that a gradient passes.
    """

    log_probs_ptr: Any
    entropy_ptr: Any = None
    offsets_ptr: Any = None
    log_ratio_ptr: Any = None
    slope_ptr: Any = None


@triton.jit
def load_log_probs(rows, log_probs_ptr, offs, stop):
    """Return which rows count, which of them are live (log-prob not -inf), and log-probs, else 0."""
    counted = tl.load(rows.mask_ptr + offs, mask=offs < stop, other=0) != 0
    log_prob = tl.load(log_probs_ptr + offs, mask=counted, other=0.0)
    live = counted & (log_prob != float("-inf"))
    return counted, live, tl.where(live, log_prob, 0.0)


@triton.jit
def factors(rows, upstream_ptr, upstream_stride, offs, live):
    """Reduction factors of tokens, times the gradient from upstream where there is one."""
    factor = tl.load(rows.factor_ptr + offs, mask=live, other=0.0)
    if upstream_ptr is not None:
        factor *= tl.load(upstream_ptr + offs * upstream_stride, mask=live, other=0.0)
    return factor


@triton.jit(do_not_specialize=["length", "upstream_stride"])
def sequence_kernel(
    rows, scores, upstream_ptr, numbers, choices: tl.constexpr, length, upstream_stride, SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence per program: mean log-ratio (GSPO, arXiv 2507.18071, Eq. 7) and, if asked for, its slope."""
    sequence = tl.program_id(0)
    start, stop = bounds_of(scores.offsets_ptr, sequence, length)
    dtype: tl.constexpr = scores.log_probs_ptr.dtype.element_ty
    settings = read_settings(numbers, dtype)
    total, count = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        counted, live, log_prob = load_log_probs(rows, scores.log_probs_ptr, offs, stop)
        advantage = tl.load(rows.advantages_ptr + offs, mask=live, other=0.0)
        log_ratio, _, _, _ = token_log_ratio(rows, offs, live, log_prob, advantage, settings, choices)
        total += tl.where(live, log_ratio, 0.0)
        count += counted.to(tl.int32)
    # Added up as floats, which is exact to 2^24: a sum of another type takes registers that there are not.
    number = tl.maximum(tl.sum(count.to(dtype), axis=0), 1.0)
    mean = divide(tl.sum(total, axis=0), number)
    tl.store(scores.log_ratio_ptr + sequence, mean)
    if scores.slope_ptr is not None:
        # Read again: kept since the first sweep, what is known of them takes a register too many.
        start, stop = bounds_of(scores.offsets_ptr, sequence, length)
        slopes = tl.zeros([BLOCK], dtype)
        shared = slopes + mean
        for first in range(start, stop, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            _, live, log_prob = load_log_probs(rows, scores.log_probs_ptr, offs, stop)
            terms = token_terms(rows, offs, live, log_prob, shared, settings, choices, SURROGATE, True)
            factor = factors(rows, upstream_ptr, upstream_stride, offs, live)
            slopes += tl.where(live, factor * terms.slope, 0.0)
        tl.store(scores.slope_ptr + sequence, divide(tl.sum(slopes, axis=0), number))
