"""The policy loss of a token, as pure torch functions of its log-probability (EGPO, arXiv 2602.22751, Eq. 12).

A surrogate is one function here, one device function in `egpo_kernels.triton.surrogates`, and its name in
`egpo_kernels.config.settings`. Beside a value stands its derivative: `reference` differentiates the value by autograd,
`portable` takes the derivative.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import SURROGATES as NAMES
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas.selection import Standing
from egpo_kernels.inputs.segments import Segments, accumulation_dtype


class SurrogateTerms(NamedTuple):
    """A surrogate's loss per token ``[N]``, its derivative with respect to the token's log-prob, and where the ratio is
    ``clipped``: -1 below its bound, 1 above, else 0.
    """

    loss: Tensor
    slope: Tensor
    clipped: Tensor


class TokenTerms(NamedTuple):
    """Everything a token contributes, ``[N]`` each; what it says of rows that are not live means nothing.

    The loss of a token is ``surrogate + kl_coef * kl_term - entropy_coef * entropy``, times its reduction factor;
    ``kl`` is the estimate, None without reference log-probs, and ``kl_term`` that or that times the ratio. ``slope`` is
    the derivative through the ratio, ``kl_slope`` that of ``kl_term`` beside it; ``inside`` says where a gradient
    passes a token's own log-ratio, None for everywhere.
    """

    surrogate: Tensor
    slope: Tensor
    kl: Tensor | None
    kl_term: Tensor | None
    kl_slope: Tensor | None
    log_ratio: Tensor
    ratio: Tensor
    clipped: Tensor
    inside: Tensor | None

    def loss(self, entropy: Tensor | None, factor: Tensor, config: PolicyLossConfig) -> Tensor:
        """Return the reduced loss of each token ``[N]``; its sum over live rows is the loss."""
        total = self.surrogate
        if self.kl_term is not None:
            total = total + config.kl_coef * self.kl_term
        if entropy is not None:
            total = total - config.entropy_coef * entropy
        return factor * total


# A derivative through the ratio is 0 where the ratio's logarithm is not `inside` its bounds (None: it is everywhere).


def clip(
    log_probs: Tensor, ratio: Tensor, inside: Tensor | None, advantages: Tensor, config: PolicyLossConfig
) -> SurrogateTerms:
    """``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``, at most ``-c A`` with dual clip and A < 0.

    PPO (arXiv 1707.06347, Eq. 7); dual clip: arXiv 1912.09729, Eq. 5. EGPO Eq. 12.
    """
    gain, bounded = ratio * advantages, ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    clipped = pushed_out(ratio, bounded, advantages)
    least = torch.minimum(gain, bounded.mul_(advantages))
    if config.dual_clip is not None:
        # With A > 0 the other bound is 0, below every gain.
        least = torch.maximum(least, config.dual_clip * advantages.clamp(max=0))
        clipped = clipped + pushed_out(ratio, ratio.clamp(max=config.dual_clip), -advantages)
    slope = clipped.abs().sub_(1).mul_(gain.detach())
    return SurrogateTerms(least.neg_(), passed(slope, inside), clipped)


def cispo(
    log_probs: Tensor, ratio: Tensor, inside: Tensor | None, advantages: Tensor, config: PolicyLossConfig
) -> SurrogateTerms:
    """``-sg(clip(rho, 1 - clip_low, cap)) A l``, cap ``1 + clip_high`` or ``ratio_cap``: the ratio is only a weight.

    CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4-5). Counted as clipped is, as with `clip`, what the advantage pushes out.
    With no derivative through the ratio, ``inside`` does not matter.
    """
    cap = 1 + config.clip_high if config.ratio_cap is None else config.ratio_cap
    ratio = ratio.detach()
    bounded = ratio.clamp(1 - config.clip_low, cap)
    slope = -bounded * advantages
    return SurrogateTerms(slope * log_probs, slope, pushed_out(ratio, bounded, advantages))


def sapo(
    log_probs: Tensor, ratio: Tensor, inside: Tensor | None, advantages: Tensor, config: PolicyLossConfig
) -> SurrogateTerms:
    """``-A sigmoid(tau (rho - 1)) 4 / tau``: a gate that closes softly, tau by the sign of A; nothing is clipped.

    SAPO (arXiv 2511.20347). ``1 - sigmoid(x)`` in the derivative is ``sigmoid(-x)``, which loses no digits.
    """
    tau = torch.where(advantages > 0, torch.full_like(advantages, config.tau_positive), config.tau_negative)
    steep = tau * (ratio - 1)
    gate = torch.sigmoid(steep)
    slope = -4 * advantages * gate * torch.sigmoid(-steep) * ratio
    return SurrogateTerms(-gate * (4 / tau) * advantages, passed(slope, inside), torch.zeros_like(advantages))


def gmpo(
    log_probs: Tensor, ratio: Tensor, inside: Tensor | None, advantages: Tensor, config: PolicyLossConfig
) -> SurrogateTerms:
    """``-rho A`` with rho the geometric mean of a sequence's ratios, each clipped before by `trimmed`.

    GMPO (arXiv 2507.20673).
    """
    loss = -ratio * advantages
    return SurrogateTerms(loss, passed(loss, inside), torch.zeros_like(advantages))


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor, PolicyLossConfig], SurrogateTerms]] = {
    name: globals()[name] for name in NAMES
}


def spreads(config: PolicyLossConfig) -> bool:
    """Whether the gradient of a pooled log-ratio goes to every token of its sequence, not to each token's own."""
    return config.pools and config.ratio != "sequence_token"


def passed(slope: Tensor, inside: Tensor | None) -> Tensor:
    """The slope where a gradient passes, else 0, or NaN where the slope is."""
    return slope if inside is None else slope * inside


def pushed_out(values: Tensor, bounded: Tensor, advantages: Tensor) -> Tensor:
    """-1 where values are below the bounds they were clamped to and A < 0, 1 where above and A > 0, else 0."""
    # In numbers: on a CPU a comparison that makes bools takes four times as long as an addition.
    sides, signs = (values.detach() - bounded.detach()).sign_(), advantages.sign()
    return sides.eq_(signs).mul_(signs)


def trimmed(log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """Log-ratios clipped on the side the advantage pushes to, without gradient there, and where they are.

    GMPO (arXiv 2507.20673): at ``clip_high`` where A > 0, at ``-clip_low`` where A < 0.
    """
    bounded = log_ratio.detach().clamp(-config.clip_low, config.clip_high)
    clipped = pushed_out(log_ratio, bounded, advantages)
    return torch.where(clipped != 0, bounded, log_ratio), clipped


def clamped(values: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Values clamped to +- bound without gradient where they are, and where they are not; NaN stays NaN."""
    inside = ~(values.abs() > bound)
    return torch.where(inside, values, values.detach().clamp(-bound, bound)), inside


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """KL to the reference per token, and its derivative: with ``x = l_ref - l``, k1 ``-x``, k2 ``x^2 / 2``, k3
    ``e^x - x - 1``.

    Schulman, "Approximating KL divergence" (2020); x and the estimate carry no gradient where they are clamped.
    """
    x, inside = clamped(ref_log_probs - log_probs, config.max_log_ratio)
    if config.kl == "k1":
        kl, slope = -x, torch.ones_like(x)
    elif config.kl == "k2":
        kl, slope = x.square() / 2, -x
    else:
        ratio = x.exp()
        kl, slope = ratio - x - 1, 1 - ratio
    slope = passed(slope, inside)
    if config.kl_max is not None:
        kl, inside = clamped(kl, config.kl_max)
        slope = passed(slope, inside)
    return kl, slope


def own_log_ratios(log_probs: Tensor, rows: Rows) -> Tensor:
    """``l - l_old`` of each token; on-policy 0, or NaN where the log-prob is not finite."""
    return log_probs - (log_probs.detach() if rows.old_log_probs is None else rows.old_log_probs)


def token_terms(
    log_probs: Tensor, own: Tensor, rows: Rows, found: Standing, segments: Segments, config: PolicyLossConfig
) -> TokenTerms:
    """Return what each row contributes to the loss, from its `own_log_ratios`; differentiable in ``log_probs``.

    Only a ratio that sequences share needs ``segments``. Rows that are not live may hold anything, and so may what is
    returned for them: the caller selects results. Who differentiates by autograd selects inputs.
    """
    assert rows.advantages is not None
    inside = trims = None
    if not found.calm:
        own, inside = clamped(own, config.max_log_ratio)
    if config.trims:
        own, trims = trimmed(own, rows.advantages, config)
        inside = trims == 0 if inside is None else inside & (trims == 0)
    log_ratio = own
    if config.pools:
        log_ratio = _sequence_mean(torch.where(found.live.rows, own, 0.0), rows.mask, segments)
        if not spreads(config):
            # GSPO-token (arXiv 2507.18071): the sequence's value, the token's own gradient.
            log_ratio = log_ratio.detach() + (own - own.detach())
    ratio, passes = log_ratio.exp(), None if spreads(config) else inside
    loss, slope, clipped = SURROGATES[config.surrogate](log_probs, ratio, passes, rows.advantages, config)
    if rows.rollout_weights is not None:
        weights = rows.rollout_weights.nan_to_num(1.0, torch.inf, -torch.inf)
        loss, slope = loss * weights, slope * weights
    kl = kl_term = kl_slope = None
    if rows.ref_log_probs is not None:
        kl, kl_slope = kl_estimate(log_probs, rows.ref_log_probs, config)
        kl_term = kl
        if config.kl_times_ratio == "on_policy":
            kl_term, kl_slope = kl * (log_probs - log_probs.detach()).exp(), kl_slope + kl
        elif config.kl_times_ratio:
            kl_term, kl_slope = kl * ratio, kl_slope * ratio
            slope = slope + passed(config.kl_coef * kl_term, passes)
    clipped = clipped if trims is None else trims
    return TokenTerms(loss, slope, kl, kl_term, kl_slope, log_ratio, ratio, clipped, inside)


def token_slopes(
    terms: TokenTerms, factor: Tensor, rows: Rows, found: Standing, segments: Segments, config: PolicyLossConfig
) -> Tensor:
    """Derivative ``[N]`` of the sum of ``terms.loss(entropy, factor, config)`` over live rows by each log-prob."""
    if not spreads(config):
        # Added up first: with the KL times the ratio they may all but cancel out.
        return factor * (terms.slope if terms.kl_slope is None else terms.slope + config.kl_coef * terms.kl_slope)
    slope = torch.where(found.live.rows, factor * terms.slope, 0.0)
    slope = passed(_sequence_mean(slope, rows.mask, segments), terms.inside)
    return slope if terms.kl_slope is None else slope + config.kl_coef * factor * terms.kl_slope


def _sequence_mean(values: Tensor, mask: Tensor, segments: Segments) -> Tensor:
    """The mean over a sequence's counted tokens, for each of them: GSPO's log-ratio (arXiv 2507.18071, Eq. 7)."""
    counts = segments.counts(mask).clamp(min=1).to(values.dtype)
    # Spread in float64, so that the gradient of 70000 tokens gathers in float64 too.
    mean = (segments.sum(values) / counts).to(accumulation_dtype(values.device))
    return segments.spread(mean).view(values.shape).to(values.dtype)
