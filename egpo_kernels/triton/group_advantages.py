"""Group level of EGPO (arXiv 2602.22751, Eq. 2, 5-13), as `egpo_kernels.formulas.advantages` writes it in torch.

A block of sequences meets all others twice: sums and extremes first, then distances from a mean.
"""

import functools
from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.settings import AdvantageConfig
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.advantages import batch_scale
from egpo_kernels.formulas.rows import Measured
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.triton.arithmetic import divide, square_root
from egpo_kernels.triton.group_metrics import NUM_SLOTS, store_metrics
from egpo_kernels.triton.group_statistics import (
    Pointers,
    Settings,
    gather_groups,
    load_ids,
    load_sequences,
    means,
    meet,
    read_settings,
)
from egpo_kernels.triton.launcher import Launches, lie, reach
from egpo_kernels.triton.metrics import combine, new_partials
from egpo_kernels.triton.row_making import sequence_counts
from egpo_kernels.triton.segments import flags_of, sequence_uncertainty
from egpo_kernels.triton.settings import as_arguments, blocks_of, dense

BLOCK_I, BLOCK_J, OPTIONS = 16, 128, {"num_warps": 8}

# The choices of the group level, each known when the kernel is compiled.
Choices = namedtuple("Choices", "baseline scale weight clamp renorm all_wrong lock_all_wrong singleton")
# Which rules a group falls under; what is not compared has no base advantage.
Rules = namedtuple("Rules", "single unusable collapsed any_correct penalised compared")


@triton.jit
def raw_weights(uncertainty, known, mean_uncertainty, settings):
    """Group mean of H over own H (Eq. 7); 1 without own H, and where the mean is next to nothing."""
    weighed = known & (mean_uncertainty > settings.uncertainty_eps)
    return tl.where(weighed, divide(mean_uncertainty, uncertainty + settings.uncertainty_eps), 1.0)


@triton.jit
def clamped(weights, correct, settings, choices):
    """Correct answers weigh at least 1 and incorrect ones at most 1 (Eq. 8), where the clamp is one-sided."""
    lower, upper = settings.weight_low, settings.weight_high
    if choices.clamp == "asymmetric" or choices.clamp == "positive_only":
        lower = tl.where(correct, 1.0, settings.weight_low)
    if choices.clamp == "asymmetric" or choices.clamp == "negative_only":
        upper = tl.where(correct, settings.weight_high, 1.0)
    if choices.clamp != "none":
        weights = tl.minimum(tl.maximum(weights, lower), upper)
    return weights


@triton.jit
def spread_groups(pointers, ids, group, num_sequences, members, settings, choices, BLOCK_J: tl.constexpr):
    """Second round: squared distances from the group's mean reward; to renormalise, the sum of weights."""
    mean_reward, mean_uncertainty = means(group)
    squares, weights = tl.zeros_like(mean_reward), tl.zeros_like(mean_reward)
    for first in range(0, num_sequences, BLOCK_J):
        others, same, any_same = meet(pointers, ids, first, num_sequences, members, settings, BLOCK_J)
        if any_same:
            distance = others.reward[None, :] - mean_reward[:, None]
            squares += tl.sum(tl.where(same & others.usable[None, :], distance * distance, 0.0), axis=1)
            if choices.renorm != "none":
                known = others.known[None, :]
                weight = raw_weights(others.uncertainty[None, :], known, mean_uncertainty[:, None], settings)
                if choices.renorm == "after":
                    weight = clamped(weight, others.correct[None, :], settings, choices)
                weights += tl.sum(tl.where(same, weight, 0.0), axis=1)
    return squares, weights


@triton.jit
def find_rules(mine, group, settings, choices):
    """Group of one, fewer than two usable rewards, collapsed, else mixed; and who is penalised (Eq. 13)."""
    single, unusable = group.size == 1, (group.size > 1) & (group.usable < 2)
    largest = tl.maximum(tl.maximum(group.high, -group.low), 0.0)
    collapsed = group.high - group.low <= settings.collapsed * largest
    any_correct = group.correct > 0
    penalised, compared = ~any_correct & ~single & ~unusable, mine.usable
    if choices.all_wrong == "negative":
        penalised = penalised & collapsed
    if choices.baseline == "correctness" or choices.baseline == "none":
        penalised = penalised & False
    else:
        if choices.all_wrong == "zero":
            penalised = penalised & False
        compared = compared & ~unusable
        if choices.singleton != "raw":
            compared = compared & ~single
    return Rules(single, unusable, collapsed, any_correct, penalised, compared)


@triton.jit
def relative_rewards(mine, group, squares, settings, choices):
    """Rewards less their group's baseline, over their group's scale (Eq. 2, 10)."""
    mean_reward, _ = means(group)
    base = mine.reward - mean_reward
    freedom = tl.maximum(group.usable - 1, 1).to(base.dtype)
    if choices.baseline == "leave_one_out":
        base = base * divide(group.usable.to(base.dtype), freedom)
    if choices.scale == "group_std":
        base = divide(base, square_root(divide(squares, freedom)) + settings.std_eps)
    elif choices.scale == "group_mean":
        base = tl.where(mean_reward > 0, divide(base, mean_reward + settings.std_eps), 0.0)
    return base


@triton.jit
def unscaled_base(mine, group, rules, squares, settings, choices):
    """Base advantages before what the whole batch has to say: by correctness, raw, or what the group's rule says."""
    if choices.baseline == "correctness":
        return tl.where(mine.correct, settings.positive_scale, 0.0 - settings.negative_scale)
    elif choices.baseline == "none":
        return mine.reward
    else:
        base = relative_rewards(mine, group, squares, settings, choices)
        return tl.where(rules.single, mine.reward, tl.where(rules.collapsed, 0.0, base))


@triton.jit
def base_advantages(pointers, mine, group, rules, squares, settings, choices):
    """Base advantages, scaled by the batch where that is asked for; 0 where there is no comparison."""
    base = unscaled_base(mine, group, rules, squares, settings, choices)
    if pointers.batch_ptr is not None:
        base = (base - tl.load(pointers.batch_ptr)) * tl.load(pointers.batch_ptr + 1)
    base = tl.where(rules.penalised, -settings.nsr_scale, base)
    return tl.where(rules.compared, base, 0.0)


@triton.jit
def final_weights(mine, group, rules, total, settings, choices):
    """Weights (Eq. 7), clamped (Eq. 8) and renormalised (Eq. 9) by their sum ``total`` over the group."""
    if choices.weight == "none":
        return tl.zeros_like(mine.reward) + 1.0
    else:
        _, mean_uncertainty = means(group)
        weights = raw_weights(mine.uncertainty, mine.known, mean_uncertainty, settings)
        size = group.size.to(weights.dtype)
        if choices.renorm == "before":
            weights = tl.where(total > 0, divide(weights * size, total), weights)
        weights = clamped(weights, mine.correct, settings, choices)
        if choices.renorm == "after":
            weights = tl.where(total > 0, divide(weights * size, total), weights)
        if choices.lock_all_wrong:
            weights = tl.where(rules.penalised, 1.0, weights)
        return tl.where(rules.single, 1.0, weights)


@triton.jit(do_not_specialize=["num_sequences", "members", "group_size"])
def group_advantages_kernel(
    pointers, partials_ptr, numbers, choices: tl.constexpr, num_sequences, members, group_size, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Advantages (Eq. 11) of a block of sequences; ``group_size`` 0 stands for any."""
    settings = read_settings(numbers, pointers.rewards_ptr.dtype.element_ty)
    offs = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    ids = load_ids(pointers, offs, num_sequences, members)
    group = gather_groups(pointers, ids, num_sequences, members, settings, BLOCK_J)
    squares, total = spread_groups(pointers, ids, group, num_sequences, members, settings, choices, BLOCK_J)
    # Not before: what the meetings do not need would take registers there.
    mine = load_sequences(pointers, offs, num_sequences, members, settings)
    rules = find_rules(mine, group, settings, choices)
    base = base_advantages(pointers, mine, group, rules, squares, settings, choices)
    weights = final_weights(mine, group, rules, total, settings, choices)
    incomplete = (group_size > 0) & (group.size != group_size)
    advantages = tl.where(incomplete, float("nan"), weights * base)
    tl.store(pointers.advantages_ptr + offs, advantages, mask=mine.valid)
    tl.store(pointers.weights_ptr + offs, weights, mask=mine.valid)
    tl.store(pointers.base_ptr + offs, base, mask=mine.valid)
    if partials_ptr is not None:
        row_ptr = partials_ptr + tl.program_id(0) * NUM_SLOTS
        store_metrics(row_ptr, pointers, mine, group, rules, advantages, weights, incomplete, settings)


@triton.jit(do_not_specialize=["num_sequences", "members"])
def unscaled_base_kernel(
    pointers,
    compared_ptr,
    numbers,
    choices: tl.constexpr,
    num_sequences,
    members,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Base advantages of a block of sequences as the batch's scale is made of them, and where there is one."""
    settings = read_settings(numbers, pointers.rewards_ptr.dtype.element_ty)
    offs = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    ids = load_ids(pointers, offs, num_sequences, members)
    group = gather_groups(pointers, ids, num_sequences, members, settings, BLOCK_J)
    mine = load_sequences(pointers, offs, num_sequences, members, settings)
    rules = find_rules(mine, group, settings, choices)
    base = unscaled_base(mine, group, rules, mine.reward, settings, choices)
    tl.store(pointers.base_ptr + offs, base, mask=mine.valid)
    tl.store(compared_ptr + offs, rules.compared.to(tl.uint8), mask=mine.valid)


@functools.lru_cache(maxsize=256)
def _settings_of(config: AdvantageConfig, tolerance: float, dtype: torch.dtype) -> tuple[float, ...]:
    """The numbers of ``config`` as a kernel argument for `read_settings`."""
    first = (config.correct_threshold, tolerance, config.std_eps, config.nsr_scale, config.uncertainty_eps)
    return as_arguments(Settings(*first, *config.weight_bounds, config.positive_scale, config.negative_scale), dtype)


@functools.lru_cache(maxsize=256)
def _choices_of(config: AdvantageConfig) -> Choices:
    """Choices as a kernel argument, made once for each config."""
    return Choices(*(getattr(config, name) for name in Choices._fields))


def _with_batch_scale(
    launches: Launches,
    pointers: Pointers,
    lengths: Tensor | None,
    members: int,
    numbers: tuple[float, ...],
    choices: Choices,
    config: AdvantageConfig,
) -> Pointers:
    """Fill ``batch_ptr``; only whitening needs to know all base advantages first."""
    rewards, base = pointers.rewards_ptr, pointers.base_ptr
    compared = torch.ones_like(rewards, dtype=torch.bool)
    if lengths is not None:
        count = rewards.shape[0]
        arguments = (pointers, compared, numbers, choices, count, members, BLOCK_I, BLOCK_J)
        launches(unscaled_base_kernel, blocks_of(count, BLOCK_I), arguments, OPTIONS)
    scale = torch.stack(batch_scale(base, compared, rewards, lengths, config))
    return pointers._replace(batch_ptr=scale)


def group_advantages(
    ids: Tensor | None, members: int, rewards: Tensor, correct: Tensor | None, measured: Measured,
    segments: Segments, tolerance: float, config: AdvantageConfig, group_size: int | None, reported: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Advantages, weights, base advantages, uncertainty ``[S]`` and the metrics vector, empty unless ``reported``."""
    count = rewards.shape[0]
    advantages, weights, base = (torch.empty_like(rewards) for _ in range(3))
    partials = new_partials(rewards, blocks_of(count, BLOCK_I), metrics.GROUP)
    uncertainty = counts = None
    inputs = (dense(ids), rewards.contiguous(), dense(correct))
    launches = Launches(
        rewards.device, rewards.dtype, _choices_of(config), lie(inputs), measured.values is None, reach(count), reported
    )
    if count:
        if measured.values is not None:
            uncertainty, counts = sequence_uncertainty(measured, segments, rewards.dtype)
        pointers = Pointers(*inputs, uncertainty, counts, None, advantages, weights, base)
        numbers, choices = _settings_of(config, tolerance, rewards.dtype), _choices_of(config)
        if config.of_batch:
            lengths = None
            if config.scale == "batch_whiten":
                flags = flags_of(measured.mask, measured.tokens)
                lengths = sequence_counts(flags, segments, rewards.device)
            pointers = _with_batch_scale(launches, pointers, lengths, members, numbers, choices, config)
        reported_to = partials if reported else None
        sizes = (count, members, group_size or 0)
        arguments = (pointers, reported_to, numbers, choices, *sizes, BLOCK_I, BLOCK_J)
        launches(group_advantages_kernel, blocks_of(count, BLOCK_I), arguments, OPTIONS)
    if uncertainty is None:
        uncertainty = torch.full_like(rewards, torch.nan)
    vector = combine(launches, partials, metrics.GROUP, None, True) if reported else rewards.new_empty(0)
    return advantages, weights, base, uncertainty, vector
