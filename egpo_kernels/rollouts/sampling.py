"""What to do about a sampler that is not quite the policy: weights on its tokens, and sequences left out."""

from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config.fields import check_number, check_pair, fits_float32
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.inputs.layout import Layout, counted, make_layout
from egpo_kernels.inputs.segments import counts_per_sequence, per_row, segment_sum
from egpo_kernels.inputs.validation import check_choice, check_dense, has_shape

MAX_LOG_RATIO = 20.0
"""Log-ratios to the sampler are clamped to +- this, in nats."""
FAR = 1e4
"""What an infinite log-ratio adds to its sequence's."""


def rollout_weights(
    log_probs: Tensor,
    sampler_log_probs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    level: str = "token",
    outside: str = "clamp",
    bounds: tuple[float, float] = (0.0, 2.0),
) -> Tensor:
    """Importance weights, trainer's policy over sampler, to pass to the losses as ``rollout_weights``.

    Truncated (``clamp``) or masked (``mask``) importance sampling, for inference engines whose log-probs differ from
    the trainer's (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025).

    Args:
        log_probs: The trainer's log-probs of the tokens at sampling time, in nats, ``[S, T]`` or packed ``[N]``.
        sampler_log_probs: The sampler's log-probs, shaped like log_probs; NaN where it gave none.
        mask: Shaped like log_probs, nonzero where a token is in the mask; None: everywhere.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        level: ``token``: one ratio for each token; ``sequence``: the product of a sequence's ratios.
        outside: What happens to ratios outside ``bounds``: ``clamp`` sets them to the nearer bound, ``mask`` to 0.
        bounds: ``(low, high)`` with ``0 <= low <= high``; high may be inf.

    Returns:
        Float32 (float64) weights without gradient: shaped like log_probs, or ``[S]`` for ``sequence``. NaN where the
        sampler gave no log-prob: the losses take it as 1, and a metric counts it. 1 at masked positions, and for
        sequences without a token in the mask.

    Raises:
        ValueError: A wrong shape, device or value.
        TypeError: A wrong type or dtype.
    """
    check_choice("level", level, ("token", "sequence"))
    check_choice("outside", outside, ("clamp", "mask"))
    low, high = _check_bounds(bounds)
    layout, counts, log_ratio = _log_ratio(log_probs, sampler_log_probs, mask, cu_seqlens)
    scored = counts & ~log_ratio.isnan()
    if level == "sequence":
        # Finite, so that a token the policy excludes and one the sampler excludes do not make a NaN of the sum.
        finite = log_ratio.nan_to_num(posinf=FAR, neginf=-FAR)
        log_ratio = segment_sum(torch.where(scored, finite, 0.0), layout.offsets)
        counts, scored = (counts_per_sequence(rows, layout.offsets) > 0 for rows in (counts, scored))
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    within = (weights >= low) & (weights <= high)
    weights = weights.clamp(low, high) if outside == "clamp" else torch.where(within, weights, 0.0)
    weights = layout.poisoned(torch.where(counts, torch.where(scored, weights, torch.nan), 1.0))
    return weights if level == "sequence" else weights.view(layout.shape)


def off_policy_mask(
    log_probs: Tensor,
    sampler_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    threshold: float,
) -> Tensor:
    """Which sequences to keep: those with an advantage of at least 0, and those the policy has not drifted away from.

    The off-policy sequence mask of DeepSeek-V3.2 (arXiv 2512.02556): False for a sequence with a negative advantage
    whose mean of ``sampler_log_probs - log_probs``, over its tokens in the mask, is above the threshold. Multiply it
    into ``rollout_weights`` after ``nan_to_num(1)``: NaN times 0 is NaN, which the losses take as 1.

    Args:
        log_probs: Log-probs of the tokens under the current policy, in nats, ``[S, T]`` or packed ``[N]``.
        sampler_log_probs: Those at sampling time, shaped like log_probs. A NaN in either counts as no drift.
        advantages: ``[S]`` or shaped like log_probs.
        mask: Shaped like log_probs, nonzero where a token is in the mask; None: everywhere.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        threshold: Largest mean drift to keep, in nats per token, at least 0.

    Returns:
        Bool, shaped like advantages.

    Raises:
        ValueError: A wrong shape, device or value.
        TypeError: A wrong type or dtype.
    """
    threshold = check_number("threshold", threshold, low=0.0, high=float("inf")) or 0.0
    layout, counts, log_ratio = _log_ratio(log_probs, sampler_log_probs, mask, cu_seqlens)
    drift = segment_sum(torch.where(counts, -log_ratio, 0.0).nan_to_num(0.0, torch.inf, -torch.inf), layout.offsets)
    near = drift <= threshold * counts_per_sequence(counts, layout.offsets)
    rows, _ = layout.per_token_or_sequence("advantages", advantages, "real", counts)
    kept = (rows >= 0) | per_row(near, layout.sequence)
    if not has_shape(advantages, ((layout.num_sequences,), (layout.num_sequences, 1))):
        return kept.view(layout.shape)
    kept = (advantages >= 0) | near.view(advantages.shape)
    # What comes out may be ambiguous where advantages are not.
    layout.per_token_or_sequence("advantages", kept, "real", counts)
    return kept


def _log_ratio(log_probs: Any, sampler_log_probs: Any, mask: Any, cu_seqlens: Any) -> tuple[Layout, Tensor, Tensor]:
    """Layout, counted rows ``[N]``, and log-ratios ``[N]``, NaN where the sampler scored nothing."""
    check_dense("log_probs", log_probs, "floating")
    layout = make_layout("log_probs", tuple(log_probs.shape), cu_seqlens, log_probs.device)
    sampled = layout.per_token("sampler_log_probs", sampler_log_probs, "floating")
    dtype = compute_dtype(torch.promote_types(log_probs.dtype, sampled.dtype))
    difference = log_probs.detach().reshape(-1).to(dtype) - sampled.detach().to(dtype)
    return layout, counted(mask, None, layout), difference


def _check_bounds(bounds: Any) -> tuple[float, float]:
    wanted = "a pair (low, high) with 0 <= low <= high that float32 holds; high may be inf"
    low, high = check_pair("bounds", bounds, wanted)
    if any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in (low, high)):
        raise TypeError(f"bounds is {shown(bounds)}; it must be {wanted}")
    held = fits_float32(low) and (high == float("inf") or fits_float32(high))
    if not (held and 0 <= low <= high):
        raise ValueError(f"bounds is {shown(bounds)}; it must be {wanted}")
    return float(low), float(high)
