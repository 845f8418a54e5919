"""Group level of EGPO (arXiv 2602.22751, Eq. 2, 5-13), as `egpo_kernels.advantages` writes it in torch.

A block of sequences meets all others and adds up those of its groups: no sort, no atomics, ids in any order.
All members of a group add the same numbers in the same order, so they hold bitwise the same statistics.
"""

import functools
from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels import metrics
from egpo_kernels.advantages import COLLAPSED
from egpo_kernels.triton.segments import as_bytes, combine, sequence_uncertainty, store_maxima, store_sums
from egpo_kernels.triton.settings import on_device
from egpo_kernels.types import AdvantageConfig

LAUNCH = {"BLOCK_I": 16, "BLOCK_J": 128, "num_warps": 8}
NUM_SUMMARIES = tl.constexpr(len(metrics.SUMMARIES))
NUM_SUMS = tl.constexpr(len(metrics.GROUP.sums))
NUM_SLOTS = tl.constexpr(len(metrics.GROUP.slots))
NO_SEQUENCE = tl.constexpr(2**31 - 1)
NO_REWARD = tl.constexpr(float("inf"))

# The numbers of the group level, in the order they lie in the settings tensor.
Settings = namedtuple(
    "Settings", "correct_threshold collapsed std_eps nsr_scale uncertainty_eps weight_low weight_high"
)
# The choices of the group level, each known when the kernel is compiled.
Choices = namedtuple("Choices", "scale weight clamp renorm all_wrong lock_all_wrong singleton")
# Sequences [S], in and out; correct_ptr may be None, counts_ptr is None without tokens.
Pointers = namedtuple(
    "Pointers",
    "ids_ptr rewards_ptr correct_ptr uncertainty_ptr counts_ptr advantages_ptr weights_ptr base_ptr",
)
# A block of sequences; reward is 0 where not usable, uncertainty 0 where not known.
Sequences = namedtuple("Sequences", "offs valid ids reward usable correct uncertainty known")
# A group: first member, member counts, sum and extremes of usable rewards, sum of known uncertainties.
Group = namedtuple("Group", "first size usable correct known reward high low uncertainty")
# Which rules a group falls under.
Rules = namedtuple("Rules", "single unusable collapsed any_correct penalised")


@triton.jit
def load_settings(settings_ptr):
    """Read the settings tensor; every program reads the same few bytes, which stay in cache."""
    return Settings(
        tl.load(settings_ptr), tl.load(settings_ptr + 1), tl.load(settings_ptr + 2),
        tl.load(settings_ptr + 3), tl.load(settings_ptr + 4), tl.load(settings_ptr + 5),
        tl.load(settings_ptr + 6),
    )  # fmt: skip


@triton.jit
def load_sequences(pointers, offs, num_sequences, settings):
    """Read a block of sequences; those past the end are not valid, usable, correct or known."""
    valid = offs < num_sequences
    ids = tl.load(pointers.ids_ptr + offs, mask=valid, other=0)
    reward = tl.load(pointers.rewards_ptr + offs, mask=valid, other=float("nan"))
    usable = tl.abs(reward) < float("inf")
    if pointers.correct_ptr is None:
        correct = reward > settings.correct_threshold
    else:
        correct = tl.load(pointers.correct_ptr + offs, mask=valid, other=0) != 0
    uncertainty = tl.load(pointers.uncertainty_ptr + offs, mask=valid, other=float("nan"))
    known = uncertainty == uncertainty
    reward, uncertainty = tl.where(usable, reward, 0.0), tl.where(known, uncertainty, 0.0)
    return Sequences(offs, valid, ids, reward, usable, correct, uncertainty, known)


@triton.jit
def number(flags):
    """How many flags are set in each row."""
    return tl.sum(flags.to(tl.int32), axis=1)


@triton.jit
def meet(pointers, mine, first, num_sequences, settings, BLOCK_J: tl.constexpr):
    """Return sequences from ``first`` on, which pairs ``[mine, others]`` share a group, whether any does."""
    others = load_sequences(pointers, first + tl.arange(0, BLOCK_J), num_sequences, settings)
    same = (mine.ids[:, None] == others.ids[None, :]) & others.valid[None, :]
    return others, same, tl.sum(number(same), axis=0) > 0


@triton.jit
def joined(group, same, others):
    """Return each group with those of ``others`` added that are the ``same`` group."""
    usable = same & others.usable[None, :]
    reward = others.reward[None, :]
    high = tl.max(tl.where(usable, reward, -NO_REWARD), axis=1)
    low = tl.min(tl.where(usable, reward, NO_REWARD), axis=1)
    return Group(
        first=tl.minimum(group.first, tl.min(tl.where(same, others.offs[None, :], NO_SEQUENCE), axis=1)),
        size=group.size + number(same),
        usable=group.usable + number(usable),
        correct=group.correct + number(usable & others.correct[None, :]),
        known=group.known + number(same & others.known[None, :]),
        reward=group.reward + tl.sum(tl.where(usable, reward, 0.0), axis=1),
        high=tl.maximum(group.high, high),
        low=tl.minimum(group.low, low),
        uncertainty=group.uncertainty + tl.sum(tl.where(same, others.uncertainty[None, :], 0.0), axis=1),
    )


@triton.jit
def gather_groups(pointers, mine, num_sequences, settings, BLOCK_J: tl.constexpr):
    """First round of meetings: everything that needs no mean."""
    none, zero = tl.zeros_like(mine.offs), tl.zeros_like(mine.reward)
    group = Group(none + NO_SEQUENCE, none, none, none, none, zero, zero - NO_REWARD, zero + NO_REWARD, zero)
    for first in range(0, num_sequences, BLOCK_J):
        others, same, any_same = meet(pointers, mine, first, num_sequences, settings, BLOCK_J)
        # Most blocks hold no sequence of these groups; adding nothing would change no bit.
        if any_same:
            group = joined(group, same, others)
    return group


@triton.jit
def means(group):
    """Mean reward and mean uncertainty of each group."""
    reward = group.reward / tl.maximum(group.usable, 1).to(group.reward.dtype)
    return reward, group.uncertainty / tl.maximum(group.known, 1).to(group.reward.dtype)


@triton.jit
def raw_weights(uncertainty, known, mean_uncertainty, settings):
    """Group mean of H over own H (Eq. 7); 1 without own H, and where the mean is next to nothing."""
    weighed = known & (mean_uncertainty > settings.uncertainty_eps)
    return tl.where(weighed, mean_uncertainty / (uncertainty + settings.uncertainty_eps), 1.0)


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
def spread_groups(pointers, mine, group, num_sequences, settings, choices, BLOCK_J: tl.constexpr):
    """Second round: squared distances from the group's mean reward; to renormalise, the sum of weights."""
    mean_reward, mean_uncertainty = means(group)
    squares, weights = tl.zeros_like(mean_reward), tl.zeros_like(mean_reward)
    for first in range(0, num_sequences, BLOCK_J):
        others, same, any_same = meet(pointers, mine, first, num_sequences, settings, BLOCK_J)
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
def find_rules(group, settings, choices):
    """Group of one, fewer than two usable rewards, collapsed, else mixed; and who is penalised (Eq. 13)."""
    single, unusable = group.size == 1, (group.size > 1) & (group.usable < 2)
    largest = tl.maximum(tl.maximum(group.high, -group.low), 1.0)
    collapsed = group.high - group.low <= settings.collapsed * largest
    any_correct = group.correct > 0
    penalised = ~any_correct & ~single & ~unusable
    if choices.all_wrong == "negative":
        penalised = penalised & collapsed
    elif choices.all_wrong == "zero":
        penalised = penalised & False
    return Rules(single, unusable, collapsed, any_correct, penalised)


@triton.jit
def base_advantages(mine, group, rules, squares, settings, choices):
    """Reward relative to its group (Eq. 2, 10), or what the group's rule says."""
    mean_reward, _ = means(group)
    base = mine.reward - mean_reward
    if choices.scale == "group_std":
        freedom = tl.maximum(group.usable - 1, 1).to(base.dtype)
        base = base / (tl.sqrt(squares / freedom) + settings.std_eps)
    base = tl.where(rules.collapsed | rules.unusable, 0.0, base)
    base = tl.where(rules.penalised, -settings.nsr_scale, base)
    base = tl.where(rules.single, mine.reward if choices.singleton == "raw" else 0.0, base)
    return tl.where(mine.usable, base, 0.0)


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
            weights = tl.where(total > 0, weights * size / total, weights)
        weights = clamped(weights, mine.correct, settings, choices)
        if choices.renorm == "after":
            weights = tl.where(total > 0, weights * size / total, weights)
        if choices.lock_all_wrong:
            weights = tl.where(rules.penalised, 1.0, weights)
        return tl.where(rules.single, 1.0, weights)


@triton.jit
def store_summary(row_ptr, SUMMARY: tl.constexpr, values, where):
    """Count, sum, maximum and maximum of the negated ``values``: the slots of one of `metrics.SUMMARIES`."""
    store_sums(row_ptr + 2 * SUMMARY, (where, tl.where(where, values, 0.0)))
    high, low = tl.where(where, values, float("-inf")), tl.where(where, -values, float("-inf"))
    store_maxima(row_ptr + NUM_SUMS + 2 * SUMMARY, (high, low))


@triton.jit
def store_metrics(row_ptr, pointers, mine, group, rules, advantages, weights, incomplete, settings):
    """The slots of `egpo_kernels.metrics.GROUP`, in its order."""
    valid, right, wrong = mine.valid, mine.valid & mine.correct, mine.valid & ~mine.correct
    store_summary(row_ptr, 0, mine.uncertainty, mine.known)
    store_summary(row_ptr, 1, mine.uncertainty, mine.known & right)
    store_summary(row_ptr, 2, mine.uncertainty, mine.known & wrong)
    store_summary(row_ptr, 3, weights, valid)
    store_summary(row_ptr, 4, weights, right)
    store_summary(row_ptr, 5, weights, wrong)
    store_summary(row_ptr, 6, advantages, valid)
    if pointers.counts_ptr is None:
        empty = valid & False
    else:
        empty = tl.load(pointers.counts_ptr + mine.offs, mask=valid, other=1) == 0
    first = valid & (group.first == mine.offs)
    rest = first & ~(rules.single | rules.unusable)
    collapsed, solved = rules.collapsed, rules.any_correct
    flags = (
        valid & (weights == settings.weight_low), valid & (weights == 1),
        valid & (weights == settings.weight_high), empty, valid & ~mine.usable,
        first & incomplete, first, first & rules.single, first & rules.unusable,
        rest & collapsed & ~solved, rest & collapsed & solved,
        rest & ~collapsed & ~solved, rest & ~collapsed & solved,
    )  # fmt: skip
    store_sums(row_ptr + 2 * NUM_SUMMARIES, flags)


@triton.jit(do_not_specialize=["num_sequences", "group_size"])
def group_advantages_kernel(
    pointers, partials_ptr, settings_ptr, choices, num_sequences, group_size, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Advantages (Eq. 11) of a block of sequences; ``group_size`` 0 stands for any."""
    settings = load_settings(settings_ptr)
    offs = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mine = load_sequences(pointers, offs, num_sequences, settings)
    group = gather_groups(pointers, mine, num_sequences, settings, BLOCK_J)
    squares, total = spread_groups(pointers, mine, group, num_sequences, settings, choices, BLOCK_J)
    rules = find_rules(group, settings, choices)
    base = base_advantages(mine, group, rules, squares, settings, choices)
    weights = final_weights(mine, group, rules, total, settings, choices)
    incomplete = (group_size > 0) & (group.size != group_size)
    advantages = tl.where(incomplete, float("nan"), weights * base)
    tl.store(pointers.advantages_ptr + offs, advantages, mask=mine.valid)
    tl.store(pointers.weights_ptr + offs, weights, mask=mine.valid)
    tl.store(pointers.base_ptr + offs, base, mask=mine.valid)
    row_ptr = partials_ptr + tl.program_id(0) * NUM_SLOTS
    store_metrics(row_ptr, pointers, mine, group, rules, advantages, weights, incomplete, settings)


@functools.lru_cache(maxsize=256)
def _settings_tensor(config: AdvantageConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put the numbers of ``config`` on ``device``, once for each set of values."""
    numbers = (config.correct_threshold, COLLAPSED, config.std_eps, config.nsr_scale, config.uncertainty_eps)
    values = Settings(*numbers, *config.weight_bounds)
    return on_device(values, dtype, device)


def group_advantages(
    ids: Tensor, rewards: Tensor, correct: Tensor | None, values: Tensor | None, mask: Tensor | None,
    offsets: Tensor, config: AdvantageConfig, group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Advantages, weights, base advantages, uncertainty ``[S]`` and raw metrics of whole groups."""
    advantages, weights, base = (torch.empty_like(rewards) for _ in range(3))
    uncertainty, counts = torch.full_like(rewards, torch.nan), None
    partials = rewards.new_empty(triton.cdiv(ids.shape[0], LAUNCH["BLOCK_I"]), len(metrics.GROUP.slots))
    if ids.shape[0]:
        if values is not None and mask is not None:
            uncertainty, counts = sequence_uncertainty(values, mask, offsets)
        inputs = (ids.contiguous(), rewards.contiguous(), as_bytes(correct), uncertainty, counts)
        pointers = Pointers(*inputs, advantages, weights, base)
        settings = _settings_tensor(config, rewards.dtype, rewards.device)
        choices = Choices(*(tl.constexpr(getattr(config, name)) for name in Choices._fields))
        group_advantages_kernel[(partials.shape[0],)](
            pointers, partials, settings, choices, ids.shape[0], group_size or 0, **LAUNCH
        )
    return advantages, weights, base, uncertainty, combine(partials, metrics.GROUP)
