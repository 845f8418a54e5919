"""Groups of every kind of id, groups that are not whole, rewards and uncertainties that are no numbers."""

import uuid

import numpy as np
import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.inputs import validation
from tests.support.accuracy import assert_rounding
from tests.support.batches import EVERY_BACKEND, EVERY_LAYOUT, make_batch, whole_groups
from tests.support.device import DEVICE

NAMES = [uuid.UUID(int=7), uuid.UUID(int=3)]
IDS = {
    "int": 2,
    "int64": torch.tensor([5, 5, -9, -9]),
    "int32": torch.tensor([1, 1, 0, 0], dtype=torch.int32),
    "uint8": torch.tensor([200, 200, 3, 3], dtype=torch.uint8),
    "huge": torch.tensor([2**62, 2**62, -(2**62), -(2**62)]),
    "on the device": torch.tensor([5, 5, -9, -9]).to(DEVICE),
    "strings": ["b", "b", "a", "a"],
    "tuple": ("b", "b", "", ""),
    "integers": [3, 3, 1, 1],
    "uuids": [NAMES[0], NAMES[0], NAMES[1], NAMES[1]],
    "numpy integers": np.array([9, 9, 4, 4]),
    "numpy strings": np.array(["x", "x", "y", "y"]),
    "numpy objects": np.array([str(NAMES[0])] * 2 + [str(NAMES[1])] * 2, dtype=object),
}


@pytest.fixture
def unseen(monkeypatch):
    """As on a GPU: values are not looked at."""
    monkeypatch.setattr(validation, "checks_values", lambda device: False)


def advantages(batch, backend, **changes):
    arguments = {"groups": batch.groups, "rewards": batch.rewards, "old_log_probs": batch.old_log_probs}
    arguments |= {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens, "backend": backend}
    return ek.group_advantages(**(arguments | changes))


@pytest.mark.parametrize("groups", IDS.values(), ids=IDS)
@EVERY_BACKEND
def test_any_ids_mean_the_same(groups, backend):
    batch = make_batch()
    wanted = advantages(batch, backend)
    found = advantages(batch, backend, groups=groups)
    for name in ("advantages", "weights", "base", "uncertainty"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert found.metrics["egpo/groups/mixed/sum"] == 2


@EVERY_LAYOUT
@EVERY_BACKEND
def test_order_of_groups_does_not_matter(layout, backend):
    batch = make_batch(layout)
    interleaved = advantages(batch, backend, groups=["a", "b", "b", "a"])
    numbered = advantages(batch, backend, groups=torch.tensor([8, -1, -1, 8]))
    assert torch.equal(interleaved.advantages, numbered.advantages)
    assert interleaved.metrics["egpo/groups/sum"] == 2


# Whole groups.


@pytest.mark.parametrize("groups", [["a", "a", "a", "b"], np.array([1, 1, 1, 2]), torch.tensor([1, 1, 1, 2])], ids=type)
@EVERY_BACKEND
def test_group_that_is_not_whole_raises(groups, backend):
    batch = make_batch()
    with pytest.raises(ValueError, match=r"groups holds 2 groups that are not whole.*group_size = 2"):
        advantages(batch, backend, groups=groups, group_size=2)
    with pytest.raises(ValueError, match="groups holds 2 groups that are not whole"):
        whole_groups(batch._replace(groups=groups), backend, group_size=2)
    advantages(batch, backend, groups=groups)
    advantages(batch, backend, groups=2, group_size=2)
    with pytest.raises(ValueError, match="group_size is 4"):
        advantages(batch, backend, groups=2, group_size=4)


@EVERY_BACKEND
def test_group_on_the_device_that_is_not_whole_raises_where_values_are_checked(backend, values_are_checked):
    batch = make_batch()
    with pytest.raises(ValueError, match="groups holds 2 groups that are not whole"):
        advantages(batch, backend, groups=torch.tensor([1, 1, 1, 2], device=DEVICE), group_size=2)


@EVERY_LAYOUT
@EVERY_BACKEND
def test_unseen_group_that_is_not_whole_gives_nan(layout, backend, unseen):
    batch = make_batch(layout, lengths=(3, 2, 4, 1, 2))
    groups = torch.tensor([0, 1, 1, 1, 0], device=DEVICE)
    found, wanted = advantages(batch, backend, groups=groups, group_size=2), advantages(batch, backend, groups=groups)
    assert found.advantages.isnan().tolist() == [False, True, True, True, False]
    assert torch.equal(found.advantages[[0, 4]], wanted.advantages[[0, 4]])
    assert found.metrics["egpo/incomplete_groups/sum"] == 1
    assert wanted.metrics["egpo/incomplete_groups/sum"] == 0
    whole = advantages(batch, backend, groups=groups * 0, group_size=5)
    assert whole.advantages.isfinite().all() and whole.metrics["egpo/incomplete_groups/sum"] == 0


@EVERY_BACKEND
def test_names_are_counted_on_the_host_when_tensors_are_elsewhere(backend):
    # On the device only ids are compared, but names are at hand before anything is sent there.
    meta = torch.empty(4, device="meta")
    for groups in (["a", "a", "a", "b"], np.array([1, 1, 1, 2]), torch.tensor([1, 1, 1, 2])):
        with pytest.raises(ValueError, match="not whole"):
            ek.group_advantages(
                groups, meta, config=ek.AdvantageConfig(weight="none"), group_size=2, backend="portable"
            )


# Rewards and uncertainties.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@EVERY_LAYOUT
@EVERY_BACKEND
def test_non_finite_reward_is_left_out(bad, layout, backend):
    batch = make_batch(layout, lengths=(3, 2, 4, 1))
    rewards = torch.tensor([1.0, bad, 0.0, 1.0], device=DEVICE)
    found = advantages(batch, backend, rewards=rewards, groups=4)
    kept = [0, 2, 3]
    assert found.advantages[1] == 0 and found.advantages.isfinite().all()
    usable = rewards[kept]
    wanted = (usable - usable.mean()) / (usable.std() + 1e-6)
    torch.testing.assert_close(found.base[kept], wanted)
    assert found.metrics["egpo/invalid_rewards/sum"] == 1
    # Fewer than two usable rewards tell nothing.
    lonely = advantages(batch, backend, rewards=rewards)
    assert (lonely.base[:2] == 0).all() and lonely.metrics["egpo/groups/unusable/sum"] == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@EVERY_LAYOUT
@EVERY_BACKEND
def test_sequence_without_a_finite_uncertainty_has_weight_one(bad, layout, backend):
    batch = make_batch(layout, lengths=(3, 2, 4, 1))
    old = batch.old_log_probs.clone()
    old[batch.at(0, 1)] = bad
    found = advantages(batch, backend, old_log_probs=old, groups=4)
    assert found.uncertainty.isnan().tolist() == [True, False, False, False]
    assert found.weights[0] == 1 and found.weights.isfinite().all()
    unclamped = ek.AdvantageConfig(clamp="none")
    weights = advantages(batch, backend, old_log_probs=old, groups=4, config=unclamped).weights
    own = found.uncertainty[1:]
    torch.testing.assert_close(weights[1:], own.mean() / (own + 1e-5))


@EVERY_LAYOUT
@EVERY_BACKEND
def test_empty_sequence_keeps_its_reward(layout, backend):
    batch = make_batch(layout, lengths=(3, 0, 4, 1))
    found = advantages(batch, backend, groups=4)
    assert found.uncertainty.isnan().tolist() == [False, True, False, False]
    assert found.weights[1] == 1 and found.metrics["egpo/empty_sequences/sum"] == 1
    rewards = batch.rewards
    torch.testing.assert_close(found.base, (rewards - rewards.mean()) / (rewards.std() + 1e-6))


def test_weight_needs_its_source():
    batch = make_batch()
    with pytest.raises(ValueError, match="old_log_probs is None"):
        ek.group_advantages(2, batch.rewards)
    with pytest.raises(ValueError, match="entropy is None"):
        ek.group_advantages(2, batch.rewards, batch.old_log_probs, config=ek.AdvantageConfig(statistic="shannon"))
    with pytest.raises(ValueError, match="old_log_probs is None"):
        ek.group_advantages(2, batch.rewards, entropy=-batch.old_log_probs)
    ek.group_advantages(2, batch.rewards, config=ek.AdvantageConfig(weight="none"))


# Every recipe's advantages.

EVERY_RECIPE = pytest.mark.parametrize("recipe", ek.recipes.RECIPES.values(), ids=list(ek.recipes.RECIPES))


def of_recipe(batch, recipe, backend, **changes):
    """Advantages of a recipe, whatever its uncertainty comes from."""
    entropy = changes.pop("entropy", batch.old_log_probs.abs() + 0.5)
    return advantages(batch, backend, config=recipe.advantage, entropy=entropy, **changes)


@EVERY_RECIPE
@EVERY_LAYOUT
@EVERY_BACKEND
def test_masked_positions_say_nothing(recipe, layout, backend):
    batch = make_batch(layout)
    # Two tokens count for the loss and not for the uncertainty.
    certain = batch.mask.clone()
    for sequence in (0, 3):
        certain[batch.at(sequence, 0)] = False
    entropy = batch.old_log_probs.abs() + 0.5
    wanted = of_recipe(batch, recipe, backend, entropy_mask=certain, entropy=entropy)
    assert wanted.advantages.isfinite().all() and wanted.uncertainty.isfinite().all()
    unused = ~(batch.counts & certain)
    for value in (torch.nan, torch.inf, -torch.inf):
        spoiled = {"old_log_probs": batch.old_log_probs, "entropy": entropy}
        spoiled = {name: given.masked_fill(unused, value) for name, given in spoiled.items()}
        found = of_recipe(batch, recipe, backend, entropy_mask=certain, **spoiled)
        for name in ("advantages", "weights", "base", "uncertainty"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert all(torch.equal(found.metrics[key], seen) for key, seen in wanted.metrics.items() if not seen.isnan())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@EVERY_RECIPE
@EVERY_LAYOUT
@EVERY_BACKEND
def test_non_finite_reward_gets_no_advantage_and_spoils_no_other(bad, recipe, layout, backend):
    batch = make_batch(layout)
    found = of_recipe(batch, recipe, backend, rewards=torch.tensor([1.0, bad, 0.0, 1.0], device=DEVICE))
    assert found.advantages[1] == 0 and found.advantages.isfinite().all()
    assert found.metrics["egpo/invalid_rewards/sum"] == 1


@pytest.mark.parametrize("sequences, tokens", [(0, 4), (4, 0), (0, 0)], ids=["no_sequences", "no_tokens", "nothing"])
@EVERY_RECIPE
@EVERY_BACKEND
def test_nothing_in_the_batch(sequences, tokens, recipe, backend):
    empty = torch.zeros(sequences, tokens, device=DEVICE)
    rewards = torch.ones(sequences, device=DEVICE)
    found = ek.group_advantages(2, rewards, empty, entropy=empty, config=recipe.advantage, backend=backend)
    assert all(result.shape == (sequences,) and result.isfinite().all() for result in found[:3])
    assert found.uncertainty.isnan().all() and found.metrics["egpo/sequences/sum"] == sequences


@EVERY_RECIPE
@EVERY_LAYOUT
@EVERY_BACKEND
def test_nothing_counts(recipe, layout, backend):
    batch = make_batch(layout)
    found = of_recipe(batch, recipe, backend, mask=torch.zeros_like(batch.mask))
    assert found.advantages.isfinite().all() and (found.weights == 1).all()


@pytest.mark.parametrize("offset", [1e4, -1e6, 2.0**22])
@EVERY_BACKEND
def test_far_rewards_lose_nothing_to_their_mean(offset, backend):
    # As E[x^2] - E[x]^2 the variance would be 0, or less.
    config = ek.AdvantageConfig(weight="none", all_wrong="zero")
    rewards = torch.tensor([0.0, 4.0, 8.0, 4.0], device=DEVICE)
    near = ek.group_advantages(4, rewards, config=config, backend=backend)
    far = ek.group_advantages(4, rewards + offset, config=config, backend=backend)
    assert_rounding(far.advantages, near.advantages)
