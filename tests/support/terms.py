"""How large the terms of each result are: what rounding is allowed to do to it (`tests.support.accuracy`).

`terms` of a sum are its summands' sizes. A result of several steps has the terms of every step, carried to the end by
the derivative (first-order error analysis), because a rounding made early is in the result too:

- `l = (z_y - m)/temperature - log s`: both parts are <= 0, so they sum to |l|; and s = 1 + ... is rounded: |l| + 1.
- `Ent`: sum p |log p| (1 + |log p|), each probability being as uncertain as its logarithm; again + 1 for log s.
- A log-ratio: |l| + 1 + |l_old|, nothing on-policy (the ratio is 1 by definition) or where it is clamped.
- Uncertainty H from log-probs of the same logits: mean (|l| + 1), from given ones: H. A weight: itself, times the
  relative uncertainties of the H in it. A base advantage: (|r| + mean |r|) / std, and again through its std.
- The loss: per token, surrogate + KL + entropy bonus, each with its derivative's share of the above; then their sum.
- The gradient: its coefficients' terms, each with its own element of `onehot`, of p (as uncertain as log p and one
  more rounding: 2 + |log p|) and of p (log p + Ent), over the temperature.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

import egpo_kernels as ek
from egpo_kernels.config.results import GroupAdvantages
from egpo_kernels.config.settings import PolicyLossConfig
from tests.support.case import Case


class GroupTerms(NamedTuple):
    """Sizes of the terms of the group-level results, [S] each."""

    uncertainty: Tensor
    weights: Tensor
    advantages: Tensor


def group_terms(case: Case, found: GroupAdvantages) -> GroupTerms:
    """Terms of a float64 case's `group_advantages`."""
    config, numbers = case.recipe.advantage, case.group_numbers.to(case.rewards.device)
    size = 0.0
    if config.statistic == "shannon":
        size = _mean_per_sequence(case, _entropy_terms(case.log_softmax()))
    elif case.old_log_probs is None:
        size = _mean_per_sequence(case, case.log_probs().abs() + 1)
    uncertainty = found.uncertainty.nan_to_num(0.0).abs()
    # A mean over an entropy mask sums fewer terms than `size` does; its own size is then the larger of the two.
    terms = uncertainty + size
    relative = terms / (uncertainty + config.uncertainty_eps)
    base = _base_terms(case)
    for number in numbers.unique():
        own = numbers == number
        if own.sum() > 1:
            # The mean H of the group is as uncertain as its members together.
            relative[own] = relative[own] + terms[own].sum() / (uncertainty[own].sum() + config.uncertainty_eps)
    weights = found.weights * (2 + relative)
    advantages = found.weights * base * (1 + found.base.abs()) + weights * found.base.abs()
    return GroupTerms(terms, weights, advantages)


def _base_terms(case: Case) -> Tensor:
    """Terms [S] of base advantages: a reward's and those of the means and spreads it is set against."""
    config, rewards = case.recipe.advantage, case.rewards
    numbers, usable = case.group_numbers.to(rewards.device), rewards.isfinite()
    terms = torch.where(usable, rewards.abs(), 0.0)
    if config.baseline == "correctness":
        terms = torch.full_like(terms, max(config.positive_scale, config.negative_scale))
    for number in numbers.unique() if config.compares else []:
        own = usable & (numbers == number)
        members = rewards[own]
        if len(members) < 2:
            continue
        size = members.abs().mean()
        terms[own] = members.abs() + size
        if config.baseline == "leave_one_out":
            terms[own] *= len(members) / (len(members) - 1)
        if config.scale == "group_std" and members.std() > 0:
            terms[own] /= members.std() + config.std_eps
        if config.scale == "group_mean" and members.mean() > 0:
            level = members.mean() + config.std_eps
            terms[own] *= (1 + size / level) / level
    if config.scale == "batch_std" and usable.sum() > 1:
        terms = terms / (rewards[usable].std() + config.std_eps)
    if config.scale == "batch_whiten":
        plain = dataclasses.replace(config, scale="none", weight="none", all_wrong="zero")
        base = ek.group_advantages(case.groups, rewards, correct=case.correct, config=plain, backend="reference").base
        sizes = numbers.bincount()[numbers] if len(numbers) else numbers
        usable_sizes = torch.zeros(len(numbers) + 1, dtype=terms.dtype).index_add_(0, numbers, usable.to(terms.dtype))
        compared = usable & (usable_sizes[numbers] > 1)
        compared = usable if not config.compares else compared | (usable & (sizes == 1) & (config.singleton == "raw"))
        counts = torch.where(compared, counts_per_sequence(case), 0.0)
        total = counts.sum().clamp(min=1)
        mean = (counts * base).sum() / total
        variance = (counts * (base - mean).square()).sum() / (total - 1).clamp(min=1)
        terms = (terms + (counts * terms).sum() / total) * (variance + 1e-8).rsqrt()
    return terms


def _mean_per_sequence(case: Case, values: Tensor) -> Tensor:
    sums = torch.zeros_like(case.rewards).index_add_(0, case.index, torch.where(case.counted, values, 0.0))
    return sums / counts_per_sequence(case).clamp(min=1)


def counts_per_sequence(case: Case) -> Tensor:
    """Counted tokens [S], float64."""
    zeros = torch.zeros(case.num_rewards, dtype=torch.float64, device=case.rewards.device)
    return zeros.index_add_(0, case.index, case.counted.double())


def reduction_factors(case: Case) -> Tensor:
    """What the reduction multiplies each row's loss by [N], 0 where it does not count."""
    config, counts = case.recipe.loss, counts_per_sequence(case)
    tokens = float(counts.sum() if case.num_tokens is None else case.num_tokens)
    sequences = float((counts > 0).sum() if case.num_sequences is None else case.num_sequences)
    factor = {
        "token_mean": torch.full_like(counts, 1 / max(tokens, 1)),
        "seq_mean_token_mean": 1 / (max(sequences, 1) * counts.clamp(min=1)),
        "seq_mean_token_sum": torch.full_like(counts, 1 / max(sequences, 1)),
        "seq_mean_token_sum_norm": torch.full_like(counts, 1 / (max(sequences, 1) * (config.norm_length or 1))),
    }.get(config.reduction, torch.ones_like(counts))
    return torch.where(case.counted, factor[case.index], 0.0)


def _entropy_terms(log_softmax: Tensor) -> Tensor:
    surprisal = torch.where(log_softmax == -torch.inf, 0.0, -log_softmax)
    return 1 + (log_softmax.exp() * surprisal * (1 + surprisal)).sum(-1)


def gradient_terms(case: Case, slope: Tensor, bonus: Tensor) -> Tensor:
    """Terms [N, V] of a float64 case's logits gradient, from those of dL/dl and dL/dEnt [N]."""
    log_softmax = case.log_softmax()
    unsure, surprisal = _entropy_terms(log_softmax)[:, None], torch.where(log_softmax.isfinite(), -log_softmax, 0.0)
    own = torch.where(case.counted, case.tokens.reshape(-1), 0)[:, None]
    probabilities = log_softmax.exp()
    entropy = (probabilities * surprisal).sum(-1, keepdim=True)
    mixed = probabilities * ((surprisal + entropy) * (1 + surprisal) + unsure)
    terms = slope[:, None] * (probabilities * (2 + surprisal)).scatter_add(-1, own, torch.ones_like(entropy))
    heat = torch.where(case.counted, case.rows(case.temperature).double(), 1.0)
    return torch.where(case.counted[:, None], (terms + bonus[:, None] * mixed) / heat[:, None], 0.0)


class TokenTerms(NamedTuple):
    """Sizes of the terms of the token-level results: [N], [N, V] for the logits gradient, and by metric."""

    log_probs: Tensor
    entropy: Tensor
    loss: Tensor
    slope: Tensor
    bonus: Tensor
    logits: Tensor
    metrics: dict[str, Tensor]


def _surrogate_terms(
    config: PolicyLossConfig,
    ratio: Tensor,
    unsure: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    unsure_advantages: Tensor,
) -> tuple[Tensor, Tensor]:
    """Terms of a surrogate and of its derivative, [N]; `unsure` are those of the log-ratio."""
    size = advantages.abs() * (1 + unsure) + unsure_advantages
    if config.surrogate == "cispo":
        bounded = ratio.clamp(min=1 - config.clip_low)
        bounded = bounded.clamp(max=1 + config.clip_high if config.ratio_cap is None else config.ratio_cap)
        return bounded * size * log_probs, bounded * size
    if config.surrogate == "sapo":
        tau = torch.where(advantages > 0, config.tau_positive, config.tau_negative)
        gate, steep = torch.sigmoid(tau * (ratio - 1)), tau * (ratio * (1 + unsure) + 1)
        # 1 - sigmoid, from a rounded sigmoid, loses the digits that they share.
        value = gate * (1 + (1 - gate) * steep)
        return 4 / tau * value * size, 4 * ratio * (gate + value) * size
    if config.surrogate == "gmpo":
        return ratio * size, ratio * size
    bounded = torch.where(advantages > 0, ratio.clamp(max=1 + config.clip_high), ratio.clamp(min=1 - config.clip_low))
    if config.dual_clip is not None:
        bounded = torch.where(advantages < 0, bounded.clamp(max=config.dual_clip), bounded)
    return bounded * size, bounded * size


def token_terms(case: Case, advantages: Tensor, advantage_terms: Tensor) -> TokenTerms:
    """Terms of a float64 case's policy loss; `advantages` and `advantage_terms` are [N]."""
    config, counted = case.recipe.loss, case.counted
    factor, limit = reduction_factors(case), config.max_log_ratio
    log_probs, entropy = case.log_probs().abs() + 1, _entropy_terms(case.log_softmax())
    zeros = torch.zeros_like(log_probs)

    def only_counted(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0.0)

    def difference(other: Tensor | None) -> tuple[Tensor, Tensor]:
        """other - l, clamped, and the size of its terms."""
        if other is None:
            return zeros, zeros
        value = only_counted(other.reshape(-1) - case.log_probs())
        size = torch.where(value.abs() < limit, log_probs + other.reshape(-1).abs(), 0.0)
        return value.clamp(-limit, limit), only_counted(size)

    down, unsure = difference(case.old_log_probs)
    log_ratio = -down
    if config.surrogate == "gmpo":
        trimmed = ((advantages < 0) & (log_ratio < -config.clip_low)) | (
            (advantages > 0) & (log_ratio > config.clip_high)
        )
        log_ratio, unsure = (
            log_ratio.clamp(-config.clip_low, config.clip_high).where(trimmed, log_ratio),
            unsure.where(~trimmed, 0.0),
        )
    if config.pools:
        log_ratio, unsure = (_mean_per_sequence(case, value)[case.index] for value in (log_ratio, unsure))
    ratio = log_ratio.exp()
    value, derivative = _surrogate_terms(config, ratio, unsure, log_probs, advantages, advantage_terms)
    weight = zeros + 1 if case.rollout_weights is None else case.rows(case.rollout_weights).nan_to_num(1.0).abs()
    surrogate, through = weight * value, weight * derivative
    x, unsure_x = difference(case.ref_log_probs)
    kl = {"k1": x.abs() + unsure_x, "k2": x.square() / 2 + x.abs() * unsure_x}.get(
        config.kl, x.exp() + x.abs() + 1 + (1 + x.exp()) * unsure_x
    )
    kl_slope = {"k1": zeros + 1, "k2": x.abs() + unsure_x}.get(config.kl, 1 + x.exp() * (1 + unsure_x))
    kl_term = kl
    if config.kl_times_ratio == "on_policy":
        kl_slope = kl_slope + kl
    elif config.kl_times_ratio:
        kl_term, kl_slope = kl * ratio * (1 + unsure), kl_slope * ratio * (1 + unsure)
        through = through + config.kl_coef * kl_term
    parts = [
        only_counted(factor * part)
        for part in (surrogate, config.kl_coef * kl_term, abs(config.entropy_coef) * entropy)
    ]
    slope = only_counted(factor * through)
    if config.pools and config.ratio != "sequence_token":
        slope = _mean_per_sequence(case, slope)[case.index]
    slope = only_counted(slope + factor * config.kl_coef * kl_slope)
    bonus = only_counted(factor * abs(config.entropy_coef))
    loss = parts[0] + parts[1] + parts[2]
    seen = {
        "policy/loss/sum": loss.sum(),
        "policy/loss/surrogate/sum": parts[0].sum(),
        "policy/loss/kl/sum": parts[1].sum(),
        "policy/loss/entropy/sum": parts[2].sum(),
        "policy/ratio/mean": only_counted(ratio * (1 + unsure)).sum() / counted.sum(),
        "policy/ratio/max": only_counted(ratio * (1 + unsure)).max() if len(ratio) else zeros.sum(),
        "policy/ratio/min": only_counted(ratio * (1 + unsure)).max() if len(ratio) else zeros.sum(),
        "policy/approx_kl/mean": only_counted(ratio * (1 + unsure) + 1 + log_ratio.abs() + unsure).sum()
        / counted.sum(),
        "policy/ref_kl/mean": only_counted(kl).sum() / counted.sum(),
        "policy/entropy/mean": only_counted(entropy).sum() / counted.sum(),
    }
    if case.support is not None:
        sizes = case.keeps.sum(-1).double()[case.recorded]
        seen["support/kept/mean"] = sizes.mean() if len(sizes) else zeros.sum()
    return TokenTerms(log_probs, entropy, loss, slope, bonus, gradient_terms(case, slope, bonus), seen)


def group_metric_terms(terms: GroupTerms) -> dict[str, Tensor]:
    """Terms of the group-level metrics: the largest member's for means, extremes and gaps, their sum for a sum."""
    found = {"egpo/advantage/sum": terms.advantages.sum(), "egpo/uncertainty/gap/mean": 2 * terms.uncertainty.max()}
    sizes = {"uncertainty": terms.uncertainty, "weight": terms.weights, "advantage": terms.advantages}
    for name, values in sizes.items():
        for part in ("", "/correct", "/incorrect"):
            found.update({f"egpo/{name}{part}/{kind}": values.max() for kind in ("mean", "min", "max")})
    return found
