"""The policy loss of a token, as pure torch functions of its log-probability (EGPO, arXiv 2602.22751, Eq. 12).

A surrogate is one function here, one device function in `egpo_kernels.triton.surrogates`, and its name in
`egpo_kernels.config.settings`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.settings import SURROGATES as NAMES
from egpo_kernels.config.settings import PolicyLossConfig, Rows
from egpo_kernels.inputs.segments import accumulation_dtype, counts_per_sequence, per_row, segment_index, segment_sum


class SurrogateTerms(NamedTuple):
    """A surrogate's loss per token ``[N]`` and where the ratio fell below / above its bound."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


class TokenTerms(NamedTuple):
    """Everything a token contributes, ``[N]`` each, exactly 0 (False) where a row is not ``live``.

    The loss of a token is ``surrogate + kl_coef * kl_term - entropy_coef * entropy``, times its reduction factor;
    ``kl_term`` is the estimate ``kl``, or that times the ratio.
    """

    live: Tensor
    surrogate: Tensor
    kl: Tensor
    kl_term: Tensor
    entropy: Tensor
    log_ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dead: Tensor
    unscored: Tensor

    def loss(self, factor: Tensor, config: PolicyLossConfig) -> Tensor:
        """Return the reduced loss of each token ``[N]``; its sum is the loss."""
        total = self.surrogate + config.kl_coef * self.kl_term - config.entropy_coef * self.entropy
        return torch.where(self.live, factor * total, 0.0)


def clip(log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> SurrogateTerms:
    """``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``, at most ``-c A`` with dual clip and A < 0.

    PPO (arXiv 1707.06347, Eq. 7); dual clip: arXiv 1912.09729, Eq. 5. EGPO Eq. 12.
    """
    ratio = log_ratio.exp()
    low = (advantages < 0) & (ratio < 1 - config.clip_low)
    high = (advantages > 0) & (ratio > 1 + config.clip_high)
    bounded = torch.where(low, 1 - config.clip_low, torch.where(high, 1 + config.clip_high, ratio))
    if config.dual_clip is not None:
        dual = (advantages < 0) & (ratio > config.dual_clip)
        bounded, high = torch.where(dual, config.dual_clip, bounded), high | dual
    return SurrogateTerms(-bounded * advantages, low, high)


def cispo(log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> SurrogateTerms:
    """``-sg(clip(rho, 1 - clip_low, cap)) A l``, cap ``1 + clip_high`` or ``ratio_cap``: the ratio is only a weight.

    CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4-5). Counted as clipped is, as with `clip`, what the advantage pushes out.
    """
    cap = 1 + config.clip_high if config.ratio_cap is None else config.ratio_cap
    ratio = log_ratio.detach().exp()
    below, above = ratio < 1 - config.clip_low, ratio > cap
    bounded = torch.where(above, cap, torch.where(below, 1 - config.clip_low, ratio))
    return SurrogateTerms(-bounded * advantages * log_probs, below & (advantages < 0), above & (advantages > 0))


def sapo(log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> SurrogateTerms:
    """``-A sigmoid(tau (rho - 1)) 4 / tau``: a gate that closes softly, tau by the sign of A; nothing is clipped.

    SAPO (arXiv 2511.20347).
    """
    tau = torch.where(advantages > 0, torch.full_like(advantages, config.tau_positive), config.tau_negative)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * (4 / tau)
    nowhere = torch.zeros_like(advantages, dtype=torch.bool)
    return SurrogateTerms(-gate * advantages, nowhere, nowhere)


def gmpo(log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> SurrogateTerms:
    """``-rho A`` with rho the geometric mean of a sequence's ratios, each clipped before by `trimmed`.

    GMPO (arXiv 2507.20673).
    """
    nowhere = torch.zeros_like(advantages, dtype=torch.bool)
    return SurrogateTerms(-log_ratio.exp() * advantages, nowhere, nowhere)


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, PolicyLossConfig], SurrogateTerms]] = {
    name: globals()[name] for name in NAMES
}


def trimmed(log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios clipped on the side the advantage pushes to, without gradient there, and where they are.

    GMPO (arXiv 2507.20673): at ``clip_high`` where A > 0, at ``-clip_low`` where A < 0.
    """
    low = (advantages < 0) & (log_ratio < -config.clip_low)
    high = (advantages > 0) & (log_ratio > config.clip_high)
    return torch.where(low, -config.clip_low, torch.where(high, config.clip_high, log_ratio)), low, high


def clamped(values: Tensor, bound: float) -> Tensor:
    """Values clamped to +- bound without gradient where they are; NaN stays NaN, in the gradient too."""
    return torch.where(values.abs() > bound, values.detach().clamp(-bound, bound), values)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, config: PolicyLossConfig) -> Tensor:
    """KL to the reference per token: with ``x = l_ref - l``, k1 ``-x``, k2 ``x^2 / 2``, k3 ``e^x - x - 1``.

    Schulman, "Approximating KL divergence" (2020); x and the estimate carry no gradient where they are clamped.
    """
    x = clamped(ref_log_probs - log_probs, config.max_log_ratio)
    if config.kl == "k1":
        kl = -x
    elif config.kl == "k2":
        kl = x.square() / 2
    else:
        kl = x.exp() - x - 1
    return kl if config.kl_max is None else clamped(kl, config.kl_max)


def token_terms(
    log_probs: Tensor, entropy: Tensor | None, rows: Rows, offsets: Tensor | None, config: PolicyLossConfig
) -> TokenTerms:
    """Return what each row contributes to the loss; differentiable in ``log_probs`` and ``entropy``.

    Only a ratio that sequences share needs ``offsets``.

    Rows outside the mask, and counted tokens whose own logit is -inf (``dead``), are replaced before any arithmetic:
    nothing they hold can reach a value or a gradient.
    """
    assert rows.advantages is not None
    dead = rows.mask & (log_probs == -torch.inf)
    live = rows.mask & ~dead

    def select(values: Tensor) -> Tensor:
        return torch.where(live, values, 0.0)

    zeros = torch.zeros_like(log_probs, requires_grad=False)
    safe, advantages = select(log_probs), select(rows.advantages)
    old = safe.detach() if rows.old_log_probs is None else select(rows.old_log_probs)
    log_ratio, low, high = _log_ratio(clamped(safe - old, config.max_log_ratio), advantages, rows, offsets, config)
    log_ratio = select(log_ratio)
    terms = SURROGATES[config.surrogate](safe, log_ratio, advantages, config)
    loss, unscored = terms.loss, torch.zeros_like(live)
    if rows.rollout_weights is not None:
        unscored = rows.mask & rows.rollout_weights.isnan()
        loss = loss * torch.where(live & ~unscored, rows.rollout_weights, 1.0)
    kl = zeros if rows.ref_log_probs is None else select(kl_estimate(safe, select(rows.ref_log_probs), config))
    kl_term = kl
    if config.kl_times_ratio == "on_policy":
        kl_term = kl * (safe - safe.detach()).exp()
    elif config.kl_times_ratio:
        kl_term = select(kl * log_ratio.exp())
    bonus = zeros if entropy is None else select(entropy)
    low, high = live & (low | terms.clipped_low), live & (high | terms.clipped_high)
    return TokenTerms(live, select(loss), kl, kl_term, bonus, log_ratio, low, high, dead, unscored)


def _log_ratio(
    own: Tensor, advantages: Tensor, rows: Rows, offsets: Tensor | None, config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-ratio a token's loss is made of, and where its own was clipped before it was pooled."""
    low = high = torch.zeros_like(rows.mask)
    if config.trims:
        own, low, high = trimmed(own, advantages, config)
    if not config.pools or offsets is None:
        return own, low, high
    shared = _sequence_mean(own, rows.mask, offsets)
    if config.ratio == "sequence_token":
        # GSPO-token (arXiv 2507.18071): the sequence's value, the token's own gradient.
        shared = shared.detach() + (own - own.detach())
    return shared, low, high


def _sequence_mean(log_ratio: Tensor, mask: Tensor, offsets: Tensor) -> Tensor:
    """GSPO's sequence log-ratio (arXiv 2507.18071, Eq. 7): the mean over counted tokens, shared by all of them."""
    counts = counts_per_sequence(mask, offsets).clamp(min=1).to(log_ratio.dtype)
    index = segment_index(offsets, log_ratio.shape[0])
    # Spread in float64, so that the gradient of 70000 tokens gathers in float64 too.
    mean = (segment_sum(log_ratio, offsets) / counts).to(accumulation_dtype(log_ratio.device))
    return per_row(mean, index).to(log_ratio.dtype)
