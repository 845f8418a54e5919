"""The policy loss of a token as device functions: value and derivative with respect to its own log-probability.

The formulas are those of `egpo_kernels.formulas.surrogates`; a test compares every derivative here with autograd there.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egpo_kernels.config.settings import SURROGATES as NAMES
from egpo_kernels.triton.arithmetic import divide, exponential


class Terms(NamedTuple):
    """What tokens contribute: surrogate loss, KL, slopes through the ratio and beside it, clip flags.

    ``slope`` is the derivative through the ratio, weights and KL times ratio included; ``kl`` the KL estimate and
    ``kl_term`` what the loss has of it. ``inside`` says where a gradient passes a token's own log-ratio.
    """

    loss: Any
    slope: Any
    kl: Any
    kl_term: Any
    kl_slope: Any
    low: Any
    high: Any
    log_ratio: Any
    inside: Any


# A surrogate returns (loss, d loss / d log_prob, clipped below, clipped above); the derivative through the ratio is 0
# where its logarithm is not `inside` its bounds.


@triton.jit
def clip(log_prob, log_ratio, inside, advantage, settings):
    """Clipped surrogate of PPO; dual_clip is inf when off."""
    ratio = exponential(log_ratio)
    low = (advantage < 0) & (ratio < settings.ratio_low)
    high = (advantage > 0) & (ratio > settings.ratio_high)
    dual = (advantage < 0) & (ratio > settings.dual_clip)
    bounded = tl.where(low, settings.ratio_low, tl.where(high, settings.ratio_high, ratio))
    bounded = tl.where(dual, settings.dual_clip, bounded)
    slope = tl.where(low | high | dual | ~inside, 0.0, ratio)
    return -bounded * advantage, -slope * advantage, low, high | dual


@triton.jit
def cispo(log_prob, log_ratio, inside, advantage, settings):
    """Bounded ratio as the weight of a log-prob: no derivative through the ratio, so ``inside`` does not matter."""
    ratio = exponential(log_ratio)
    below, above = ratio < settings.ratio_low, ratio > settings.ratio_high
    bounded = tl.where(above, settings.ratio_high, tl.where(below, settings.ratio_low, ratio))
    slope = -bounded * advantage
    return slope * log_prob, slope, below & (advantage < 0), above & (advantage > 0)


@triton.jit
def sapo(log_prob, log_ratio, inside, advantage, settings):
    """Soft gate around a ratio of 1; its derivative has 1 - sigmoid(x) as sigmoid(-x), which loses no digits."""
    ratio = exponential(log_ratio)
    tau = tl.where(advantage > 0, settings.tau_positive, settings.tau_negative)
    shut = divide(1.0, 1.0 + exponential(tau * (ratio - 1.0)))
    open_ = divide(1.0, 1.0 + exponential(-tau * (ratio - 1.0)))
    slope = tl.where(inside, 4.0 * open_ * shut * ratio, 0.0)
    return -open_ * divide(4.0, tau) * advantage, -slope * advantage, inside & False, inside & False


@triton.jit
def gmpo(log_prob, log_ratio, inside, advantage, settings):
    """Geometric mean of a sequence's ratios, trimmed before they are pooled."""
    ratio = exponential(log_ratio)
    slope = tl.where(inside, ratio, 0.0)
    return -ratio * advantage, -slope * advantage, inside & False, inside & False


SURROGATES = {name: globals()[name] for name in NAMES}


@triton.jit
def clamped(values, bound):
    """Values clamped to +- bound, and where they were not; NaN stays NaN (plain minimum and maximum drop it)."""
    inside = ~(tl.abs(values) > bound)
    return tl.where(inside, values, tl.where(values > 0, bound, -bound)), inside


@triton.jit
def kl_estimate(log_prob, ref_log_prob, settings, choices):
    """KL to the reference (k1, k2, k3) and its derivative with respect to log_prob."""
    x, inside = clamped(ref_log_prob - log_prob, settings.max_log_ratio)
    if choices.kl == "k1":
        value, slope = -x, x * 0.0 + 1.0
    elif choices.kl == "k2":
        value, slope = x * x * 0.5, -x
    else:
        ratio = exponential(x)
        value, slope = ratio - x - 1.0, 1.0 - ratio
    value, bounded = clamped(value, settings.kl_max)
    return value, tl.where(inside & bounded, slope, 0.0)


@triton.jit
def token_log_ratio(rows, offs, live, log_prob, advantage, settings, choices):
    """Log-ratio of tokens, where a gradient passes it, and where it is trimmed; 0 on-policy (NaN for a NaN log-prob).

    Trimming (gmpo) is one-sided by the sign of the advantage.
    """
    if rows.old_log_probs_ptr is None:
        old = log_prob
    else:
        old = tl.load(rows.old_log_probs_ptr + offs, mask=live, other=0.0)
    log_ratio, inside = clamped(log_prob - old, settings.max_log_ratio)
    low, high = inside & False, inside & False
    if choices.trims:
        low = (advantage < 0) & (log_ratio < settings.ratio_low)
        high = (advantage > 0) & (log_ratio > settings.ratio_high)
        log_ratio = tl.where(low, settings.ratio_low, tl.where(high, settings.ratio_high, log_ratio))
        inside = inside & ~(low | high)
    return log_ratio, inside, low, high


@triton.jit
def token_terms(
    rows, offs, live, log_prob, shared_log_ratio, settings, choices, SURROGATE: tl.constexpr, SPREAD: tl.constexpr
):
    """Terms of the tokens ``offs``; nothing is read where not ``live``, and ``log_prob`` must be finite or NaN there.

    ``shared_log_ratio`` is None, or the ratio's logarithm shared by a sequence. With ``SPREAD`` the slope is that of
    the surrogate at the shared ratio, to be spread over the sequence by the caller.
    """
    advantage = tl.load(rows.advantages_ptr + offs, mask=live, other=0.0)
    log_ratio, inside, trimmed_low, trimmed_high = token_log_ratio(
        rows, offs, live, log_prob, advantage, settings, choices
    )
    if shared_log_ratio is not None:
        log_ratio = shared_log_ratio
    passes = inside
    if SPREAD:
        passes = inside | True
    loss, slope, low, high = SURROGATE(log_prob, log_ratio, passes, advantage, settings)
    if rows.rollout_weights_ptr is not None:
        weight = tl.load(rows.rollout_weights_ptr + offs, mask=live, other=1.0)
        weight = tl.where(weight == weight, weight, 1.0)
        loss, slope = loss * weight, slope * weight
    if rows.ref_log_probs_ptr is None:
        # Not zeros_like, which Gluon has with a layout only.
        kl = (inside & False).to(loss.dtype)
        kl_term, kl_slope = kl, kl
    else:
        ref = tl.load(rows.ref_log_probs_ptr + offs, mask=live, other=0.0)
        kl, kl_slope = kl_estimate(log_prob, ref, settings, choices)
        kl_term = kl
        if choices.kl_times_ratio == "on_policy":
            kl_slope += kl
        elif choices.kl_times_ratio:
            ratio = exponential(log_ratio)
            kl_term, kl_slope = kl * ratio, kl_slope * ratio
            slope += tl.where(passes, settings.kl_coef * kl_term, 0.0)
    return Terms(loss, slope, kl, kl_term, kl_slope, trimmed_low | low, trimmed_high | high, log_ratio, inside)


@triton.jit
def slope_of(terms, factor, settings):
    """Derivative of the reduced loss with respect to the log-prob, for a ratio with a gradient of the token's own."""
    return factor * (terms.slope + settings.kl_coef * terms.kl_slope)
