"""The policy loss of a token, as pure torch functions of its log-probability (EGPO, arXiv 2602.22751, Eq. 12).

A surrogate is one function here, one device function in `egpo_kernels.triton.surrogates`, and a row in each table.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.reduction import accumulation_dtype, counts_per_sequence, per_row, segment_index, segment_sum
from egpo_kernels.types import PolicyLossConfig, Rows


class SurrogateTerms(NamedTuple):
    """A surrogate's loss per token ``[N]`` and where the ratio fell below / above its bound."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


class TokenTerms(NamedTuple):
    """Everything a token contributes, ``[N]`` each, exactly 0 (False) where a row is not ``live``.

    The loss of a token is ``surrogate + kl_coef * kl - entropy_coef * entropy``, times its reduction factor.
    """

    live: Tensor
    surrogate: Tensor
    kl: Tensor
    entropy: Tensor
    log_ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dead: Tensor
    unscored: Tensor

    def loss(self, factor: Tensor, config: PolicyLossConfig) -> Tensor:
        """Return the reduced loss of each token ``[N]``; its sum is the loss."""
        total = self.surrogate + config.kl_coef * self.kl - config.entropy_coef * self.entropy
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


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, PolicyLossConfig], SurrogateTerms]] = {"clip": clip}


def clamped(values: Tensor, bound: float) -> Tensor:
    """Values clamped to +- bound without gradient where they are; NaN stays NaN, in the gradient too."""
    return torch.where(values.abs() > bound, values.detach().clamp(-bound, bound), values)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, config: PolicyLossConfig) -> Tensor:
    """KL to the reference per token: with ``x = l_ref - l``, k1 ``-x``, k2 ``x^2 / 2``, k3 ``e^x - x - 1``.

    Schulman, "Approximating KL divergence" (2020); x is clamped and carries no gradient where it is.
    """
    x = clamped(ref_log_probs - log_probs, config.max_log_ratio)
    if config.kl == "k1":
        return -x
    if config.kl == "k2":
        return x.square() / 2
    return x.exp() - x - 1


def token_terms(
    log_probs: Tensor, entropy: Tensor | None, rows: Rows, offsets: Tensor | None, config: PolicyLossConfig
) -> TokenTerms:
    """Return what each row contributes to the loss; differentiable in ``log_probs`` and ``entropy``.

    Only a sequence ratio needs ``offsets``.

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
    log_ratio = clamped(safe - old, config.max_log_ratio)
    if config.ratio == "sequence" and offsets is not None:
        log_ratio = select(_sequence_mean(log_ratio, rows.mask, offsets))
    loss, low, high = SURROGATES[config.surrogate](safe, log_ratio, advantages, config)
    unscored = torch.zeros_like(live)
    if rows.rollout_weights is not None:
        unscored = rows.mask & rows.rollout_weights.isnan()
        loss = loss * torch.where(live & ~unscored, rows.rollout_weights, 1.0)
    kl = zeros if rows.ref_log_probs is None else select(kl_estimate(safe, select(rows.ref_log_probs), config))
    bonus = zeros if entropy is None else select(entropy)
    return TokenTerms(live, select(loss), kl, bonus, log_ratio, low & live, high & live, dead, unscored)


def _sequence_mean(log_ratio: Tensor, mask: Tensor, offsets: Tensor) -> Tensor:
    """GSPO's sequence log-ratio (arXiv 2507.18071, Eq. 7): the mean over counted tokens, shared by all of them."""
    counts = counts_per_sequence(mask, offsets).clamp(min=1).to(log_ratio.dtype)
    index = segment_index(offsets, log_ratio.shape[0])
    # Spread in float64, so that the gradient of 70000 tokens gathers in float64 too.
    mean = (segment_sum(log_ratio, offsets) / counts).to(accumulation_dtype(log_ratio.device))
    return per_row(mean, index).to(log_ratio.dtype)
