"""Group level of EGPO (arXiv 2602.22751, Eq. 2, 5-13) in torch: uncertainty, weight, base advantage, advantage.

Computed in float64 where the device has it, on sequences ``[S]`` that lie group by group and on groups ``[P]``; nothing
depends on how many there are or on their order. A condition that is None holds everywhere. The formulas take tensors or
numpy's arrays, see `arrays`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.settings import AdvantageConfig
from egpo_kernels.formulas import group_metrics, metrics
from egpo_kernels.formulas.arrays import Array, at_hand, clamp, floating, isfinite, maximum, total, where
from egpo_kernels.formulas.groups import Groups, Known, Rules, both, chosen, groups_at_hand, known, make_groups
from egpo_kernels.formulas.uncertainty import as_uncertainty, token_sums, token_sums_at_hand
from egpo_kernels.inputs.segments import accumulation_dtype
from egpo_kernels.inputs.validation import check_held

WHITEN_EPS = 1e-8
"""Added to the variance that a batch is whitened by."""


def collapse_tolerance(dtype: torch.dtype) -> float:
    """Share of the largest reward's size up to which rewards of a group are the same number, rounded differently.

    A few units in the last place of the dtype that they were given in; integers and bools are exact.
    """
    return 4 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def rewards_in(dtype: torch.dtype, rewards: Tensor) -> Tensor:
    """Rewards ``[S]`` to compute with; whole numbers that the dtype does not hold raise, or are NaN on a device."""
    values = rewards.detach() if rewards.requires_grad else rewards
    if rewards.dtype == dtype:
        return values
    values = values.to(dtype)
    if rewards.dtype.is_floating_point or rewards.dtype.itemsize < 4:
        return values
    held = values.to(accumulation_dtype(values.device)) == rewards.to(accumulation_dtype(values.device))
    check_held("rewards", rewards, held)
    return torch.where(held, values, torch.nan)


def is_collapsed(rewards: Tensor, groups: Groups, tolerance: float) -> Tensor:
    """Whether the usable rewards of each sequence's group are as good as equal, ``[S]``; see `collapse_tolerance`."""
    rewards = groups.sort(rewards)
    return groups.restore(groups.spread(_collapsed(rewards, rewards.isfinite(), groups, tolerance)))


def _collapsed(rewards: Array, usable: Array | None, groups: Groups, tolerance: float) -> Array:
    """As `is_collapsed`, for groups ``[P]`` of sorted rewards; one without usable rewards is."""
    high, low = groups.high(chosen(usable, rewards, -math.inf)), groups.low(chosen(usable, rewards, math.inf))
    return high <= low if tolerance == 0 else high - low <= tolerance * maximum(high, -low)


def find_rules(rewards: Known, correct: Array, groups: Groups, tolerance: float, config: AdvantageConfig) -> Rules:
    """Rules in order: group of one, fewer than two usable, collapsed, mixed; and which groups are penalised."""
    enough = rewards.others > 0 if groups.alone or rewards.finite is not None else None
    correct = correct if rewards.finite is None else correct & rewards.finite
    unsolved = groups.sum(floating(correct, groups.sizes)) == 0
    collapsed = _collapsed(rewards.values, rewards.finite, groups, tolerance)
    penalised = None
    if config.compares and config.all_wrong != "zero":
        penalised = unsolved if enough is None else unsolved & enough
        if config.all_wrong != "negative_no_correct":
            penalised = penalised & collapsed
    return Rules(enough, collapsed, unsolved, penalised)


def base_advantages(
    rewards: Known, correct: Array, lengths: Array | None, groups: Groups, rules: Rules | None, config: AdvantageConfig
) -> Array:
    """Base advantages ``[S]`` (Eq. 2, 10, 13): rewards relative to their group, 0 where nothing can be compared."""
    compared = rewards.finite
    if config.compares:
        assert rules is not None
        base = where(groups.spread(rules.collapsed), 0.0, _relative(rewards, groups, config))
        comparable = rules.enough
        if config.singleton == "raw" and groups.alone:
            single = groups.sizes == 1
            base = where(groups.spread(single), rewards.values, base)
            comparable = None if comparable is None else comparable | single
        compared = compared if comparable is None else both(compared, groups.spread(comparable))
    elif config.baseline == "correctness":
        nothing = rewards.values * 0
        base = where(correct, nothing + config.positive_scale, nothing - config.negative_scale)
    else:
        base = rewards.values + 0  # another array, lest a result be an argument
    if config.of_batch:
        raw, everywhere = chosen(rewards.finite, rewards.values, math.nan), correct | ~correct
        shift, factor = batch_scale(base, everywhere if compared is None else compared, raw, lengths, config)
        base = (base - shift) * factor
    if rules is not None and rules.penalised is not None:
        base = where(groups.spread(rules.penalised), -config.nsr_scale, base)
    return chosen(compared, base, 0.0)


def _relative(rewards: Known, groups: Groups, config: AdvantageConfig) -> Array:
    """Usable rewards less their group's baseline, over their group's scale; where none compare any number or NaN."""
    centred = chosen(rewards.finite, rewards.values - groups.spread(rewards.mean), 0.0)
    relative = centred
    if config.baseline == "leave_one_out":
        relative = centred * groups.spread(rewards.number / rewards.others)
    if config.scale == "group_std":
        spread = (groups.sum(centred * centred) / rewards.others) ** 0.5
        return relative / groups.spread(spread + config.std_eps)
    if config.scale == "group_mean":
        relative = relative / groups.spread(rewards.mean + config.std_eps)
        return where(groups.spread(rewards.mean > 0), relative, 0.0)
    return relative


def batch_scale(
    base: Array, compared: Array, rewards: Array, lengths: Array | None, config: AdvantageConfig
) -> tuple[Array, Array]:
    """What is subtracted from base advantages and what they are then multiplied by, 0-d each.

    ``batch_std``: the spread of the batch's usable rewards; ``batch_whiten``: mean and spread of the base advantages
    over the batch's counted tokens, ``lengths [S]`` of them (REINFORCE++, arXiv 2501.03262).
    """
    if lengths is None:
        mean, variance = _moments(rewards, floating(isfinite(rewards), rewards))
        return mean * 0, 1 / (variance**0.5 + config.std_eps)
    mean, variance = _moments(base, floating(where(compared, lengths, 0), base))
    return mean, (variance + WHITEN_EPS) ** -0.5


def _moments(values: Array, counts: Array) -> tuple[Array, Array]:
    """Mean and sample variance of ``values [S]``, each of which occurs ``counts`` times."""
    number = total(counts)
    mean = total(where(counts > 0, counts * values, 0.0)) / number.clip(1)
    squares = total(where(counts > 0, counts * (values - mean) ** 2, 0.0))
    return mean, squares / (number - 1).clip(1)


def uncertainty_weights(
    uncertainty: Known, correct: Array, penalised: Array | None, groups: Groups, config: AdvantageConfig
) -> Array:
    """Return w ``[S]``: group mean of H over own H (Eq. 7), clamped by correctness (Eq. 8), renormalised (Eq. 9).

    It is 1 in a group of one: there it starts at 1, which no clamp moves, and is its own mean.
    """
    mean = groups.spread(uncertainty.mean)
    weighed = both(uncertainty.finite, mean > config.uncertainty_eps)
    if groups.alone:
        weighed = both(weighed, groups.spread(groups.others > 0))
    weights = chosen(weighed, mean / (uncertainty.values + config.uncertainty_eps), 1.0)
    if config.renorm == "before":
        weights = _renormalised(weights, groups)
    low, high = config.weight_bounds
    if config.clamp == "symmetric":
        weights = clamp(weights, low, high)
    elif config.clamp != "none":
        of_correct = clamp(weights, low if config.clamp == "negative_only" else 1.0, high)
        of_incorrect = clamp(weights, low, high if config.clamp == "positive_only" else 1.0)
        weights = where(correct, of_correct, of_incorrect)
    if config.renorm == "after":
        weights = _renormalised(weights, groups)
    if config.lock_all_wrong and penalised is not None:
        weights = where(groups.spread(penalised), 1.0, weights)
    return weights


def _renormalised(weights: Array, groups: Groups) -> Array:
    total = groups.sum(weights)
    return where(groups.spread(total > 0), weights * groups.spread(groups.sizes / total), weights)


class Advantages(NamedTuple):
    """Per-sequence results ``[S]`` and the reported vector of `metrics.GROUP`, ``[0]`` where it is not wanted."""

    advantages: Tensor
    weights: Tensor
    base: Tensor
    uncertainty: Tensor
    vector: Tensor


def group_advantages(
    ids: Tensor,
    rewards: Tensor,
    correct: Tensor | None,
    values: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    tolerance: float,
    config: AdvantageConfig,
    group_size: int | None,
    reported: bool,
    look: bool = True,
    negated: bool = False,
) -> Advantages:
    """Advantages ``A = w * A_base`` (Eq. 11) of whole groups; groups without ``group_size`` members get NaN.

    Args:
        ids: Group of each sequence, ``[S]`` int64.
        rewards: ``[S]`` float32 or float64, from `rewards_in`; the results' dtype.
        correct: ``[S]`` bool; None: rewards above ``config.correct_threshold``.
        values: What the uncertainty is the mean of, see `token_sums`, ``[N]`` or, without offsets, ``[S, T]``; None: no
            uncertainty.
        mask: Which of ``values`` count, bool of their shape; None, without offsets only: all of them.
        lengths: Counted tokens ``[S]``, for ``scale="batch_whiten"``.
        offsets: ``[S + 1]``; None: each row of ``values`` is a sequence.
        tolerance: See `collapse_tolerance`.
        config: Settings.
        group_size: Members that every group must have; None: any.
        reported: Whether the metrics vector is wanted.
        look: Whether to compute in numpy's arrays on a CPU, which is faster for few sequences.
        negated: Whether ``values`` are log-probs, the uncertainty their mean negated.
    """
    if not look or ids.shape[0] == 0 or not (at_hand(ids) and at_hand(rewards)):
        totals, counts = (None, None) if values is None else token_sums(values, mask, offsets)
        given = (rewards, correct, totals, counts, lengths)
        found, raw = _of_groups(make_groups(ids), given, negated, tolerance, config, group_size, reported)
        return Advantages(*found, rewards.new_empty(0) if raw is None else metrics.finish(raw, metrics.GROUP))
    # Some of the numbers that are chosen from are made of nothing; torch does not mention that either.
    with np.errstate(all="ignore"):
        totals, counts = (None, None) if values is None else token_sums_at_hand(values, mask, offsets)
        of_correct, of_lengths = (None if it is None else it.numpy() for it in (correct, lengths))
        arrays = (rewards.numpy(), of_correct, totals, counts, of_lengths)
        found, raw = _of_groups(groups_at_hand(ids.numpy()), arrays, negated, tolerance, config, group_size, reported)
        reports = np.empty(0, found[0].dtype) if raw is None else metrics.finish_array(raw, metrics.GROUP)
    advantages, weights, base, uncertainty = (torch.from_numpy(it) for it in found)
    return Advantages(advantages, weights, base, uncertainty, torch.from_numpy(reports))


def _of_groups(
    groups: Groups,
    given: tuple[Array | None, ...],
    negated: bool,
    tolerance: float,
    config: AdvantageConfig,
    group_size: int | None,
    reported: bool,
) -> tuple[tuple[Array, Array, Array, Array], Array | None]:
    """Advantages, weights, base advantages, uncertainty, and the raw vector of metrics if it is wanted.

    ``given [S]``, all in tensors or all in arrays: rewards, correct, sum over the counted tokens, their number, counted
    tokens for whitening; each but the first may be None. Uncertainty is the mean of the tokens, or that ``negated``.
    """
    rewards, correct, totals, counts, lengths = given
    assert rewards is not None
    correct = groups.sort(rewards > config.correct_threshold if correct is None else correct)
    usable = known(groups.sort(rewards), groups)
    rules = find_rules(usable, correct, groups, tolerance, config) if config.compares or reported else None
    lengths = None if lengths is None else groups.sort(lengths)
    base = base_advantages(usable, correct, lengths, groups, rules, config)
    own = None
    if totals is not None:
        own = as_uncertainty(groups.sort((-totals if negated else totals) / counts))
    if own is None or config.weight == "none":
        weights = base * 0 + 1
    else:
        penalised = None if rules is None else rules.penalised
        weights = uncertainty_weights(known(own, groups), correct, penalised, groups, config)
    weights, base = floating(weights, rewards), floating(base, rewards)
    advantages = weights * base
    incomplete = None if group_size is None else groups.sizes != group_size
    if incomplete is not None:
        advantages = where(groups.spread(incomplete), math.nan, advantages)
    own = weights * math.nan if own is None else own
    results = [floating(it, rewards) for it in (advantages, weights, base, own)]
    raw = None
    if reported:
        assert rules is not None
        raw = group_metrics.raw(results, correct, counts, usable, rules, incomplete, groups, config.weight_bounds)
    advantages, weights, base, own = (groups.restore(it) for it in results)
    return (advantages, weights, base, own), raw
