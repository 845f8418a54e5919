"""Group level of EGPO (arXiv 2602.22751, Eq. 2, 5-13) in torch: uncertainty, weight, base advantage, advantage.

Groups are segments of the sequences sorted by group id, so nothing depends on how many there are or on their order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.settings import AdvantageConfig
from egpo_kernels.formulas import metrics
from egpo_kernels.inputs.segments import accumulation_dtype, counts_per_sequence, segment_sum
from egpo_kernels.inputs.validation import check_held

WHITEN_EPS = 1e-8
"""Added to the variance that a batch is whitened by."""


class Groups(NamedTuple):
    """Sequences ``[S]`` sorted by group: ``order`` sorts, ``number`` is each sequence's group, ``offsets [S+1]``
    bounds the groups in sorted order (empty ones at the end), ``first`` marks one member of each group.
    """

    order: Tensor
    number: Tensor
    offsets: Tensor
    first: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sum ``values [S]`` over each sequence's group, ``[S]``."""
        return segment_sum(values[self.order], self.offsets)[self.number]

    def max(self, values: Tensor) -> Tensor:
        """Largest of ``values [S]`` in each sequence's group, ``[S]``."""
        best = torch.segment_reduce(
            values[self.order], "max", offsets=self.offsets, unsafe=True, initial=metrics.NOTHING
        )
        return best[self.number]


def make_groups(ids: Tensor) -> Groups:
    """Sort sequences by their integer group ids ``[S]``, on the device and without a sync."""
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    running = starts.long().cumsum(0) - 1
    number, first = torch.empty_like(running), torch.empty_like(starts)
    number[order], first[order] = running, starts
    offsets = torch.searchsorted(running, torch.arange(ids.shape[0] + 1, device=ids.device))
    return Groups(order, number, offsets, first)


def sequence_uncertainty(
    values: Tensor | None, mask: Tensor | None, offsets: Tensor, num_sequences: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return H ``[S]`` (Eq. 5/6), NaN where a sequence has none, and counted tokens ``[S]``.

    ``values [N]`` are negated log-probs of the sampled tokens, or entropies; H is their mean over ``mask``, at least 0.
    """
    if values is None or mask is None:
        return like.new_full((num_sequences,), torch.nan), torch.ones_like(like, dtype=torch.long)
    counts = counts_per_sequence(mask, offsets)
    mean = segment_sum(torch.where(mask, values, 0.0), offsets) / counts.to(values.dtype)
    return torch.where(mean.isfinite(), mean.clamp(min=0), torch.nan), counts


class Base(NamedTuple):
    """Base advantages ``[S]`` (Eq. 2, 10, 13) and which rule each sequence's group fell under."""

    advantages: Tensor
    penalised: Tensor
    single: Tensor
    unusable: Tensor
    collapsed: Tensor
    any_correct: Tensor


def collapse_tolerance(dtype: torch.dtype) -> float:
    """Share of the largest reward's size up to which rewards of a group are the same number, rounded differently.

    A few units in the last place of the dtype that they were given in; integers and bools are exact.
    """
    return 4 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def rewards_in(dtype: torch.dtype, rewards: Tensor) -> Tensor:
    """Rewards ``[S]`` to compute with; whole numbers that the dtype does not hold raise, or are NaN on a device."""
    values = rewards.detach().to(dtype)
    if rewards.dtype.is_floating_point or rewards.dtype.itemsize < 4:
        return values
    held = values.to(accumulation_dtype(values.device)) == rewards.to(accumulation_dtype(values.device))
    check_held("rewards", rewards, held)
    return torch.where(held, values, torch.nan)


def is_collapsed(rewards: Tensor, groups: Groups, tolerance: float) -> Tensor:
    """Whether the usable rewards of each sequence's group are as good as equal, ``[S]``; see `collapse_tolerance`."""
    usable = rewards.isfinite()
    high, low = (groups.max(torch.where(usable, sign * rewards, metrics.NOTHING)) for sign in (1, -1))
    largest = groups.max(torch.where(usable, rewards, 0.0).abs())
    return high + low <= tolerance * largest


def base_advantages(
    rewards: Tensor,
    correct: Tensor,
    lengths: Tensor | None,
    groups: Groups,
    tolerance: float,
    config: AdvantageConfig,
) -> Base:
    """Rewards relative to their group; rules in order: group of one, fewer than two usable, collapsed, mixed."""
    usable = rewards.isfinite()
    safe = torch.where(usable, rewards, 0.0)
    size = groups.sum(torch.ones_like(rewards))
    count = groups.sum(usable.to(rewards.dtype))
    collapsed = is_collapsed(rewards, groups, tolerance)
    any_correct = groups.sum((correct & usable).to(rewards.dtype)) > 0
    single, unusable = size == 1, (size > 1) & (count < 2)
    penalised, compared = torch.zeros_like(single), usable
    if config.compares:
        penalised = ~any_correct & ~single & ~unusable & (config.all_wrong != "zero")
        if config.all_wrong != "negative_no_correct":
            penalised = penalised & collapsed
        compared = usable & ~unusable & (~single | (config.singleton == "raw"))
        base = torch.where(single, safe, torch.where(collapsed, 0.0, _relative(safe, usable, count, groups, config)))
    elif config.baseline == "correctness":
        base = torch.where(correct, torch.full_like(safe, config.positive_scale), 0.0 - config.negative_scale)
    else:
        base = safe
    if config.of_batch:
        shift, factor = batch_scale(base, compared, rewards, lengths, config)
        base = (base - shift) * factor
    base = torch.where(penalised, -config.nsr_scale, base)
    return Base(torch.where(compared, base, 0.0), penalised, single, unusable, collapsed, any_correct)


def _relative(safe: Tensor, usable: Tensor, count: Tensor, groups: Groups, config: AdvantageConfig) -> Tensor:
    """Usable rewards less their group's baseline, over their group's scale."""
    mean = groups.sum(safe) / count.clamp(min=1)
    centred = torch.where(usable, safe - mean, 0.0)
    relative = centred
    if config.baseline == "leave_one_out":
        relative = centred * (count / (count - 1).clamp(min=1))
    if config.scale == "group_std":
        return relative / ((groups.sum(centred.square()) / (count - 1).clamp(min=1)).sqrt() + config.std_eps)
    if config.scale == "group_mean":
        return torch.where(mean > 0, relative / (mean + config.std_eps), 0.0)
    return relative


def batch_scale(
    base: Tensor, compared: Tensor, rewards: Tensor, lengths: Tensor | None, config: AdvantageConfig
) -> tuple[Tensor, Tensor]:
    """What is subtracted from base advantages and what they are then multiplied by, 0-d each.

    ``batch_std``: the spread of the batch's usable rewards; ``batch_whiten``: mean and spread of the base advantages
    over the batch's counted tokens, ``lengths [S]`` of them (REINFORCE++, arXiv 2501.03262).
    """
    if lengths is None:
        mean, variance = _moments(rewards, rewards.isfinite().to(rewards.dtype))
        return torch.zeros_like(mean), 1 / (variance.sqrt() + config.std_eps)
    mean, variance = _moments(base, torch.where(compared, lengths, 0).to(base.dtype))
    return mean, (variance + WHITEN_EPS).rsqrt()


def _moments(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample variance of ``values [S]``, each of which occurs ``counts`` times."""
    number = metrics.total(counts)
    mean = metrics.total(torch.where(counts > 0, counts * values, 0.0)) / number.clamp(min=1)
    squares = metrics.total(torch.where(counts > 0, counts * (values - mean).square(), 0.0))
    return mean, squares / (number - 1).clamp(min=1)


def uncertainty_weights(
    uncertainty: Tensor, correct: Tensor, groups: Groups, base: Base, config: AdvantageConfig
) -> Tensor:
    """Return w ``[S]``: group mean of H over own H (Eq. 7), clamped by correctness (Eq. 8), renormalised (Eq. 9)."""
    ones = torch.ones_like(uncertainty)
    if config.weight == "none":
        return ones
    valid = uncertainty.isfinite()
    safe = torch.where(valid, uncertainty, 0.0)
    mean = groups.sum(safe) / groups.sum(valid.to(safe.dtype)).clamp(min=1)
    weighed = valid & (mean > config.uncertainty_eps) & ~base.single
    weights = torch.where(weighed, mean / (safe + config.uncertainty_eps), ones)
    if config.renorm == "before":
        weights = _renormalised(weights, groups)
    if config.clamp != "none":
        low, high = config.weight_bounds
        one_sided_correct = config.clamp in ("asymmetric", "positive_only")
        one_sided_incorrect = config.clamp in ("asymmetric", "negative_only")
        lower = torch.where(correct & one_sided_correct, ones, low)
        upper = torch.where(~correct & one_sided_incorrect, ones, high)
        weights = torch.minimum(torch.maximum(weights, lower), upper)
    if config.renorm == "after":
        weights = _renormalised(weights, groups)
    locked = base.single | base.penalised if config.lock_all_wrong else base.single
    return torch.where(locked, ones, weights)


def _renormalised(weights: Tensor, groups: Groups) -> Tensor:
    total = groups.sum(weights)
    return torch.where(total > 0, weights * groups.sum(torch.ones_like(weights)) / total, weights)


class Advantages(NamedTuple):
    """Per-sequence results ``[S]`` and the raw metrics vector."""

    advantages: Tensor
    weights: Tensor
    base: Tensor
    uncertainty: Tensor
    raw_metrics: Tensor


def group_advantages(
    ids: Tensor,
    rewards: Tensor,
    correct: Tensor | None,
    values: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor,
    tolerance: float,
    config: AdvantageConfig,
    group_size: int | None,
) -> Advantages:
    """Advantages ``A = w * A_base`` (Eq. 11) of whole groups; groups without ``group_size`` members get NaN."""
    groups = make_groups(ids)
    correct = rewards > config.correct_threshold if correct is None else correct
    uncertainty, counts = sequence_uncertainty(values, mask, offsets, ids.shape[0], rewards)
    base = base_advantages(rewards, correct, lengths, groups, tolerance, config)
    weights = uncertainty_weights(uncertainty, correct, groups, base, config)
    incomplete = torch.zeros_like(correct)
    if group_size is not None:
        incomplete = groups.sum(torch.ones_like(rewards)) != group_size
    advantages = torch.where(incomplete, torch.nan, weights * base.advantages)
    raw = _raw_metrics(advantages, weights, uncertainty, counts, rewards, correct, incomplete, base, groups, config)
    return Advantages(advantages, weights, base.advantages, uncertainty, raw)


def _raw_metrics(
    advantages: Tensor,
    weights: Tensor,
    uncertainty: Tensor,
    counts: Tensor,
    rewards: Tensor,
    correct: Tensor,
    incomplete: Tensor,
    base: Base,
    groups: Groups,
    config: AdvantageConfig,
) -> Tensor:
    """Fill the slots of `metrics.GROUP`, in its order."""
    valid, every = uncertainty.isfinite(), torch.ones_like(correct)
    summaries = [metrics.summary(uncertainty, where) for where in (valid, valid & correct, valid & ~correct)]
    summaries += [metrics.summary(weights, where) for where in (every, correct, ~correct)]
    summaries.append(metrics.summary(advantages, every))
    low, high = config.weight_bounds
    rest = ~(base.single | base.unusable)
    flags = (
        weights == low,
        weights == 1,
        weights == high,
        counts == 0,
        ~rewards.isfinite(),
        incomplete & groups.first,
        groups.first,
        base.single & groups.first,
        base.unusable & groups.first,
        rest & base.collapsed & ~base.any_correct & groups.first,
        rest & base.collapsed & base.any_correct & groups.first,
        rest & ~base.collapsed & ~base.any_correct & groups.first,
        rest & ~base.collapsed & base.any_correct & groups.first,
    )
    sums = [part for count, total, _, _ in summaries for part in (count, total)]
    maxima = [part for _, _, high_, low_ in summaries for part in (high_, low_)]
    return torch.stack([*sums, *(flag.sum().to(advantages.dtype) for flag in flags), *maxima])
