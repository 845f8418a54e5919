"""Group level of EGPO (arXiv 2602.22751, Eq. 2, 5-13), as `egpo_kernels.advantages` writes it in torch.

A block of sequences meets every other sequence and adds up those of its own group: no sort, no atomics, any ids in any
order. Every member of a group adds the same numbers in the same order, so that all hold bitwise the same statistics.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels import metrics
from egpo_kernels.advantages import COLLAPSED
from egpo_kernels.triton.segments import SEGMENT_BLOCK, as_bytes, combine, segment_total, store_partials
from egpo_kernels.types import AdvantageConfig

BLOCK_I = 32
BLOCK_J = 128


class Settings(NamedTuple):
    """The numbers of the group level, in the order they lie in the settings tensor."""

    correct_threshold: Any
    collapsed: Any
    std_eps: Any
    nsr_scale: Any
    uncertainty_eps: Any
    weight_low: Any
    weight_high: Any


class Options(NamedTuple):
    """The choices of the group level, known when a kernel is compiled."""

    scale: Any
    weight: Any
    clamp: Any
    renorm: Any
    all_wrong: Any
    lock_all_wrong: Any
    singleton: Any


class Pointers(NamedTuple):
    """Sequences ``[S]``, in and out; ``correct_ptr`` may be None, ``counts_ptr`` None where no tokens were given."""

    ids_ptr: Any
    rewards_ptr: Any
    correct_ptr: Any
    uncertainty_ptr: Any
    counts_ptr: Any
    advantages_ptr: Any
    weights_ptr: Any
    base_ptr: Any


class Sequences(NamedTuple):
    """A block of sequences; ``reward`` is 0 where not ``usable``, ``uncertainty`` 0 where not ``known``."""

    offs: Any
    valid: Any
    ids: Any
    reward: Any
    usable: Any
    correct: Any
    uncertainty: Any
    known: Any


class Group(NamedTuple):
    """What a sequence knows of its group: sums and maxima over usable rewards and known uncertainties."""

    first: Any
    size: Any
    usable: Any
    correct: Any
    reward: Any
    highest: Any
    highest_negated: Any
    known: Any
    uncertainty: Any


class Rules(NamedTuple):
    """Which rule a sequence's group falls under."""

    single: Any
    unusable: Any
    collapsed: Any
    any_correct: Any
    penalised: Any


class Summary(NamedTuple):
    """Count, total, maximum and maximum of the negated values."""

    count: Any
    total: Any
    high: Any
    low: Any


@triton.jit
def load_settings(settings_ptr):
    """Read the settings tensor."""
    return Settings(
        tl.load(settings_ptr),
        tl.load(settings_ptr + 1),
        tl.load(settings_ptr + 2),
        tl.load(settings_ptr + 3),
        tl.load(settings_ptr + 4),
        tl.load(settings_ptr + 5),
        tl.load(settings_ptr + 6),
    )


@triton.jit
def uncertainty_kernel(values_ptr, mask_ptr, offsets_ptr, uncertainty_ptr, counts_ptr, BLOCK: tl.constexpr):
    """One sequence per program: H (Eq. 5/6), the mean over counted tokens, at least 0; NaN where there is none."""
    sequence = tl.program_id(0)
    start, stop = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    total, count = segment_total(values_ptr, mask_ptr, start, stop, BLOCK)
    mean = total / tl.maximum(count, 1).to(total.dtype)
    known = (count > 0) & (tl.abs(mean) < float("inf"))
    tl.store(uncertainty_ptr + sequence, tl.where(known, tl.maximum(mean, 0.0), float("nan")))
    tl.store(counts_ptr + sequence, count)


@triton.jit
def load_sequences(pointers, offs, num_sequences, settings):
    """Read a block of sequences; those past the end are neither usable nor known."""
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
def together(mine, others):
    """Which pairs ``[mine, others]`` belong to one group."""
    return (mine.ids[:, None] == others.ids[None, :]) & others.valid[None, :]


@triton.jit
def number(flags):
    """How many ``flags`` are set in each row."""
    return tl.sum(flags.to(tl.int32), axis=1)


@triton.jit
def add_sequences(group, same, others):
    """Group statistics with those of ``others`` that are the ``same`` group added."""
    usable = same & others.usable[None, :]
    reward = others.reward[None, :]
    return Group(
        tl.minimum(group.first, tl.min(tl.where(same, others.offs[None, :], 2147483647), axis=1)),
        group.size + number(same),
        group.usable + number(usable),
        group.correct + number(usable & others.correct[None, :]),
        group.reward + tl.sum(tl.where(usable, reward, 0.0), axis=1),
        tl.maximum(group.highest, tl.max(tl.where(usable, reward, float("-inf")), axis=1)),
        tl.maximum(group.highest_negated, tl.max(tl.where(usable, -reward, float("-inf")), axis=1)),
        group.known + number(same & others.known[None, :]),
        group.uncertainty + tl.sum(tl.where(same, others.uncertainty[None, :], 0.0), axis=1),
    )


@triton.jit
def gather_group(pointers, mine, num_sequences, settings, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """First meeting: size, rewards and uncertainties of each sequence's group."""
    none, zero = tl.zeros([BLOCK_I], tl.int32), tl.zeros([BLOCK_I], mine.reward.dtype)
    nothing = zero + float("-inf")
    group = Group(none + 2147483647, none, none, none, zero, nothing, nothing, none, zero)
    for first in range(0, num_sequences, BLOCK_J):
        others = load_sequences(pointers, first + tl.arange(0, BLOCK_J), num_sequences, settings)
        same = together(mine, others)
        # Most blocks hold no sequence of these groups; adding nothing would change no bit.
        if tl.sum(number(same), axis=0) > 0:
            group = add_sequences(group, same, others)
    return group


@triton.jit
def spread_group(pointers, mine, group, num_sequences, settings, options, BLOCK_J: tl.constexpr):
    """Second meeting: squared deviations from the group's mean reward, and (to renormalise) the sum of weights."""
    mean_reward, mean_uncertainty = means(group, settings)
    squares, weights = mean_reward * 0.0, mean_reward * 0.0
    for first in range(0, num_sequences, BLOCK_J):
        others = load_sequences(pointers, first + tl.arange(0, BLOCK_J), num_sequences, settings)
        same = together(mine, others)
        if tl.sum(number(same), axis=0) > 0:
            centred = tl.where(same & others.usable[None, :], others.reward[None, :] - mean_reward[:, None], 0.0)
            squares += tl.sum(centred * centred, axis=1)
            if options.renorm != "none":
                weight = raw_weights(
                    others.uncertainty[None, :], others.known[None, :], mean_uncertainty[:, None], settings
                )
                if options.renorm == "after":
                    weight = clamp_weights(weight, others.correct[None, :], settings, options)
                weights += tl.sum(tl.where(same, weight, 0.0), axis=1)
    return squares, weights


@triton.jit
def means(group, settings):
    """Mean reward and mean uncertainty of each sequence's group."""
    dtype = group.reward.dtype
    reward = group.reward / tl.maximum(group.usable, 1).to(dtype)
    return reward, group.uncertainty / tl.maximum(group.known, 1).to(dtype)


@triton.jit
def raw_weights(uncertainty, known, mean_uncertainty, settings):
    """Group mean of H over own H (Eq. 7); 1 without own H, and where the mean is next to nothing."""
    weighed = known & (mean_uncertainty > settings.uncertainty_eps)
    return tl.where(weighed, mean_uncertainty / (uncertainty + settings.uncertainty_eps), 1.0)


@triton.jit
def clamp_weights(weights, correct, settings, options):
    """Eq. 8: correct answers weigh at least 1, incorrect ones at most 1, or as far as the clamp says so."""
    lower, upper = settings.weight_low, settings.weight_high
    if options.clamp == "asymmetric" or options.clamp == "positive_only":
        lower = tl.where(correct, 1.0, settings.weight_low)
    if options.clamp == "asymmetric" or options.clamp == "negative_only":
        upper = tl.where(correct, settings.weight_high, 1.0)
    if options.clamp != "none":
        weights = tl.minimum(tl.maximum(weights, lower), upper)
    return weights


@triton.jit
def renormalised(weights, group, total):
    """Divide by the group's mean weight (Eq. 9)."""
    return tl.where(total > 0, weights * group.size.to(weights.dtype) / total, weights)


@triton.jit
def final_weights(mine, group, rules, total, settings, options):
    """Weight of each sequence, ``total`` being the sum over its group where that is asked for."""
    _, mean_uncertainty = means(group, settings)
    if options.weight == "none":
        return mean_uncertainty * 0.0 + 1.0
    else:
        weights = raw_weights(mine.uncertainty, mine.known, mean_uncertainty, settings)
        if options.renorm == "before":
            weights = renormalised(weights, group, total)
        weights = clamp_weights(weights, mine.correct, settings, options)
        if options.renorm == "after":
            weights = renormalised(weights, group, total)
        locked = rules.single
        if options.lock_all_wrong:
            locked = locked | rules.penalised
        return tl.where(locked, 1.0, weights)


@triton.jit
def find_rules(group, settings, options):
    """Group of one, fewer than two usable rewards, collapsed; else mixed. And who gets the penalty (Eq. 13)."""
    single, unusable = group.size == 1, (group.size > 1) & (group.usable < 2)
    largest = tl.maximum(tl.maximum(group.highest, group.highest_negated), 1.0)
    collapsed = group.highest + group.highest_negated <= settings.collapsed * largest
    any_correct = group.correct > 0
    penalised = ~any_correct & ~single & ~unusable
    if options.all_wrong == "zero":
        penalised = penalised & ~penalised
    if options.all_wrong == "negative":
        penalised = penalised & collapsed
    return Rules(single, unusable, collapsed, any_correct, penalised)


@triton.jit
def base_advantages(mine, group, rules, squares, settings, options):
    """Reward relative to the group (Eq. 2, 10), or what the group's rule says."""
    mean_reward, _ = means(group, settings)
    base = mine.reward - mean_reward
    if options.scale == "group_std":
        freedom = tl.maximum(group.usable - 1, 1).to(base.dtype)
        base = base / (tl.sqrt(squares / freedom) + settings.std_eps)
    base = tl.where(rules.collapsed | rules.unusable, 0.0, base)
    base = tl.where(rules.penalised, -settings.nsr_scale, base)
    if options.singleton == "raw":
        base = tl.where(rules.single, mine.reward, base)
    else:
        base = tl.where(rules.single, 0.0, base)
    return tl.where(mine.usable, base, 0.0)


@triton.jit
def summary(values, where):
    """A metric's raw parts over ``where``, lane by lane."""
    nothing = float("-inf")
    return Summary(
        where, tl.where(where, values, 0.0), tl.where(where, values, nothing), tl.where(where, -values, nothing)
    )


@triton.jit
def store_metrics(pointers, partials_ptr, mine, group, rules, advantages, weights, incomplete, settings):
    """The slots of `egpo_kernels.metrics.GROUP`, in its order."""
    known, right, wrong = mine.known, mine.valid & mine.correct, mine.valid & ~mine.correct
    h, h_right, h_wrong = (
        summary(mine.uncertainty, known), summary(mine.uncertainty, known & right), summary(mine.uncertainty, known & wrong)
    )
    w, w_right, w_wrong = summary(weights, mine.valid), summary(weights, right), summary(weights, wrong)
    a = summary(advantages, mine.valid)
    empty = mine.valid & ~mine.valid
    if pointers.counts_ptr is not None:
        empty = tl.load(pointers.counts_ptr + mine.offs, mask=mine.valid, other=1) == 0
    first = mine.valid & (group.first == mine.offs)
    rest = first & ~(rules.single | rules.unusable)
    sums = (
        h.count, h.total, h_right.count, h_right.total, h_wrong.count, h_wrong.total,
        w.count, w.total, w_right.count, w_right.total, w_wrong.count, w_wrong.total, a.count, a.total,
        mine.valid & (weights == settings.weight_low),
        mine.valid & (weights == 1),
        mine.valid & (weights == settings.weight_high),
        empty,
        mine.valid & ~mine.usable,
        first & incomplete,
        first,
        first & rules.single,
        first & rules.unusable,
        rest & rules.collapsed & ~rules.any_correct,
        rest & rules.collapsed & rules.any_correct,
        rest & ~rules.collapsed & ~rules.any_correct,
        rest & ~rules.collapsed & rules.any_correct,
    )  # fmt: skip
    maxima = (
        h.high, h.low, h_right.high, h_right.low, h_wrong.high, h_wrong.low,
        w.high, w.low, w_right.high, w_right.low, w_wrong.high, w_wrong.low, a.high, a.low,
    )  # fmt: skip
    store_partials(partials_ptr, sums, maxima)


@triton.jit(do_not_specialize=["num_sequences", "group_size"])
def group_advantages_kernel(
    pointers, partials_ptr, settings_ptr, options, num_sequences, group_size, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Advantages of a block of sequences; ``group_size`` 0 means any."""
    settings = load_settings(settings_ptr)
    offs = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mine = load_sequences(pointers, offs, num_sequences, settings)
    group = gather_group(pointers, mine, num_sequences, settings, BLOCK_I, BLOCK_J)
    squares, total = spread_group(pointers, mine, group, num_sequences, settings, options, BLOCK_J)
    rules = find_rules(group, settings, options)
    base = base_advantages(mine, group, rules, squares, settings, options)
    weights = final_weights(mine, group, rules, total, settings, options)
    incomplete = (group_size > 0) & (group.size != group_size)
    advantages = tl.where(incomplete, float("nan"), weights * base)
    tl.store(pointers.advantages_ptr + offs, advantages, mask=mine.valid)
    tl.store(pointers.weights_ptr + offs, weights, mask=mine.valid)
    tl.store(pointers.base_ptr + offs, base, mask=mine.valid)
    store_metrics(pointers, partials_ptr, mine, group, rules, advantages, weights, incomplete, settings)


@functools.lru_cache(maxsize=256)
def _settings_tensor(config: AdvantageConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put the numbers of ``config`` on ``device``, once for each set of values."""
    values = Settings(
        correct_threshold=config.correct_threshold,
        collapsed=COLLAPSED,
        std_eps=config.std_eps,
        nsr_scale=config.nsr_scale,
        uncertainty_eps=config.uncertainty_eps,
        weight_low=config.weight_bounds[0],
        weight_high=config.weight_bounds[1],
    )
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _options(config: AdvantageConfig) -> Options:
    weighed = config.weight != "none"
    return Options(
        scale=tl.constexpr(config.scale),
        weight=tl.constexpr(config.weight),
        clamp=tl.constexpr(config.clamp if weighed else "none"),
        renorm=tl.constexpr(config.renorm if weighed else "none"),
        all_wrong=tl.constexpr(config.all_wrong),
        lock_all_wrong=tl.constexpr(config.lock_all_wrong and weighed),
        singleton=tl.constexpr(config.singleton),
    )


def group_advantages(
    ids: Tensor,
    rewards: Tensor,
    correct: Tensor | None,
    values: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor,
    config: AdvantageConfig,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, weights, base advantages, uncertainty ``[S]`` and raw metrics of whole groups."""
    num_sequences = ids.shape[0]
    advantages, weights, base = (rewards.new_empty(num_sequences) for _ in range(3))
    uncertainty, counts = rewards.new_full((num_sequences,), torch.nan), None
    num_programs = triton.cdiv(num_sequences, BLOCK_I)
    partials = rewards.new_empty(num_programs, len(metrics.GROUP.slots))
    if num_sequences:
        if values is not None and mask is not None:
            counts = torch.empty_like(ids, dtype=torch.int32)
            uncertainty_kernel[(num_sequences,)](
                values.contiguous(), as_bytes(mask), offsets.contiguous(), uncertainty, counts, BLOCK=SEGMENT_BLOCK
            )
        inputs = (ids.contiguous(), rewards.contiguous(), as_bytes(correct), uncertainty, counts)
        pointers, settings = (
            Pointers(*inputs, advantages, weights, base),
            _settings_tensor(config, rewards.dtype, rewards.device),
        )
        group_advantages_kernel[(num_programs,)](
            pointers, partials, settings, _options(config), num_sequences, group_size or 0, BLOCK_I, BLOCK_J
        )
    return advantages, weights, base, uncertainty, combine(partials, metrics.GROUP)
