"""Log-prob level: reduced loss of each token, its gradient, raw metrics (EGPO, arXiv 2602.22751, Eq. 12)."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows
from egpo_kernels.formulas import metrics
from egpo_kernels.triton.arithmetic import divide, exponential
from egpo_kernels.triton.segments import combine, store_maxima, store_sums
from egpo_kernels.triton.settings import Choices, choices_of, read_settings, row_pointers, settings_of
from egpo_kernels.triton.surrogates import SURROGATES, slope_of, token_log_ratio, token_terms

LAUNCH = {"BLOCK": 256, "num_warps": 8}
# As many lanes of float64 spill.
SEQUENCE_LAUNCH = {torch.float32: {"BLOCK": 1024, "num_warps": 8}, torch.float64: {"BLOCK": 512, "num_warps": 8}}


class Scores(NamedTuple):
    """What a policy gave each token; with a shared ratio also each token's sequence and what it shares.

    ``log_ratio_ptr`` is the ratio's logarithm. ``slope_ptr``, unless each token has a gradient of its own, is that of a
    sequence's losses through the ratio, with respect to the log-prob of any one of its tokens that a gradient passes.
    """

    log_probs_ptr: Any
    entropy_ptr: Any = None
    index_ptr: Any = None
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
def row_terms(rows, scores, offs, live, log_prob, settings, choices, SURROGATE: tl.constexpr):
    """Terms of tokens with their own ratio or the one their sequence shares."""
    shared = None
    if scores.log_ratio_ptr is not None:
        index = tl.load(scores.index_ptr + offs, mask=live, other=0)
        shared = tl.load(scores.log_ratio_ptr + index, mask=live, other=0.0)
    return token_terms(rows, offs, live, log_prob, shared, settings, choices, SURROGATE, False)


@triton.jit
def sequence_kernel(rows, scores, offsets_ptr, numbers, choices, SURROGATE: tl.constexpr, BLOCK: tl.constexpr):
    """One sequence per program: mean log-ratio (GSPO, arXiv 2507.18071, Eq. 7) and, if asked for, its slope."""
    sequence = tl.program_id(0)
    start, stop = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
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
    length = tl.maximum(tl.sum(count.to(dtype), axis=0), 1.0)
    mean = divide(tl.sum(total, axis=0), length)
    tl.store(scores.log_ratio_ptr + sequence, mean)
    if scores.slope_ptr is not None:
        # Read again: kept since the first sweep, what is known of them takes a register too many.
        start, stop = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
        slopes = tl.zeros([BLOCK], dtype)
        shared = slopes + mean
        for first in range(start, stop, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            _, live, log_prob = load_log_probs(rows, scores.log_probs_ptr, offs, stop)
            terms = token_terms(rows, offs, live, log_prob, shared, settings, choices, SURROGATE, True)
            factor = tl.load(rows.factor_ptr + offs, mask=live, other=0.0)
            slopes += tl.where(live, factor * terms.slope, 0.0)
        tl.store(scores.slope_ptr + sequence, divide(tl.sum(slopes, axis=0), length))


@triton.jit
def missing(pointer, offs, counted):
    """Where an optional tensor is NaN."""
    if pointer is None:
        return counted & False
    else:
        values = tl.load(pointer + offs, mask=counted, other=0.0)
        return values != values


@triton.jit
def outside_vocab(tokens_ptr, offs, counted, vocab):
    """Where a counted token is no index into the vocabulary."""
    if tokens_ptr is None:
        return counted & False
    else:
        token = tl.load(tokens_ptr + offs, mask=counted, other=0)
        return counted & ((token < 0) | (token >= vocab))


@triton.jit(do_not_specialize=["num_rows", "vocab"])
def policy_loss_kernel(
    rows, scores, losses_ptr, partials_ptr, numbers, choices, num_rows, vocab,
    SURROGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of a block of tokens and its partial metrics."""
    settings = read_settings(numbers, scores.log_probs_ptr.dtype.element_ty)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted, live, log_prob = load_log_probs(rows, scores.log_probs_ptr, offs, num_rows)
    terms = row_terms(rows, scores, offs, live, log_prob, settings, choices, SURROGATE)
    entropy = tl.zeros_like(log_prob)
    if scores.entropy_ptr is not None:
        entropy = tl.load(scores.entropy_ptr + offs, mask=live, other=0.0)
    factor = tl.load(rows.factor_ptr + offs, mask=counted, other=0.0)
    loss = terms.loss + settings.kl_coef * terms.kl_term - settings.entropy_coef * entropy
    loss = tl.where(live, factor * loss, 0.0)
    tl.store(losses_ptr + offs, loss, mask=offs < num_rows)

    # From here on: the slots of `egpo_kernels.formulas.metrics.TOKEN`, in its order.
    log_ratio = tl.where(live, terms.log_ratio, 0.0)
    ratio = exponential(log_ratio)
    sums = (
        counted,
        loss,
        tl.where(live, factor * terms.loss, 0.0),
        tl.where(live, factor * settings.kl_coef * terms.kl_term, 0.0),
        tl.where(live, -factor * settings.entropy_coef * entropy, 0.0),
        terms.low & live,
        terms.high & live,
        tl.where(counted, ratio, 0.0),
        tl.where(counted, ratio - 1.0 - log_ratio, 0.0),
        tl.where(live, terms.kl, 0.0),
        entropy,
        outside_vocab(rows.tokens_ptr, offs, counted, vocab),
        counted & ~(live & (tl.abs(log_prob) < float("inf"))),
        missing(rows.rollout_weights_ptr, offs, counted),
        counted & (factor != factor),
    )
    # A NaN ratio makes the largest and the smallest ratio NaN.
    maxima = (tl.where(counted, ratio, float("-inf")), tl.where(counted, -ratio, float("-inf")))
    row_ptr = partials_ptr + tl.program_id(0) * (len(sums) + len(maxima))
    store_sums(row_ptr, sums)
    store_maxima(row_ptr + len(sums), maxima)


@triton.jit(do_not_specialize=["num_rows"])
def policy_loss_gradient_kernel(
    rows, scores, slopes_ptr, bonus_ptr, numbers, choices, num_rows, SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of token losses with respect to log-prob (slopes) and entropy (bonus)."""
    settings = read_settings(numbers, scores.log_probs_ptr.dtype.element_ty)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, live, log_prob = load_log_probs(rows, scores.log_probs_ptr, offs, num_rows)
    terms = row_terms(rows, scores, offs, live, log_prob, settings, choices, SURROGATE)
    factor = tl.load(rows.factor_ptr + offs, mask=live, other=0.0)
    if scores.slope_ptr is None:
        slope = slope_of(terms, factor, settings)
    else:
        index = tl.load(scores.index_ptr + offs, mask=live, other=0)
        slope = tl.where(terms.inside, tl.load(scores.slope_ptr + index, mask=live, other=0.0), 0.0)
        slope += factor * settings.kl_coef * terms.kl_slope
    tl.store(slopes_ptr + offs, tl.where(live, slope, 0.0), mask=offs < num_rows)
    tl.store(bonus_ptr + offs, tl.where(live, -settings.entropy_coef * factor, 0.0), mask=offs < num_rows)


class Prepared(NamedTuple):
    """Arguments both kernels take; with a shared ratio, what a sequence's tokens share is computed."""

    rows: Any
    scores: Scores
    numbers: tuple[float, ...]
    choices: Choices
    options: dict[str, Any]


def _prepare(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    segments: list[Tensor],
    config: PolicyLossConfig,
    want_slope: bool,
) -> Prepared:
    assert rows.advantages is not None and rows.factor is not None
    pointers = row_pointers(rows)
    numbers = settings_of(config, 1.0, 1.0, log_probs.dtype)
    choices = choices_of(config)
    options = {"SURROGATE": SURROGATES[config.surrogate], **LAUNCH}
    scores = Scores(log_probs.contiguous(), None if entropy is None else entropy.contiguous())
    if config.pools:
        offsets, index = segments
        num_sequences = offsets.shape[0] - 1
        spread = want_slope and config.ratio != "sequence_token"
        shared = [log_probs.new_empty(num_sequences) if wanted else None for wanted in (True, spread)]
        scores = Scores(*scores[:2], index.contiguous(), *shared)
        if num_sequences:
            offsets, launch = offsets.contiguous(), options | SEQUENCE_LAUNCH[log_probs.dtype]
            sequence_kernel[(num_sequences,)](pointers, scores, offsets, numbers, choices, **launch)
    return Prepared(pointers, scores, numbers, choices, options)


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    segments: list[Tensor],
    config: PolicyLossConfig,
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """Reduced loss of each token ``[N]``, raw metrics; ``segments``: offsets ``[S + 1]``, index ``[N]``."""
    num_rows = log_probs.shape[0]
    losses = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    partials = log_probs.new_empty(triton.cdiv(num_rows, LAUNCH["BLOCK"]), len(metrics.TOKEN.slots))
    if num_rows:
        made = _prepare(log_probs, entropy, rows, segments, config, want_slope=False)
        policy_loss_kernel[(partials.shape[0],)](
            made.rows, made.scores, losses, partials, made.numbers, made.choices, num_rows, vocab, **made.options
        )
    return losses, combine(partials, metrics.TOKEN)


def policy_loss_gradient(
    log_probs: Tensor, entropy: Tensor | None, rows: Rows, segments: list[Tensor], config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed token losses with respect to ``log_probs`` and entropy, ``[N]`` each."""
    num_rows = log_probs.shape[0]
    slopes, bonus = (torch.empty_like(log_probs, memory_format=torch.contiguous_format) for _ in range(2))
    if num_rows:
        made = _prepare(log_probs, None, rows, segments, config, want_slope=True)
        policy_loss_gradient_kernel[(triton.cdiv(num_rows, LAUNCH["BLOCK"]),)](
            made.rows, made.scores, slopes, bonus, made.numbers, made.choices, num_rows, **made.options
        )
    return slopes, bonus
