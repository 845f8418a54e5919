"""Log-prob level: reduced loss of each token, its gradient, raw metrics (EGPO, arXiv 2602.22751, Eq. 12)."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas import metrics
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.triton.arithmetic import exponential
from egpo_kernels.triton.launcher import Launches, lie, reach
from egpo_kernels.triton.metrics import combine, new_partials, store_maxima, store_sums
from egpo_kernels.triton.segments import sequence_of
from egpo_kernels.triton.sequence_ratio import Scores, factors, load_log_probs, sequence_kernel
from egpo_kernels.triton.settings import (
    Choices,
    blocks_of,
    choices_of,
    dense,
    read_settings,
    row_pointers,
    settings_of,
)
from egpo_kernels.triton.surrogates import SURROGATES, slope_of, token_terms

BLOCK, OPTIONS = 256, {"num_warps": 8}
# Of float64, more lanes a thread spill, and other numbers of warps.
SEQUENCE_LAUNCH = {torch.float32: (1024, OPTIONS), torch.float64: (1024, {"num_warps": 16})}


@triton.jit
def row_terms(
    rows, scores, offs, live, log_prob, num_rows, num_sequences, length, settings, choices, SURROGATE: tl.constexpr
):  # fmt: skip
    """Terms of tokens with their own ratio or the one their sequence shares."""
    shared = None
    if scores.log_ratio_ptr is not None:
        index = sequence_of(scores.offsets_ptr, offs, live, num_rows, num_sequences, length)
        shared = tl.load(scores.log_ratio_ptr + index, mask=live, other=0.0)
    return token_terms(rows, offs, live, log_prob, shared, settings, choices, SURROGATE, False)


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


@triton.jit(do_not_specialize=["num_rows", "vocab", "num_sequences", "length"])
def policy_loss_kernel(
    rows, scores, losses_ptr, partials_ptr, numbers, choices: tl.constexpr, num_rows, vocab, num_sequences, length,
    SURROGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of a block of tokens and its partial metrics."""
    settings = read_settings(numbers, scores.log_probs_ptr.dtype.element_ty)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted, live, log_prob = load_log_probs(rows, scores.log_probs_ptr, offs, num_rows)
    terms = row_terms(rows, scores, offs, live, log_prob, num_rows, num_sequences, length, settings, choices, SURROGATE)
    entropy = tl.zeros_like(log_prob)
    if scores.entropy_ptr is not None:
        entropy = tl.load(scores.entropy_ptr + offs, mask=live, other=0.0)
    factor = tl.load(rows.factor_ptr + offs, mask=counted, other=0.0)
    loss = terms.loss + settings.kl_coef * terms.kl_term - settings.entropy_coef * entropy
    loss = tl.where(live, factor * loss, 0.0)
    if losses_ptr is not None:
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


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "length", "upstream_stride"])
def policy_loss_gradient_kernel(
    rows, scores, upstream_ptr, slopes_ptr, bonus_ptr, numbers, choices: tl.constexpr, num_rows, num_sequences, length,
    upstream_stride, SURROGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of token losses with respect to log-prob (slopes) and entropy (bonus)."""
    settings = read_settings(numbers, scores.log_probs_ptr.dtype.element_ty)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, live, log_prob = load_log_probs(rows, scores.log_probs_ptr, offs, num_rows)
    terms = row_terms(rows, scores, offs, live, log_prob, num_rows, num_sequences, length, settings, choices, SURROGATE)
    factor = factors(rows, upstream_ptr, upstream_stride, offs, live)
    if scores.slope_ptr is None:
        slope = slope_of(terms, factor, settings)
    else:
        index = sequence_of(scores.offsets_ptr, offs, live, num_rows, num_sequences, length)
        slope = tl.where(terms.inside, tl.load(scores.slope_ptr + index, mask=live, other=0.0), 0.0)
        slope += factor * settings.kl_coef * terms.kl_slope
    tl.store(slopes_ptr + offs, tl.where(live, slope, 0.0), mask=offs < num_rows)
    if bonus_ptr is not None:
        tl.store(bonus_ptr + offs, tl.where(live, -settings.entropy_coef * factor, 0.0), mask=offs < num_rows)


class Prepared(NamedTuple):
    """Arguments both kernels take; with a shared ratio, what a sequence's tokens share is computed."""

    launches: Launches
    rows: Any
    scores: Scores
    numbers: tuple[float, ...]
    choices: Choices
    surrogate: Any


class Upstream(NamedTuple):
    """A gradient from upstream, 0-d or ``[N]``, and by how much it goes on from one token to the next."""

    tensor: Tensor
    stride: int


def _prepare(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    segments: Segments,
    config: PolicyLossConfig,
    upstream: Upstream | None,
    *key: Any,
) -> Prepared:
    assert rows.advantages is not None and rows.factor is not None
    pointers, numbers = row_pointers(rows), settings_of(config, 1.0, 1.0, log_probs.dtype)
    choices, surrogate = choices_of(config), SURROGATES[config.surrogate]
    scores = Scores(log_probs.contiguous(), None if entropy is None else entropy.contiguous())
    launches = Launches(
        log_probs.device, log_probs.dtype, config.surrogate, choices, config.ratio, lie(pointers), lie(scores),
        lie((segments.offsets,)), upstream and lie(upstream[:1]),
        reach(log_probs.shape[0], segments.num_sequences, segments.length), *key,
    )  # fmt: skip
    if config.pools:
        count = segments.num_sequences
        spread = upstream is not None and config.ratio != "sequence_token"
        shared = [log_probs.new_empty(count) if wanted else None for wanted in (True, spread)]
        scores = Scores(*scores[:2], dense(segments.offsets), *shared)
        if count:
            given, stride = (None, 0) if upstream is None else upstream
            block, options = SEQUENCE_LAUNCH[log_probs.dtype]
            arguments = (pointers, scores, given, numbers, choices, segments.length, stride, surrogate, block)
            launches(sequence_kernel, count, arguments, options)
    return Prepared(launches, pointers, scores, numbers, choices, surrogate)


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    segments: Segments,
    config: PolicyLossConfig,
    vocab: int,
    per_token: bool,
    reported: bool,
) -> tuple[Tensor, Tensor]:
    """Loss (0-d, or reduced ``per_token [N]``) and the metrics vector, empty unless ``reported``."""
    made = _prepare(log_probs, entropy, rows, segments, config, None, vocab >> 31, per_token, reported)
    return loss_of(made, segments, vocab, per_token, reported)


def loss_of(made: Prepared, segments: Segments, vocab: int, per_token: bool, reported: bool) -> tuple[Tensor, Tensor]:
    """`policy_loss` of what is prepared."""
    num_rows, log_probs = segments.num_rows, made.scores.log_probs_ptr
    losses = torch.empty_like(log_probs) if per_token else None
    loss = None if per_token else log_probs.new_empty(())
    programs = blocks_of(num_rows, BLOCK)
    partials = new_partials(log_probs, programs, metrics.TOKEN)
    launches, pointers, scores, *constants, surrogate = made
    if num_rows:
        sizes = (num_rows, vocab, segments.num_sequences, segments.length)
        arguments = (pointers, scores, losses, partials, *constants, *sizes, surrogate, BLOCK)
        launches(policy_loss_kernel, programs, arguments, OPTIONS)
    if losses is not None and not reported:
        return losses, partials.new_empty(0)
    vector = combine(launches, partials, metrics.TOKEN, loss, reported)
    found = losses if loss is None else loss
    assert found is not None
    return found, vector


def policy_loss_gradient(
    log_probs: Tensor, rows: Rows, segments: Segments, config: PolicyLossConfig, upstream: Tensor, want_bonus: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the token losses times ``upstream`` (0-d or ``[N]``) by log-probs and, if wanted, entropy."""
    num_rows = log_probs.shape[0]
    slopes = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    bonus = torch.empty_like(slopes) if want_bonus else slopes.new_empty(0)
    if num_rows:
        given = Upstream(upstream, upstream.stride(0) if upstream.dim() else 0)
        made = _prepare(log_probs, None, rows, segments, config, given, want_bonus)
        launches, pointers, scores, *constants, surrogate = made
        sizes = (num_rows, segments.num_sequences, segments.length, given.stride)
        results = (slopes, bonus if want_bonus else None)
        arguments = (pointers, scores, upstream, *results, *constants, *sizes, surrogate, BLOCK)
        launches(policy_loss_gradient_kernel, blocks_of(num_rows, BLOCK), arguments, OPTIONS)
    return slopes, bonus
