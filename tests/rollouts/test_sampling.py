"""Weights against a sampler's log-probs, and sequences left out: by hand, by property, in the losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import egpo_kernels as ek

NAN, INF = math.nan, math.inf
LOG = math.log

# Ratios: 2, 1/2, 4 | 3, not scored, 1 | nothing counts
NOW = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
SAMPLER = NOW - torch.tensor([[LOG(2), LOG(0.5), LOG(4)], [LOG(3), NAN, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0]])
CASES = {
    ("token", "clamp", (0.0, 2.0)): [[2, 0.5, 2], [2, NAN, 1], [1, 1, 1]],
    ("token", "clamp", (1.0, INF)): [[2, 1, 4], [3, NAN, 1], [1, 1, 1]],
    ("token", "mask", (0.75, 3.5)): [[2, 0, 0], [3, NAN, 1], [1, 1, 1]],
    ("sequence", "clamp", (0.0, 2.0)): [2, 2, 1],
    ("sequence", "clamp", (0.0, 10.0)): [4, 3, 1],
    ("sequence", "mask", (0.0, 3.5)): [0, 3, 1],
}


def packed(values):
    """The same without the third sequence's rows, but for one past the end, which must not count."""
    rows = torch.as_tensor(values)[:2].reshape(-1)
    return torch.cat([rows, rows[:1]])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rollout_weights_by_hand(case):
    level, outside, bounds = case
    options = {"level": level, "outside": outside, "bounds": bounds}
    wanted = torch.tensor(CASES[case], dtype=torch.float64)
    found = ek.rollout_weights(NOW, SAMPLER, MASK, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0, equal_nan=True)
    ends = torch.tensor([0, 3, 6, 6])
    found = ek.rollout_weights(packed(NOW), packed(SAMPLER), cu_seqlens=ends, **options)
    wanted = wanted if level == "sequence" else torch.cat([wanted[:2].reshape(-1), torch.ones(1).double()])
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0, equal_nan=True)


def test_rollout_weights_that_nothing_is_known_of_are_nan_and_the_losses_take_them_as_1():
    nothing = torch.full((2, 3), NAN)
    log_probs, advantages = torch.full((2, 3), -1.0), torch.tensor([1.0, -1.0])
    for level, shape in (("token", (2, 3)), ("sequence", (2,))):
        weights = ek.rollout_weights(log_probs, nothing, level=level)
        assert weights.shape == shape and weights.isnan().all()
        loss, metrics = ek.policy_loss(log_probs, None, advantages, rollout_weights=weights)
        assert loss == ek.policy_loss(log_probs, None, advantages).loss
        assert metrics["policy/unscored_tokens/sum"] == 6


def test_rollout_weights_stay_finite():
    now = torch.tensor([[-INF, -1.0, -INF, -800.0]])
    sampler = torch.tensor([[-1.0, -INF, -INF, -1.0]])
    weights = ek.rollout_weights(now, sampler, bounds=(0.0, INF))
    wanted = torch.tensor([[math.exp(-20), math.exp(20), NAN, math.exp(-20)]])
    torch.testing.assert_close(weights, wanted, equal_nan=True)
    assert ek.rollout_weights(now, sampler, bounds=(0.0, 2.0)).nan_to_num(1.0).max() == 2
    # In one sequence, a token that only the policy excludes and one that only the sampler excludes cancel.
    for outside in ("clamp", "mask"):
        weights = ek.rollout_weights(now, sampler, torch.tensor([[1, 1, 0, 0]]), level="sequence", outside=outside)
        assert weights.tolist() == [1.0]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    sequences=st.integers(0, 4),
    length=st.integers(0, 5),
    level=st.sampled_from(["token", "sequence"]),
)
def test_rollout_weights_of_the_same_policy_are_1(seed, sequences, length, level):
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(sequences, length, generator=generator)
    mask = torch.rand(sequences, length, generator=generator) < 0.7
    before = log_probs.clone()
    weights = ek.rollout_weights(log_probs, log_probs.clone(), mask, level=level)
    assert (weights == 1).all() and weights.dtype == torch.float32
    assert torch.equal(log_probs, before)


def test_off_policy_mask_by_hand():
    # Mean drift (sampler - now): (ln 2 + ln 3) / 2 = 0.896, then -that, then 0.
    drift = torch.tensor([[LOG(2), LOG(3)], [-LOG(2), -LOG(3)], [0.0, 0.0], [LOG(2), NAN]], dtype=torch.float64)
    now = torch.full((4, 2), -3.0, dtype=torch.float64)
    for threshold, near in ((0.9, [1, 1, 1, 1]), (0.89, [0, 1, 1, 1]), (0.34, [0, 1, 1, 0]), (0.0, [0, 1, 1, 0])):
        keep = ek.off_policy_mask(now, now + drift, -torch.ones(4), threshold=threshold)
        assert keep.tolist() == [bool(flag) for flag in near], threshold
        assert ek.off_policy_mask(now, now + drift, torch.zeros(4), threshold=threshold).all()
    # Per token, packed, and with a token that does not count.
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    ends = torch.tensor([0, 2, 4])
    keep = ek.off_policy_mask(
        now.reshape(-1)[:4], (now + drift)[:2].reshape(-1), advantages, cu_seqlens=ends, threshold=0.5
    )
    assert keep.tolist() == [False, True, True, True]
    keep = ek.off_policy_mask(now, now + drift, -torch.ones(4), torch.tensor([[1, 0]] * 4), threshold=0.7)
    assert keep.tolist() == [True, True, True, True]


def test_off_policy_mask_as_a_weight_leaves_a_sequence_out_of_the_loss_but_not_of_the_count():
    now = torch.full((2, 2), -1.0, requires_grad=True)
    sampler = torch.tensor([[-0.1, -0.1], [-1.0, -1.0]])
    advantages = torch.tensor([-1.0, -1.0])
    keep = ek.off_policy_mask(now, sampler, advantages, threshold=0.5)
    loss, _ = ek.policy_loss(now, None, advantages, rollout_weights=keep)
    loss.backward()
    assert keep.tolist() == [False, True] and loss == 0.5
    assert now.grad.tolist() == [[0, 0], [0.25, 0.25]]
