"""What is known of the method's advantages, and all of them against plain loops.

Everything here runs `backend="reference"` in float64; `tests/api/test_properties.py` holds the other backends to it.
"""

import itertools
import math

import numpy as np
import pytest
import torch

import egpo_kernels as ek
from tests.support.by_hand import H, advantages, close, tensor
from tests.support.make_case import make_case

NAN = math.nan
LOG2 = math.log(2)
COLLAPSE = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


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
