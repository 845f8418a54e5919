"""The specification in numbers worked out by hand, against plain loops, and against its own derivatives.

Everything here runs `backend="reference"` in float64; the other backends are held to it in `test_properties.py`.
"""

import itertools
import math

import numpy as np
import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig
from tests.support.make_case import make_case
from tests.support.runs import loss_of

INF, NAN = math.inf, math.nan
LOG2 = math.log(2)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, *expected):
    torch.testing.assert_close(actual.double().reshape(-1), tensor(*expected), rtol=1e-9, atol=1e-9, equal_nan=True)


def advantages(rewards, uncertainties=None, groups=None, correct=None, **settings):
    """`group_advantages` of sequences of two tokens whose NLL averages to `uncertainties`: 0.5 H and 1.5 H."""
    old = None if uncertainties is None else -tensor(*uncertainties)[:, None] * tensor(0.5, 1.5)
    if old is None:
        settings["weight"] = "none"
    return ek.group_advantages(
        len(rewards) if groups is None else groups,
        tensor(*rewards),
        old,
        correct=None if correct is None else torch.tensor(correct),
        config=AdvantageConfig(**settings),
        backend="reference",
    )


# Group level, Eq. 2 and 5-13. Rewards 1, 1, 0, 0: mean 1/2, sample variance 4 x 1/4 / 3 = 1/3, so the std is 0.57735.
COLLAPSE = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
RIGHT = 0.5 / (math.sqrt(1 / 3) + 1e-6)
# Uncertainties 1, 2, 4, 1 have mean 2, so w = 2/(1 + 1e-5), 2/(2 + 1e-5), 2/(4 + 1e-5), 2/(1 + 1e-5).
H = (1.0, 2.0, 4.0, 1.0)
TWO, ONE, HALF = 2 / 1.00001, 2 / 2.00001, 2 / 4.00001


def test_worked_group():
    """Eq. 5-11: a confident right answer counts double, a confident wrong one no more than 1."""
    found = advantages((1, 1, 0, 0), H)
    close(found.uncertainty, *H)
    # Right: clip to [1, 2], so 2 stays and 1 - 5e-6 becomes 1. Wrong: clip to [0.8, 1], so 1/2 -> 0.8 and 2 -> 1.
    close(found.weights, TWO, 1, 0.8, 1)
    close(found.base, RIGHT, RIGHT, -RIGHT, -RIGHT)
    close(found.advantages, TWO * RIGHT, RIGHT, -0.8 * RIGHT, -RIGHT)


@pytest.mark.parametrize(
    "clamp, weights",
    [
        ("asymmetric", (1.25, 1, 0.8, 1)),
        ("symmetric", (1.25, ONE, 0.8, 1.25)),  # C1: both sides use both bounds
        ("negative_only", (1.25, ONE, 0.8, 1)),  # C2: right answers may fall below 1
        ("positive_only", (1.25, 1, 0.8, 1.25)),  # C3: wrong answers may rise above 1
        ("none", (TWO, ONE, HALF, TWO)),
    ],
)
def test_clamps(clamp, weights):
    """Eq. 8 and its ablations, with bounds 0.8 and 1.25."""
    close(advantages((1, 1, 0, 0), H, clamp=clamp, weight_bounds=(0.8, 1.25)).weights, *weights)


def test_clamp_by_the_callers_correctness():
    """`correct` decides the side, whatever the reward: the roles of the two halves are exchanged."""
    found = advantages((1, 1, 0, 0), H, correct=[False, False, True, True])
    close(found.weights, 1, ONE, 1, TWO)


def test_renormalisation_after_the_clamp():
    """C5: (2, 1, 0.8, 1) sums to 4.8 over four members, so every weight is divided by 1.2."""
    mean = (TWO + 1 + 0.8 + 1) / 4
    close(advantages((1, 1, 0, 0), H, renorm="after").weights, TWO / mean, 1 / mean, 0.8 / mean, 1 / mean)


def test_renormalisation_before_the_clamp():
    """C6: (2, 1, 1/2, 2) sums to 5.5, mean 1.375: 1.4545, 0.727, 0.364, 1.4545, and then the clamp."""
    mean = (TWO + ONE + HALF + TWO) / 4
    close(advantages((1, 1, 0, 0), H, renorm="before").weights, TWO / mean, 1, 0.8, 1)


def test_weight_of_a_sequence_without_uncertainty():
    """Its weight starts at 1 and it is left out of the mean: (1 + 4)/2 = 2.5 over the two valid ones."""
    old = tensor(-1, -4, -INF, 0)[:, None]
    mask = torch.tensor([[1], [1], [1], [0]])  # the third is not finite, the fourth has no token
    config = AdvantageConfig(clamp="none")
    found = ek.group_advantages(4, tensor(1, 1, 0, 0), old, mask, config=config, backend="reference")
    close(found.uncertainty, 1, 4, NAN, NAN)
    close(found.weights, 2.5 / 1.00001, 2.5 / 4.00001, 1, 1)
    # A sequence without tokens counts with its reward all the same.
    close(found.base, RIGHT, RIGHT, -RIGHT, -RIGHT)
    assert found.metrics["egpo/empty_sequences/sum"] == 1


def test_invalid_weight_is_clamped_like_any_other():
    """It starts at 1; dividing by the group's mean weight moves it with the rest."""
    found = advantages((1, 0), (1.0, NAN), clamp="none", renorm="after")
    # Mean H = 1 over the valid one: weights 1/1.00001 and 1, mean 0.999995.
    weight = 1 / 1.00001
    close(found.weights, 2 * weight / (1 + weight), 2 / (1 + weight))


def test_no_uncertainty_at_all():
    """A group whose mean H is at most eps has weights 1, not 0/0 or eps/eps."""
    close(advantages((1, 0), (0.0, 0.0), clamp="none").weights, 1, 1)
    close(advantages((1, 0), (1.5e-5, 0.5e-5), clamp="none").weights, 1, 1)
    # Just above: mean 2e-5, so 2e-5 / (3e-5 + 1e-5) and 2e-5 / (1e-5 + 1e-5).
    close(advantages((1, 0), (3e-5, 1e-5), clamp="none").weights, 0.5, 1)


def test_positive_log_probs_are_no_negative_uncertainty():
    """H is at least 0: log-probs that rounding left above 0 give H = 0, here w = 1/1e-5 before the clamp."""
    found = advantages((1, 0), (-1.0, 2.0))
    close(found.uncertainty, 0, 2)
    close(found.weights, 2, 0.8)


def test_entropy_mask():
    """H averages over the counted tokens that the entropy mask keeps."""
    old = -tensor(1, 2, 3, 4, 5, 6).view(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    keep = torch.tensor([[0, 1, 1], [1, 0, 1]])
    found = ek.group_advantages(2, tensor(1, 0), old, mask, entropy_mask=keep, backend="reference")
    close(found.uncertainty, 2, 5)  # tokens {2}, and {4, 6}


def test_shannon_statistic():
    """`statistic="shannon"` averages the entropies instead; their mean is not cut at anything else."""
    config = AdvantageConfig(statistic="shannon", clamp="none")
    entropy = tensor(1, 3, 4, 8).view(2, 2)
    found = ek.group_advantages(2, tensor(1, 0), entropy=entropy, config=config, backend="reference")
    close(found.uncertainty, 2, 6)
    close(found.weights, 4 / 2.00001, 4 / 6.00001)


def test_all_wrong():
    """Eq. 13: a collapsed group nobody solved is pushed away from, each answer by its own weight."""
    found = advantages((0, 0, 0, 0), H)
    close(found.base, -1, -1, -1, -1)
    close(found.advantages, -1, -ONE, -0.8, -1)  # nobody is right, so no weight is above 1
    close(advantages((0, 0), nsr_scale=0.5).advantages, -0.5, -0.5)
    close(advantages((0, 0), all_wrong="zero").advantages, 0, 0)


def test_one_correct_of_sixteen():
    """Each wrong answer gets -0.25, while a group nobody solved gets -1 each: hence `nsr_scale`.

    Mean 1/16; sum of squares 15/16 x 1/16 x 16 = 15/16, over 15 it is 1/16: the std is 1/4. (0 - 1/16)/(1/4) = -1/4.
    """
    base = advantages([1] + [0] * 15).base
    torch.testing.assert_close(base, tensor(3.75, *[-0.25] * 15), rtol=1e-5, atol=0)
    close(base, 15 / 16 / (0.25 + 1e-6), *[-1 / 16 / (0.25 + 1e-6)] * 15)


def test_all_correct_is_nothing_to_learn():
    close(advantages((1, 1, 1), (1.0, 2.0, 3.0)).advantages, 0, 0, 0)


def test_collapse_is_relative():
    """Equal up to 4 units of the last place: rounding, and nothing that a reward says."""
    close(advantages((0.1 + 0.2, 0.3, 0.3, 0.3)).base, -1, -1, -1, -1)
    value = 0.5 / (math.sqrt(0.5) + 1e-6)
    close(advantages((1e6 + 1, 1e6)).base, value, -value)
    tiny = 5e-7 / (math.sqrt(0.5) * 1e-6 + 1e-6)
    close(advantages((1e-6, 0)).base, tiny, -tiny)


def test_shaped_rewards_without_a_correct_one():
    """Rewards 0 and 0.4: mean 0.2, std 0.2 sqrt 2; `negative_no_correct` punishes all of them alike."""
    value = 0.2 / (0.2 * math.sqrt(2) + 1e-6)
    close(advantages((0, 0.4)).base, -value, value)
    found = advantages((0, 0.4), all_wrong="negative_no_correct", nsr_scale=0.5)
    close(found.base, -0.5, -0.5)
    assert found.metrics["egpo/groups/no_correct/sum"] == 1 and found.metrics["egpo/groups/all_wrong/sum"] == 0
    # One above the threshold, which is exclusive: 0.5 itself is wrong.
    close(advantages((0.5, 0.5), all_wrong="negative_no_correct").base, -1, -1)
    close(advantages((0.5, 0.5), correct_threshold=0.4).base, 0, 0)


def test_lock_all_wrong():
    """C4: where the all-wrong rule applies the weight is 1; elsewhere it is untouched."""
    groups = [0, 0, 1, 1]
    found = advantages((0, 0, 1, 0), (1.0, 3.0, 1.0, 3.0), groups, lock_all_wrong=True)
    # Group 1: mean 2, right 2/(1 + 1e-5), wrong 2/(3 + 1e-5) = 0.667 -> 0.8.
    close(found.weights, 1, 1, TWO, 0.8)
    close(advantages((0, 0, 1, 0), (1.0, 3.0, 1.0, 3.0), groups).weights, 1, 0.8, TWO, 0.8)


def test_group_of_one():
    """No comparison is possible: advantage 0, weight 1; `raw` gives verl's rule instead. It is not all-wrong."""
    found = advantages((0, 0.7), (3.0, 4.0), groups=["a", "b"])
    close(found.advantages, 0, 0)
    close(found.weights, 1, 1)
    close(advantages((0.7, -2), (3.0, 4.0), groups=["a", "b"], singleton="raw").advantages, 0.7, -2)
    assert found.metrics["egpo/groups/single/sum"] == 2


def test_non_finite_rewards():
    """They get 0 and stay out of the statistics: 1 and 0 remain, mean 1/2, std sqrt(1/2)."""
    value = 0.5 / (math.sqrt(0.5) + 1e-6)
    close(advantages((1, NAN, 0, INF)).base, value, 0, -value, 0)
    close(advantages((1, NAN)).base, 0, 0)  # fewer than two usable ones: nothing to compare
    close(advantages((0, 0, -INF)).base, -1, -1, 0)  # collapsed and all wrong, but for the one that has no reward
    close(advantages((0, 0, INF)).base, -1, -1, 0)  # an infinite reward is no correct answer


def test_no_scale():
    close(advantages((1, 0, 0), scale="none").base, 2 / 3, -1 / 3, -1 / 3)


def test_rewards_of_large_offset():
    """The variance is computed in two passes: 1e5 more changes nothing."""
    close(advantages((1e5 + 1, 1e5, 1e5, 1e5 + 1)).base, RIGHT, -RIGHT, -RIGHT, RIGHT)


def test_group_metrics():
    """Groups: (1, 0) mixed, (0, 0) all wrong, (1, 1) all correct, (0, 0.4) none correct, one single."""
    rewards, uncertainty = (1, 0, 0, 0, 1, 1, 0, 0.4, 0), (1.0, 3.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0, 5.0)
    found = advantages(rewards, uncertainty, [0, 0, 1, 1, 2, 2, 3, 3, 4])
    kinds = ("mixed", "all_wrong", "all_correct", "no_correct", "single")
    assert [int(found.metrics[f"egpo/groups/{kind}/sum"]) for kind in kinds] == [1, 1, 1, 1, 1]
    metrics = {key.removeprefix("egpo/"): value for key, value in found.metrics.items()}
    assert metrics["groups/sum"] == 5 and metrics["sequences/sum"] == 9 and metrics["correct/sum"] == 3
    close(metrics["uncertainty/correct/mean"], 1)
    close(metrics["uncertainty/incorrect/mean"], 16 / 6)  # 3 + 2 + 2 + 2 + 2 + 5
    close(metrics["uncertainty/gap/mean"], 16 / 6 - 1)
    close(metrics["uncertainty/max"], 5)
    close(metrics["advantage/sum"], found.advantages.sum())
    # Weights: 2 - 2e-5, 0.8 (2/3), then ones and almost ones: 1 on both right ones of group 2 and the single one.
    close(metrics["weight/at_lower/mean"], 1 / 9)
    close(metrics["weight/at_one/mean"], 3 / 9)
    close(metrics["weight/at_upper/mean"], 0)


# Known facts about the method.


def test_weights_know_no_unit():
    """Eq. 7 is scale-invariant: uncertainty in bits weighs like uncertainty in nats, up to eps."""
    nats = advantages((1, 0, 1, 0), H, clamp="none", uncertainty_eps=1e-12).weights
    bits = advantages((1, 0, 1, 0), [h / LOG2 for h in H], clamp="none", uncertainty_eps=1e-12).weights
    torch.testing.assert_close(nats, bits, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_weights_raise_the_mean(seed):
    """Mean of 1/H times mean of H is at least 1 (Cauchy-Schwarz): Eq. 7 does not preserve the mean."""
    uncertainty = np.random.default_rng(seed).uniform(0.1, 4.0, 8).tolist()
    weights = advantages([1, 0] * 4, uncertainty, clamp="none", uncertainty_eps=1e-12).weights
    assert weights.mean() > 1


@pytest.mark.parametrize("seed", range(5))
def test_advantages_of_a_mixed_group_do_not_sum_below_zero(seed):
    """Binary rewards, asymmetric clamp, no renorm: right ones have weights >= 1, wrong ones <= 1."""
    rng = np.random.default_rng(seed)
    found = advantages([1, 0, *rng.integers(0, 2, 6)], rng.uniform(0.1, 4.0, 8).tolist())
    assert found.advantages.sum() > 0
    close(found.base.sum(), 0)


def naive_advantages(case):
    """SPEC section 2, group level, one sequence and one group at a time, in Python floats."""
    config, groups = case.recipe.advantage, case.group_numbers.tolist()
    values = -case.old_log_probs.reshape(-1)
    keep = case.counted if case.entropy_mask is None else case.counted & case.entropy_mask.reshape(-1)
    uncertainty = []
    for start, stop in itertools.pairwise(case.offsets):
        own = [float(values[row]) for row in range(start, stop) if keep[row]]
        mean = sum(own) / len(own) if own else NAN
        uncertainty.append(max(mean, 0.0) if math.isfinite(mean) else NAN)
    rewards = case.rewards.tolist()
    right = [r > config.correct_threshold for r in rewards] if case.correct is None else case.correct.tolist()
    base, weights = [0.0] * len(rewards), [1.0] * len(rewards)
    low, high = config.weight_bounds
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        usable = [i for i in members if math.isfinite(rewards[i])]
        if len(members) == 1:
            base[members[0]] = rewards[members[0]] if config.singleton == "raw" and usable else 0.0
            continue
        chosen = [rewards[i] for i in usable]
        nobody = not any(right[i] for i in usable)
        penalised = False
        if len(chosen) > 1:
            mean = sum(chosen) / len(chosen)
            std = math.sqrt(sum((r - mean) ** 2 for r in chosen) / (len(chosen) - 1))
            collapsed = max(chosen) - min(chosen) <= COLLAPSE[case.rewards.dtype] * max(map(abs, chosen))
            rule = config.all_wrong
            penalised = nobody and (rule == "negative_no_correct" or (rule == "negative" and collapsed))
            for i in usable:
                scale = std + config.std_eps if config.scale == "group_std" else 1.0
                base[i] = -config.nsr_scale if penalised else 0.0 if collapsed else (rewards[i] - mean) / scale
        if config.weight == "none":
            continue
        valid = [uncertainty[i] for i in members if math.isfinite(uncertainty[i])]
        mean = sum(valid) / len(valid) if valid else 0.0
        if mean > config.uncertainty_eps:
            for i in members:
                if math.isfinite(uncertainty[i]):
                    weights[i] = mean / (uncertainty[i] + config.uncertainty_eps)

        def renormalise(members=members):
            total = sum(weights[i] for i in members) / len(members)
            for i in members:
                weights[i] /= total or 1.0

        if config.renorm == "before":
            renormalise()
        for i in members if config.clamp != "none" else []:
            lower = 1 if right[i] and config.clamp in ("asymmetric", "positive_only") else low
            upper = 1 if not right[i] and config.clamp in ("asymmetric", "negative_only") else high
            weights[i] = min(max(weights[i], lower), upper)
        if config.renorm == "after":
            renormalise()
        for i in members if penalised and config.lock_all_wrong else []:
            weights[i] = 1.0
    return uncertainty, base, weights, [w * b for w, b in zip(weights, base, strict=True)]


OPTIONS = {
    "scale": ("group_std", "none"),
    "weight": ("inverse_uncertainty", "inverse_uncertainty", "inverse_uncertainty", "none"),
    "clamp": ("asymmetric", "symmetric", "negative_only", "positive_only", "none"),
    "renorm": ("none", "after", "before"),
    "all_wrong": ("negative", "negative_no_correct", "zero"),
    "singleton": ("zero", "raw"),
    "lock_all_wrong": (False, True),
    "nsr_scale": (1.0, 0.5),
    "weight_bounds": ((0.8, 2.0), (0.0, 1.5)),
}


@pytest.mark.parametrize("seed", range(60))
def test_group_advantages_against_loops(seed):
    rng = np.random.default_rng(seed)
    settings = {name: choices[rng.integers(len(choices))] for name, choices in OPTIONS.items()}
    case = make_case(
        seed,
        group_sizes=tuple(rng.integers(1, 6, rng.integers(1, 5)).tolist()),
        dtype=torch.float64,
        layout=["padded", "packed"][seed % 2],
        names=["tensor", "strings", "objects"][seed % 3],
        old=["near", "far"][seed % 2],
        recipe=ek.recipes.EGPO.replace(**settings),
        garbage=seed % 4 == 0,
    )
    found = ek.group_advantages(
        case.groups,
        case.rewards,
        case.old_log_probs,
        case.counted.view(case.tokens.shape),
        cu_seqlens=case.cu_seqlens,
        entropy_mask=case.entropy_mask,
        correct=case.correct,
        config=case.recipe.advantage,
        backend="reference",
    )
    for actual, expected in zip(
        (found.uncertainty, found.base, found.weights, found.advantages), naive_advantages(case), strict=True
    ):
        torch.testing.assert_close(actual.cpu(), tensor(*expected), rtol=1e-9, atol=1e-9, equal_nan=True)


# Token level, Eq. 12.


def token_loss(ratios, advantage, **settings):
    """Per-token losses and their slopes dL/dl, for one sequence with these ratios."""
    log_probs = tensor(*ratios).log()[None].requires_grad_()
    extra = {name: settings.pop(name) for name in ("ref_log_probs", "entropy", "rollout_weights") if name in settings}
    config = PolicyLossConfig(**{"reduction": "none", **settings})
    losses, metrics = ek.policy_loss(
        log_probs, torch.zeros_like(log_probs), tensor(advantage), config=config, backend="reference", **extra
    )
    losses.sum().backward()
    return losses.detach(), log_probs.grad, metrics


def test_clip():
    """Ratios 0.5, 1, 1.5 under clip 0.2/0.28, old log-probs 0."""
    # A = 2: -min(2 rho, 2 clip(rho)): -1, -2, and at 1.5 the bound 1.28 holds: -2.56, without slope.
    losses, slope, metrics = token_loss((0.5, 1.0, 1.5), 2.0, clip_high=0.28)
    close(losses, -1, -2, -2.56)
    close(slope, -1, -2, 0)
    close(metrics["policy/clip_low/mean"], 0)
    close(metrics["policy/clip_high/mean"], 1 / 3)
    close(metrics["policy/ratio/mean"], 1)
    close(metrics["policy/ratio/max"], 1.5)
    # A = -2: max(2 rho, 2 clip(rho)): at 0.5 the bound 0.8 holds: 1.6, without slope.
    losses, slope, metrics = token_loss((0.5, 1.0, 1.5), -2.0, clip_high=0.28)
    close(losses, 1.6, 2, 3)
    close(slope, 0, 2, 3)
    close(metrics["policy/clip_low/mean"], 1 / 3)
    close(metrics["policy/clip_high/mean"], 0)


def test_cispo_is_bounded_below_too():
    """-sg(clip(rho)) A l: 0.4 counts as 0.8, whatever the sign; clipped is what the advantage pushes out."""
    losses, slope, metrics = token_loss((0.4,), -1.0, surrogate="cispo", clip_low=0.2)
    close(losses, 0.8 * math.log(0.4))
    close(slope, 0.8)
    close(metrics["policy/clip_low/mean"], 1)
    losses, slope, metrics = token_loss((0.4, 2.0, 2.0), 1.0, surrogate="cispo", clip_low=0.2)
    close(slope, -0.8, -1.2, -1.2)
    close(metrics["policy/clip_low/mean"], 0)
    close(metrics["policy/clip_high/mean"], 2 / 3)
    _, slope, metrics = token_loss((0.4, 2.0), -1.0, surrogate="cispo", clip_low=1.0)
    close(slope, 0.4, 1.2)
    close(metrics["policy/clip_low/mean"], 0)
    close(metrics["policy/clip_high/mean"], 0)


def test_cispo_as_reported():
    """Ratio 0.4, A -1, log-prob -2.1, 0.2: loss -1.68, slope 0.8."""
    log_probs = tensor(-2.1)[None].requires_grad_()
    config = PolicyLossConfig(surrogate="cispo", clip_low=0.2)
    loss = ek.policy_loss(log_probs, log_probs.detach() - math.log(0.4), tensor(-1.0), config=config).loss
    loss.backward()
    close(loss.detach(), -1.68)
    close(log_probs.grad, 0.8)


def test_kl_times_a_ratio_of_one():
    """NeMo-RL: the estimate times exp(l - sg(l)), whose value is 1: itself once more in the gradient."""
    x = LOG2
    for ratios in ((1.0,), (1.5,)):
        given = {"kl": "k3", "kl_coef": 10.0, "ref_log_probs": tensor(*ratios).log()[None] + x}
        losses, slope, _ = token_loss(ratios, 0.0, kl_times_ratio="on_policy", **given)
        close(losses, 10 * (2 - x - 1))
        close(slope, 10 * ((1 - 2) + (2 - x - 1)))


def test_dual_clip():
    """c = 3 bounds the loss of a negative advantage by -c A = 6; a positive one is not touched by it."""
    losses, slope, metrics = token_loss((0.5, 2.0, 5.0), -2.0, dual_clip=3.0)
    close(losses, 1.6, 4, 6)
    close(slope, 0, 4, 0)
    close(metrics["policy/clip_high/mean"], 1 / 3)
    close(token_loss((0.5, 5.0), 2.0, dual_clip=3.0)[0], -1, -2.4)


def test_on_policy():
    """Without old log-probs the ratio is exactly 1: the loss is -A, its slope -A, whatever the log-prob."""
    log_probs = torch.tensor([[-0.1, -30.0, -5000.0]], requires_grad=True)
    losses, metrics = ek.policy_loss(
        log_probs,
        None,
        torch.tensor([0.7]),
        config=PolicyLossConfig(reduction="none", clip_low=0.0, clip_high=0.0),
        backend="reference",
    )
    losses.sum().backward()
    assert losses.tolist() == log_probs.grad.tolist() == [[-torch.tensor(0.7).item()] * 3]
    assert metrics["policy/ratio/min"] == metrics["policy/ratio/max"] == 1 and metrics["policy/approx_kl/mean"] == 0


def test_log_ratios_are_clamped():
    """Beyond M = 2 nats the ratio is e^2 or e^-2 and has no slope; old log-prob -inf is a log-ratio of +inf."""
    losses, slope, _ = token_loss((math.exp(3), math.exp(-3), math.exp(1.9)), -1.0, max_log_ratio=2.0, clip_low=1.0)
    close(losses, math.exp(2), math.exp(-2), math.exp(1.9))
    close(slope, 0, 0, math.exp(1.9))
    log_probs = tensor(-1.0)[None].requires_grad_()
    loss, _ = ek.policy_loss(log_probs, tensor(-INF)[None], tensor(-1.0), backend="reference")
    loss.backward()
    close(loss.detach(), math.exp(20))
    close(log_probs.grad, 0)


@pytest.mark.parametrize(
    "kl, values, slopes",
    [
        # x = l_ref - l = log 2 and -log 2, with kl_coef 10.
        ("k1", (-LOG2, LOG2), (1, 1)),
        ("k2", (LOG2**2 / 2, LOG2**2 / 2), (-LOG2, LOG2)),
        ("k3", (2 - LOG2 - 1, 0.5 + LOG2 - 1), (1 - 2, 1 - 0.5)),
    ],
)
def test_kl(kl, values, slopes):
    losses, slope, metrics = token_loss((1.0, 1.0), 0.0, kl=kl, kl_coef=10.0, ref_log_probs=tensor(LOG2, -LOG2)[None])
    close(losses, *(10 * value for value in values))
    close(slope, *(10 * value for value in slopes))
    close(metrics["policy/ref_kl/mean"], sum(values) / 2)
    # Beyond M: the clamped value, and no slope.
    losses, slope, _ = token_loss((1.0,), 0.0, kl="k1", kl_coef=1.0, ref_log_probs=tensor(-50.0)[None])
    close(losses, 20)
    close(slope, 0)


def test_order_of_the_terms():
    """Weights multiply the surrogate alone: 3 x (-2 rho) + 0.5 KL - 0.1 Ent with rho = 1, KL(k1) = -0.4, Ent = 2."""
    weights, entropy = tensor(3.0), tensor(2.0, 2.0)[None].requires_grad_()
    losses, _, metrics = token_loss(
        (1.0, 1.0),
        2.0,
        kl="k1",
        kl_coef=0.5,
        entropy_coef=0.1,
        ref_log_probs=tensor(0.4, 0.4)[None],
        entropy=entropy,
        rollout_weights=weights,
    )
    close(losses, -6.4, -6.4)
    close(entropy.grad, -0.1, -0.1)
    parts = ("surrogate", "kl", "entropy")
    close(torch.stack([metrics[f"policy/loss/{part}/sum"] for part in parts]), -12, -0.4, -0.4)
    # A token the sampler did not score has weight 1, and is counted.
    losses, _, metrics = token_loss((1.0, 1.0), 2.0, rollout_weights=tensor(3.0, NAN)[None])
    close(losses, -6, -2)
    assert metrics["policy/unscored_tokens/sum"] == 1


def test_sequence_ratio():
    """GSPO: ratios 0.5 and 8 share their geometric mean 2, and each token carries half of its slope."""
    losses, slope, metrics = token_loss((0.5, 8.0), -1.0, ratio="sequence", clip_high=0.2)
    close(losses, 2, 2)
    # d(2 + 2)/dl_t = sum over tokens of 2 x 1/2 = 2.
    close(slope, 2, 2)
    close(metrics["policy/ratio/mean"], 2)
    # Positive advantage: 2 > 1.2, clipped for both.
    losses, slope, _ = token_loss((0.5, 8.0), 1.0, ratio="sequence", clip_high=0.2)
    close(losses, -1.2, -1.2)
    close(slope, 0, 0)
    # A clamped token (log-ratio 3 > M = 2) enters the mean as 2 and gets no slope: exp((2 + 0)/2) = e.
    losses, slope, _ = token_loss((math.exp(3), 1.0), -1.0, ratio="sequence", max_log_ratio=2.0)
    close(losses, math.e, math.e)
    close(slope, 0, math.e)


# Three sequences with 3, 1 and 0 counted tokens, losses 1, 2, 3 and 4 (advantages -1, -2, ...).
@pytest.mark.parametrize(
    "reduction, counts, expected",
    [
        ("token_mean", {}, 10 / 4),
        ("token_mean", {"num_tokens": 8}, 10 / 8),
        ("seq_mean_token_mean", {}, (6 / 3 + 4 / 1) / 2),  # the empty sequence is none
        ("seq_mean_token_mean", {"num_sequences": 5}, (6 / 3 + 4 / 1) / 5),
        ("seq_mean_token_sum", {}, 10 / 2),
        ("seq_mean_token_sum", {"num_sequences": torch.tensor(5)}, 10 / 5),
        ("seq_mean_token_sum_norm", {}, 10 / (2 * 4)),
        ("seq_mean_token_sum_norm", {"num_sequences": 4.0}, 10 / (4 * 4)),
        ("sum", {}, 10),
        ("sum", {"num_tokens": 3, "num_sequences": 3}, 10),
    ],
)
def test_reductions(reduction, counts, expected):
    config = PolicyLossConfig(reduction=reduction, norm_length=4.0 if reduction.endswith("norm") else None)
    log_probs = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]])
    advantages = -tensor(1, 2, 3, 9, 4, 9, 9, 9, 9).view(3, 3)
    for cu_seqlens in (None, torch.tensor([0, 3, 6, 9])):
        given = [log_probs, advantages, mask]
        if cu_seqlens is not None:
            given = [value.flatten() for value in given]
        loss, metrics = ek.policy_loss(
            given[0], None, *given[1:], config=config, cu_seqlens=cu_seqlens, backend="reference", **counts
        )
        close(loss.detach(), expected)
        close(metrics["policy/loss/sum"], expected)
        assert metrics["policy/tokens/sum"] == 4


def test_reduction_none_keeps_the_shape():
    log_probs = torch.zeros(2, 2, dtype=torch.float64)
    config = PolicyLossConfig(reduction="none")
    mask = torch.tensor([[1, 0], [1, 1]])
    loss, _ = ek.policy_loss(log_probs, None, tensor(1, -2), mask, config=config, backend="reference")
    assert loss.tolist() == [[-1, 0], [2, 2]]


# From logits.


def test_log_probs_and_entropy():
    """Logits (log 1, log 2, log 5) at temperature 1: p = 1/8, 2/8, 5/8. At 1/2: p ~ 1, 4, 25 of 30."""
    logits = tensor(1, 2, 5).log().expand(1, 2, 3) + 1000.0
    tokens = torch.tensor([[2, 0]])
    found = ek.token_log_probs(logits, tokens, return_entropy=True, backend="reference")
    close(found.log_probs, math.log(5 / 8), math.log(1 / 8))
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    close(found.entropy, entropy, entropy)
    found = ek.token_log_probs(logits, tokens, temperature=0.5, backend="reference")
    close(found.log_probs, math.log(25 / 30), math.log(1 / 30))


def test_gradient_of_the_logits():
    """Temperature 1/2 makes p = 1, 4, 25 of 30; token 2, A = 2, on-policy: a = -2, dz = a/0.5 (onehot - p)."""
    logits = tensor(1, 2, 5).log().expand(1, 1, 3).clone().requires_grad_()
    loss, _ = ek.logits_policy_loss(logits, torch.tensor([[2]]), tensor(2.0), temperature=0.5, backend="reference")
    loss.backward()
    close(loss.detach(), -2)
    close(logits.grad, 4 * 1 / 30, 4 * 4 / 30, -4 * 5 / 30)


def test_gradient_of_the_entropy_bonus():
    """Advantage 0: dz = coef p (log p + Ent) with p = 1/4, 3/4 at temperature 1."""
    logits = tensor(1, 3).log().view(1, 1, 2).requires_grad_()
    config = PolicyLossConfig(entropy_coef=0.1)
    loss, _ = ek.logits_policy_loss(logits, torch.tensor([[0]]), tensor(0.0), config=config, backend="reference")
    loss.backward()
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    close(loss.detach(), -0.1 * entropy)
    close(logits.grad, *(0.1 * p * (math.log(p) + entropy) for p in (0.25, 0.75)))


def test_uncertainty_comes_from_the_logits_on_policy():
    """Two answers of one token, p = 1/8 and 5/8 of the sampled one: H = log 8 and log 1.6, without clamp or weights."""
    logits = tensor(1, 2, 5).log().expand(2, 1, 3).clone().requires_grad_()
    recipe = ek.recipes.EGPO.replace(clamp="none", uncertainty_eps=1e-12)
    loss, metrics = ek.egpo_loss(logits, torch.tensor([[0], [2]]), 2, tensor(1, 0), recipe=recipe, backend="reference")
    loss.backward()
    h = (math.log(8), math.log(1.6))
    weights = [sum(h) / 2 / value for value in h]
    base = 0.5 / (math.sqrt(0.5) + 1e-6)
    close(metrics["egpo/uncertainty/correct/mean"], h[0])
    close(metrics["egpo/uncertainty/incorrect/mean"], h[1])
    # Loss: -(w_0 b - w_1 b)/2. No gradient flows through the weights: dl is -A/2 and A_1 is negative.
    close(loss.detach(), -(weights[0] - weights[1]) * base / 2)
    a = [-weights[0] * base / 2, weights[1] * base / 2]
    p = (1 / 8, 2 / 8, 5 / 8)
    close(logits.grad[0, 0], *(a[0] * ((j == 0) - p[j]) for j in range(3)))
    close(logits.grad[1, 0], *(a[1] * ((j == 2) - p[j]) for j in range(3)))


def test_grpo_recipe():
    """GRPO: no weights, collapsed groups give nothing, mean over each response."""
    logits = torch.zeros(4, 2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    tokens = torch.zeros(4, 2, dtype=torch.long)
    loss, metrics = ek.egpo_loss(logits, tokens, 2, tensor(1, 0, 0, 0), mask=mask, recipe="grpo", backend="reference")
    close(loss, 0)  # -(+b + -b)/4, each response's mean weighing alike whatever its length
    assert metrics["egpo/weight/min"] == metrics["egpo/weight/max"] == 1
    close(metrics["egpo/advantage/sum"], 0)


# Derivatives.


LOSS_SETTINGS = [
    {},
    {"ratio": "sequence", "kl": "k1", "kl_coef": 0.3, "reduction": "seq_mean_token_mean"},
    {"dual_clip": 1.5, "kl": "k2", "kl_coef": 0.3, "reduction": "seq_mean_token_sum"},
    {"kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.2, "reduction": "seq_mean_token_sum_norm", "norm_length": 3.0},
    {"ratio": "sequence", "entropy_coef": -0.2, "reduction": "none"},
    {"reduction": "sum", "entropy_coef": 0.2},
]


def settled(seed, old, settings):
    recipe = ek.recipes.EGPO.replace(**settings)
    return make_case(
        seed, group_sizes=(2, 2), length=2, vocab=5, dtype=torch.float64, old=old, temperature="sequence", recipe=recipe
    )


@pytest.mark.parametrize("settings", LOSS_SETTINGS, ids=str)
def test_derivatives_of_policy_loss(settings):
    """First derivatives by differences; the second ones too, which only the reference has."""
    case = settled(1, "near", settings)
    entropy = torch.rand(case.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [value.to(case.rewards).requires_grad_() for value in (case.log_probs().view(case.tokens.shape), entropy)]

    def loss(log_probs, entropy):
        return ek.policy_loss(
            log_probs,
            mask=case.mask,
            advantages=case.advantages,
            entropy=entropy,
            config=case.recipe.loss,
            backend="reference",
            **case.loss_arguments(),
        ).loss

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("settings", LOSS_SETTINGS, ids=str)
def test_derivatives_of_logits_policy_loss(settings):
    case = settled(2, "near", settings)

    def loss(logits):
        return loss_of(case, logits, "reference").loss

    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("settings", LOSS_SETTINGS, ids=str)
def test_derivatives_on_policy(settings):
    """The loss itself is flat there (the ratio is 1 wherever one moves): its derivatives are those at l_old = l."""
    case = settled(3, "none", settings)
    found = []
    for old in (None, case.log_probs().view(case.tokens.shape)):
        logits = case.logits.clone().requires_grad_()
        loss, _ = loss_of(case, logits, "reference", old_log_probs=old)
        (first,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        found.append((loss.detach(), first.detach(), second))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_derivatives_of_token_log_probs():
    case = settled(4, "none", {})
    logits = case.logits.clone()
    logits[..., 1] = -INF  # a padded vocabulary; differences there would be NaN, so it is not a variable
    finite = logits.isfinite()
    tokens = torch.where(case.tokens == 1, 0, case.tokens)

    def found(variables):
        z = logits.masked_scatter(finite, variables)
        found = ek.token_log_probs(z, tokens, mask=case.mask, temperature=0.7, return_entropy=True, backend="reference")
        return tuple(found)

    variables = logits[finite].requires_grad_()
    assert torch.autograd.gradcheck(found, variables)
    assert torch.autograd.gradgradcheck(found, variables)


def test_double_backward_of_egpo_loss():
    """A gradient penalty can be differentiated: create_graph works on the reference."""
    case = settled(5, "near", {"entropy_coef": 0.1})
    logits = case.logits.clone().requires_grad_()
    loss, _ = ek.egpo_loss(
        logits, case.tokens, case.groups, case.rewards, mask=case.mask, recipe=case.recipe, backend="reference"
    )
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    gradient.square().sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad != 0).any()
