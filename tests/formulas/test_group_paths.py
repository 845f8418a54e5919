"""One formula, two ways to it: where values are at hand (a CPU), and where nobody may look at them (a device)."""

import numpy as np
import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.formulas import advantages, arrays, group_metrics, metrics, uncertainty
from egpo_kernels.formulas.tables import GROUP, TOKEN
from egpo_kernels.formulas.token_metrics import BLOCK
from tests.support.accuracy import assert_rounding

NAMES = ("advantages", "weights", "base", "uncertainty", "vector")
RECIPES = dict(ek.recipes.RECIPES) | {
    "raw singles": ek.recipes.EGPO.replace(singleton="raw", all_wrong="negative_no_correct"),
    "renormalised, locked": ek.recipes.EGPO.replace(renorm="before", lock_all_wrong=True),
    "symmetric": ek.recipes.EGPO.replace(clamp="symmetric", renorm="after"),
    "whitened leave-one-out": ek.recipes.EGPO.replace(baseline="leave_one_out", scale="batch_whiten"),
    "raw rewards": ek.recipes.EGPO.replace(baseline="none", scale="batch_std"),
}
IDS = {
    "even": [3, 3, 3, 3, -1, -1, -1, -1, 8, 8, 8, 8],
    "even, mixed up": [3, -1, 8, 3, -1, 8, 8, 8, 3, 3, -1, -1],
    "uneven": [5, 5, 5, 1, 2, 2, 2, 2, 2, 0, 0, 0],
    "uneven, mixed up": [5, 2, 2, 1, 2, 5, 0, 5, 0, 2, 0, 2],
    "alone": list(range(12)),
    "one group": [7] * 12,
}
REWARDS = {
    "binary": [1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1],
    "shaped": [0.1, 0.3, -0.2, 0.7, 0.4, 0.4, 0.4, 0.4, 2.5, 0.3, 0.1 + 0.2, 0.3],
    "broken": [1, torch.nan, 0, torch.inf, torch.nan, torch.nan, 0, -torch.inf, 1, 0, torch.nan, 1],
}


def inputs(ids, rewards, dtype, broken):
    generator = torch.Generator().manual_seed(7)
    values = torch.rand(12, 9, generator=generator, dtype=torch.float64).to(dtype) * 3
    mask = torch.rand(12, 9, generator=generator) < 0.6
    mask[:, 0] = True
    if broken:
        mask[3] = False
        values[5, 0] = torch.nan
        values[~mask] = torch.inf
    return torch.tensor(IDS[ids]), torch.tensor(REWARDS[rewards], dtype=dtype), values, mask


def call(given, config, group_size=None, reported=True, packed=False, look=True):
    ids, rewards, values, mask = given
    lengths = mask.sum(1) if config.scale == "batch_whiten" else None
    offsets = None
    if packed:
        offsets = torch.arange(len(ids) + 1) * values.shape[1]
        values, mask = values.reshape(-1), mask.reshape(-1)
    tolerance = advantages.collapse_tolerance(rewards.dtype)
    return advantages.group_advantages(
        ids, rewards, None, values, mask, lengths, offsets, tolerance, config, group_size, reported, look
    )


def assert_same(found, wanted):
    for name in NAMES:
        one, other = getattr(found, name), getattr(wanted, name)
        assert one.dtype == other.dtype and torch.equal(one.isfinite(), other.isfinite()), name
        assert_rounding(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_looking_changes_nothing(recipe, ids, rewards, dtype):
    given = inputs(ids, rewards, dtype, rewards == "broken")
    for size in (None, 4):
        found, wanted = (call(given, recipe.advantage, size, look=look) for look in (True, False))
        assert_same(found, wanted)
        assert found.vector.shape == (len(GROUP.keys),)


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_padded_and_packed_are_the_same(recipe, rewards):
    given = inputs("uneven, mixed up", rewards, torch.float32, rewards == "broken")
    assert_same(call(given, recipe.advantage), call(given, recipe.advantage, packed=True))


def test_without_a_mask_every_token_counts():
    ids, rewards, values, mask = inputs("uneven", "binary", torch.float32, False)
    config = ek.recipes.EGPO.advantage
    given = (ids, rewards, None, values, None, None, None, 0.0, config, None, True)
    assert_same(advantages.group_advantages(*given), call((ids, rewards, values, torch.ones_like(mask)), config))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_what_is_not_reported_is_not_made(recipe, monkeypatch):
    given = inputs("uneven", "shaped", torch.float32, False)
    wanted = call(given, recipe.advantage)
    monkeypatch.setattr(group_metrics, "raw", None)
    found = call(given, recipe.advantage, reported=False)
    assert found.vector.shape == (0,)
    assert all(torch.equal(one, other) for one, other in zip(found[:-1], wanted[:-1], strict=True))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_nothing_given_is_written_to_or_given_back(recipe):
    given = inputs("even", "shaped", torch.float64, False)
    before = [it.clone() for it in given]
    found = call(given, recipe.advantage)
    assert all(torch.equal(it, old) for it, old in zip(given, before, strict=True))
    places = [it.untyped_storage().data_ptr() for it in (*given, *found)]
    assert len(set(places)) == len(places)
    for it in found:
        it.fill_(5.0)
    assert_same(call(given, recipe.advantage), call(tuple(before), recipe.advantage))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("table", [TOKEN, GROUP], ids=["token", "group"])
def test_both_ways_to_finish(table, dtype, monkeypatch):
    """Every bit the same, over nothing and over infinite values too."""
    generator = torch.Generator().manual_seed(3)
    for number in range(20):
        raw = torch.randn(len(table.slots), generator=generator, dtype=torch.float64).to(dtype) * 10
        counts = sorted({table.slots.index(it.over) for it in table.metrics if it.key in metrics._COUNT_KEYS})
        raw[counts] = torch.randint(0 if number % 2 else 1, 4, (len(counts),), generator=generator).to(dtype)
        if number == 5:
            raw[len(table.sums) :] = torch.inf
        for it in table.metrics:  # an extreme over nothing is -inf
            if it.kind in ("min", "max") and raw[table.slots.index(it.over)] == 0:
                raw[table.slots.index(it.slot)] = -torch.inf
        found = metrics.finish(raw, table)
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "at_hand", lambda values: False)
            wanted = metrics.finish(raw, table)
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_what_is_at_hand():
    assert arrays.at_hand(torch.ones(2))
    assert not arrays.at_hand(torch.ones(2, device="meta"))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not arrays.at_hand(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_both_ways_to_mask(packed, dtype, monkeypatch):
    """A CPU masks bits; what is masked may be anything."""
    _, _, values, mask = inputs("even", "binary", dtype, True)
    # Not contiguous, and one sequence counts nothing.
    values, mask = values.t().contiguous().t(), mask.t().contiguous().t()
    assert not mask[3].any() and not values[~mask].isfinite().any()
    given = (values, mask, None)
    if packed:
        given = (values.reshape(-1), mask.reshape(-1), torch.arange(13) * 9)
    before = values.clone()
    found = uncertainty.token_mean(*given)
    monkeypatch.setattr(uncertainty, "at_hand", lambda values: False)
    wanted = uncertainty.token_mean(*given)
    assert torch.equal(found[0].nan_to_num(), wanted[0].nan_to_num()) and found[0].dtype == torch.float64
    assert found[0].isnan().tolist() == wanted[0].isnan().tolist() == [place in (3, 5) for place in range(12)]
    assert found[1].tolist() == wanted[1].tolist() == mask.sum(1).tolist()
    assert torch.equal(values.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("few", [0, uncertainty.FEW])
def test_few_tokens_are_added_up_by_numpy(few, dtype, monkeypatch):
    """The same sums either way; what is masked may be anything, and one sequence of what counts is not finite."""
    monkeypatch.setattr(uncertainty, "FEW", few)
    _, _, values, mask = inputs("even", "binary", dtype, True)
    exact = torch.where(mask, values, 0.0).double().sum(1)
    for column in (values, values.t().contiguous().t()):
        with np.errstate(all="ignore"):
            total, counts = map(torch.from_numpy, uncertainty.token_sums_at_hand(column, mask, None))
        assert counts.tolist() == mask.sum(1).tolist() and total.dtype == torch.float64
        assert total.isnan().tolist() == [place == 5 for place in range(12)]
        assert_rounding(total.to(dtype), exact.to(dtype))


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, 64 * BLOCK])
def test_sums_of_sequences_lose_no_more_than_their_blocks(length):
    """Equal numbers, whose roundings all go one way: however many there are, two eps are enough."""
    values, mask = torch.full((3, length), 0.1), torch.arange(length).expand(3, -1) >= torch.tensor([[0], [1], [9]])
    at_hand = map(torch.from_numpy, uncertainty.token_sums_at_hand(values, mask, None))
    for found, counts in (uncertainty.token_sums(values, mask, None), at_hand):
        exact = values[0, 0].double() * counts
        assert found.dtype == torch.float64 and counts.tolist() == [length, length - 1, length - 9]
        assert ((found - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("look", [True, False])
def test_nothing(shape, masked, look):
    values, rewards = torch.zeros(shape), torch.ones(shape[0])
    mask = torch.ones(shape, dtype=torch.bool) if masked else None
    ids, config = torch.zeros(shape[0], dtype=torch.long), ek.recipes.EGPO.advantage
    found = advantages.group_advantages(ids, rewards, None, values, mask, None, None, 0.0, config, None, True, look)
    assert (found.advantages == 0).all() and (found.weights == 1).all() and found.uncertainty.isnan().all()
    named = metrics.named(found.vector, GROUP)
    assert named["egpo/sequences/sum"] == named["egpo/empty_sequences/sum"] == shape[0]
    assert named["egpo/groups/sum"] == min(shape[0], 1) and named["egpo/uncertainty/max"].isnan()
