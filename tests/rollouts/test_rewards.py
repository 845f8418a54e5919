"""DAPO's dynamic sampling and length penalty."""

import math

import numpy as np
import pytest
import torch

import egpo_kernels as ek
from tests.support.batches import BACKENDS
from tests.support.device import DEVICE


@pytest.mark.parametrize("groups", [[3, 1, 3, 1, 3, 1], "list", "numpy"])
def test_informative_groups_by_hand(groups):
    ids = [3, 1, 3, 1, 3, 1]
    given = {"list": [str(it) for it in ids], "numpy": np.array(ids, dtype=object)}.get(str(groups), torch.tensor(ids))
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert ek.informative_groups(given, rewards).tolist() == [True, False, True, False, True, False]


def test_informative_groups_of_odd_rewards():
    assert ek.informative_groups(1, torch.tensor([1.0, 0.0])).tolist() == [False, False], "nobody to compare with"
    rewards = torch.tensor([1.0, math.nan, 1.0, 1.0 + 1e-7, 0.3, 0.31])  # 1e-7 is rounding in float32
    assert ek.informative_groups(2, rewards).tolist() == [False, False, False, False, True, True]
    assert ek.informative_groups(4, torch.zeros(0)).tolist() == []
    assert ek.informative_groups(2, torch.tensor([0, 1])).all()


DIFFER = {
    "large, as reported": torch.tensor([1000000.0, 1000000.5, 1000000.0, 1000000.5]),
    "small": torch.tensor([0.0, 1e-6, 0.0, 1e-6]),
    "integers": torch.tensor([2**24, 2**24 - 1] * 2),
    "float64": torch.tensor([1.0, 1.0 + 1e-12] * 2, dtype=torch.float64),
    "float16": torch.tensor([1.0, 1.01] * 2, dtype=torch.float16),
    "bools": torch.tensor([True, False] * 2),
}
ALIKE = {
    "sums": torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64),
    "float32": torch.tensor([1e6, 1e6 + 0.25, 1e6, 1e6]),
    "bfloat16": torch.tensor([1.0, 1.0 + 2**-7] * 2, dtype=torch.bfloat16),
    "zeros": torch.zeros(4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*DIFFER, *ALIKE])
def test_rewards_that_differ_are_no_collapsed_group(name, backend):
    """By units in the last place of the dtype that they were given in."""
    rewards = DIFFER.get(name, ALIKE.get(name)).to(DEVICE)
    assert ek.informative_groups(4, rewards).tolist() == [name in DIFFER] * 4
    found = ek.group_advantages(4, rewards, config=ek.recipes.GRPO.advantage, backend=backend)
    assert found.base.dtype == (torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    assert found.advantages.any() == (name in DIFFER)
    assert found.metrics["egpo/advantage/sum"].dtype == found.base.dtype
    if name == "large, as reported":
        value = 0.25 / (0.25 * math.sqrt(4 / 3) + 1e-6)
        torch.testing.assert_close(found.base.cpu(), torch.tensor([-value, value] * 2))


def test_whole_numbers_that_float32_does_not_hold(monkeypatch, values_are_checked):
    """They would differ and count as equal."""
    rewards = torch.tensor([2**24, 2**24 + 1] * 2, device=DEVICE)
    for call in (ek.informative_groups, ek.group_advantages):
        with pytest.raises(ValueError, match=r"rewards holds 16777217, which float32 does not; .* rewards.double"):
            call(4, rewards, **({"config": ek.recipes.GRPO.advantage} if call is ek.group_advantages else {}))
    assert ek.informative_groups(4, rewards.double()).all()
    monkeypatch.setattr("egpo_kernels.inputs.validation.checks_values", lambda device: False)  # as on a GPU
    found = ek.group_advantages(4, rewards, config=ek.recipes.GRPO.advantage)
    assert found.metrics["egpo/invalid_rewards/sum"] == 2


def test_informative_groups_tell_a_number_from_its_name():
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert not ek.informative_groups([1, "1", 2, "2"], rewards).any(), "four groups of one"
    assert ek.informative_groups([1, 1, "1", "1"], rewards).all()


def test_informative_groups_are_those_with_a_group_relative_advantage():
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(64, generator=generator) < 0.2).float()
    found = ek.group_advantages(4, rewards, config=ek.recipes.DAPO.advantage)
    assert torch.equal(ek.informative_groups(4, rewards), found.base != 0)


def test_soft_overlong_penalty_by_hand():
    lengths = torch.tensor([0, 80, 85, 90, 100, 101, 10**6])
    found = ek.soft_overlong_penalty(lengths, 100, 20)
    torch.testing.assert_close(found, torch.tensor([0, 0, -0.25, -0.5, -1, -1, -1]), rtol=0, atol=0)
    assert found.dtype == torch.float32
    for wrong in (torch.tensor(5), torch.tensor([[5, 6]])):
        with pytest.raises(ValueError, match=r"lengths has shape .* must be \[S\]"):
            ek.soft_overlong_penalty(wrong, 100, 20)
    assert ek.soft_overlong_penalty(torch.tensor([0, 50, 100], dtype=torch.int32), 100, 100).tolist() == [0, -0.5, -1]
