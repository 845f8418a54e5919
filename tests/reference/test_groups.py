"""Advantages of a group in numbers worked out by hand (EGPO, arXiv 2602.22751, Eq. 2 and 5-13).

Everything here runs `backend="reference"` in float64; `tests/api/test_properties.py` holds the other backends to it.
"""

import math

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.config.settings import AdvantageConfig
from tests.support.by_hand import H, advantages, close, tensor

INF, NAN = math.inf, math.nan

# Rewards 1, 1, 0, 0: mean 1/2, sample variance 4 x 1/4 / 3 = 1/3, so the std is 0.57735.
RIGHT = 0.5 / (math.sqrt(1 / 3) + 1e-6)
# H = 1, 2, 4, 1 has mean 2, so w = 2/(1 + 1e-5), 2/(2 + 1e-5), 2/(4 + 1e-5), 2/(1 + 1e-5).
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
