"""The policy loss of a token as device functions: value and derivative with respect to its own log-probability.

The formulas are those of `egpo_kernels.surrogates`; a test compares every derivative here with autograd there.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Terms(NamedTuple):
    """What tokens contribute: surrogate loss and slope (rollout weight included), KL and its slope, clip flags.

    ``inside`` says where the token's own log-ratio is not clamped, so that a gradient passes.
    """

    loss: Any
    slope: Any
    kl: Any
    kl_slope: Any
    low: Any
    high: Any
    log_ratio: Any
    inside: Any


@triton.jit
def clip(log_prob, log_ratio, advantage, settings):
    """Clipped surrogate: (loss, d loss / d log_prob, clipped below, clipped above); dual_clip is inf when off."""
    ratio = tl.exp(log_ratio)
    low = (advantage < 0) & (ratio < settings.ratio_low)
    high = (advantage > 0) & (ratio > settings.ratio_high)
    dual = (advantage < 0) & (ratio > settings.dual_clip)
    bounded = tl.where(low, settings.ratio_low, tl.where(high, settings.ratio_high, ratio))
    bounded = tl.where(dual, settings.dual_clip, bounded)
    slope = tl.where(low | high | dual, 0.0, ratio)
    return -bounded * advantage, -slope * advantage, low, high | dual


SURROGATES = {"clip": clip}


@triton.jit
def clamped(values, bound):
    """Values clamped to +- bound, and where they were not; NaN stays NaN (plain minimum and maximum drop it)."""
    inside = ~(tl.abs(values) > bound)
    return tl.where(inside, values, tl.where(values > 0, bound, -bound)), inside


@triton.jit
def kl_estimate(log_prob, ref_log_prob, settings, KL: tl.constexpr):
    """KL to the reference (k1, k2, k3) and its derivative with respect to log_prob."""
    x, inside = clamped(ref_log_prob - log_prob, settings.max_log_ratio)
    if KL == "k1":
        value, slope = -x, x * 0.0 + 1.0
    elif KL == "k2":
        value, slope = x * x * 0.5, -x
    else:
        value, slope = tl.exp(x) - x - 1.0, 1.0 - tl.exp(x)
    return value, tl.where(inside, slope, 0.0)


@triton.jit
def token_log_ratio(rows, offs, live, log_prob, settings):
    """Clamped log-ratio of tokens and where it is not clamped; exactly 0 on-policy (NaN for a NaN log-prob)."""
    if rows.old_log_probs_ptr is None:
        old = log_prob
    else:
        old = tl.load(rows.old_log_probs_ptr + offs, mask=live, other=0.0)
    return clamped(log_prob - old, settings.max_log_ratio)


@triton.jit
def token_terms(rows, offs, live, log_prob, sequence_log_ratio, settings, SURROGATE: tl.constexpr, KL: tl.constexpr):
    """Terms of the tokens ``offs``; nothing is read where not ``live``, and ``log_prob`` must be finite or NaN there.

    ``sequence_log_ratio`` is None, or the ratio's logarithm shared by a sequence; the slope is then that of the
    surrogate at the shared ratio, to be spread over the sequence by the caller.
    """
    log_ratio, inside = token_log_ratio(rows, offs, live, log_prob, settings)
    if sequence_log_ratio is not None:
        log_ratio = sequence_log_ratio
    advantage = tl.load(rows.advantages_ptr + offs, mask=live, other=0.0)
    loss, slope, low, high = SURROGATE(log_prob, log_ratio, advantage, settings)
    if sequence_log_ratio is None:
        slope = tl.where(inside, slope, 0.0)
    if rows.rollout_weights_ptr is not None:
        weight = tl.load(rows.rollout_weights_ptr + offs, mask=live, other=1.0)
        weight = tl.where(weight == weight, weight, 1.0)
        loss, slope = loss * weight, slope * weight
    if rows.ref_log_probs_ptr is None:
        kl, kl_slope = tl.zeros_like(loss), tl.zeros_like(loss)
    else:
        ref = tl.load(rows.ref_log_probs_ptr + offs, mask=live, other=0.0)
        kl, kl_slope = kl_estimate(log_prob, ref, settings, KL)
    return Terms(loss, slope, kl, kl_slope, low, high, log_ratio, inside)


@triton.jit
def slope_of(terms, factor, settings):
    """Derivative of the reduced loss with respect to the log-prob, for a ratio of the token's own."""
    return factor * (terms.slope + settings.kl_coef * terms.kl_slope)
