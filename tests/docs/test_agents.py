"""Trajectories of several rows, as the page on agents has them, against plain Python loops over trajectories."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.support.accuracy import assert_rounding
from tests.support.page import at_hand, run

pytestmark = pytest.mark.cpu
SUMS = (ek.recipes.EGPO.loss, ek.recipes.RLOO.loss, ek.recipes.DR_GRPO.replace(norm_length=9.0).loss)
SHARED = (ek.recipes.GRPO.loss, ek.recipes.GSPO.loss, ek.recipes.GMPO.loss)


def on_the_page(trajectory, groups, rewards):
    """The names that the page leaves, with its sixteen rows in these trajectories."""
    names = at_hand() | {"trajectory": torch.tensor(trajectory), "groups": torch.tensor(groups)}
    names["rewards"] = torch.tensor(rewards, dtype=torch.float64)
    names["response_mask"] = torch.rand(16, 6, generator=torch.Generator().manual_seed(5)) > 0.4
    names["response_mask"][:, 1] = True  # every trajectory has a token that counts
    names["response_mask"][0] = torch.arange(6) % 2 == 1  # three turns
    names["turn_advantages"] = torch.arange(48, dtype=torch.float64).view(16, 3)
    return run("docs/agents.md", names)


# Rows of a trajectory apart from one another; a group all wrong, one mixed, one of a single trajectory.
NAMES = on_the_page([3, 0, 5, 1, 0, 2, 6, 3, 3, 4, 1, 0, 6, 2, 5, 0], [7, 2, 7, 2, 7, 2, 9], [0, 1, 0, 0, 0, 1, 1])


def advantages_by_loop(names):
    """EGPO's advantages (arXiv 2602.22751, Eq. 2, 5-8, 10, 11, 13), a trajectory and a group at a time."""
    written = [[] for _ in names["rewards"]]
    for row, number in enumerate(names["trajectory"].tolist()):
        written[number] += names["old_log_probs"][row][names["mask"][row]].tolist()
    uncertainty = [-statistics.fmean(log_probs) for log_probs in written]
    rewards, groups = names["rewards"].tolist(), names["groups"].tolist()
    found = []
    for reward, group, own in zip(rewards, groups, uncertainty, strict=True):
        members = [number for number, other in enumerate(groups) if other == group]
        of_group = [rewards[number] for number in members]
        weight = statistics.fmean(uncertainty[number] for number in members) / (own + 1e-5)
        weight = min(max(weight, 1.0 if reward > 0.5 else 0.8), 2.0 if reward > 0.5 else 1.0)
        if len(members) == 1:
            found.append(0.0)
        elif max(of_group) == min(of_group):
            found.append(weight * (0.0 if reward > 0.5 else -1.0))
        else:
            centred = reward - statistics.fmean(of_group)
            found.append(weight * centred / (statistics.stdev(of_group) + 1e-6))
    return torch.tensor(found, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_advantages_are_those_of_a_loop_over_trajectories(data):
    count = data.draw(st.integers(1, 16))
    rest = data.draw(st.lists(st.integers(0, count - 1), min_size=16 - count, max_size=16 - count))
    trajectory = data.draw(st.permutations([*range(count), *rest]))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    rewards = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=count, max_size=count))
    names = on_the_page(trajectory, groups, rewards)
    expected = advantages_by_loop(names)
    assert_rounding(names["rollout"].advantages, expected)
    assert_rounding(names["advantages"], expected[trajectory])


def test_rows_are_told_from_trajectories():
    right, order = NAMES["advantages"], NAMES["trajectory"]
    of_rows = ek.group_advantages(
        NAMES["groups"][order], NAMES["rewards"][order], NAMES["old_log_probs"], NAMES["mask"]
    ).advantages
    assert (right - of_rows).abs().max() > 0.1


def gradient_of(function):
    NAMES["table"].grad = None
    loss = function()
    return loss, NAMES["table"].grad.clone()


def by_rows(config, **counts):
    loss, _ = ek.logits_policy_loss(
        NAMES["model"](NAMES["input_ids"]),
        NAMES["tokens"],
        NAMES["advantages"],
        NAMES["mask"],
        old_log_probs=NAMES["old_log_probs"],
        config=config,
        **counts,
    )
    loss.backward()
    return loss.detach()


@pytest.fixture
def off_policy(monkeypatch):
    """Ratios that differ from 1."""
    noise = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    monkeypatch.setitem(NAMES, "old_log_probs", NAMES["old_log_probs"] + 0.3 * noise)


@pytest.mark.parametrize("trajectories", [1, 2, 7])
@pytest.mark.parametrize("config", SUMS + SHARED, ids=lambda config: f"{config.reduction}, {config.surrogate}")
def test_micro_batches_of_trajectories_add_up_to_a_loop(config, trajectories, off_policy):
    """A trajectory's tokens in one row of their own, which is what its rows stand for."""
    order, mask = NAMES["trajectory"], NAMES["mask"]
    longest = max(int(mask[order == number].sum()) for number in range(7))
    whole = torch.zeros(7, longest, dtype=torch.bool)
    tokens, old = torch.zeros(7, longest, dtype=torch.long), torch.zeros(7, longest, dtype=torch.float64)
    ids = torch.zeros(7, longest, dtype=torch.long)
    for number in range(7):
        rows = order == number
        length = int(mask[rows].sum())
        whole[number, :length] = True
        for row, values in ((tokens, "tokens"), (old, "old_log_probs"), (ids, "input_ids")):
            row[number, :length] = NAMES[values][rows][mask[rows]]

    def function():
        loss, _ = ek.logits_policy_loss(
            NAMES["model"](ids), tokens, NAMES["rollout"].advantages, whole, old_log_probs=old, config=config
        )
        loss.backward()
        return loss.detach()

    expected, gradient = gradient_of(function)
    found, own = gradient_of(lambda: NAMES["by_trajectories"](config, trajectories))
    assert_rounding(found, expected)
    assert_rounding(own, gradient)
    counts = {"num_tokens": NAMES["mask"].sum(), "num_sequences": 7}
    in_rows, of_rows = gradient_of(lambda: by_rows(config, **counts))
    if config in SUMS:
        assert_rounding(in_rows, expected)
        assert_rounding(of_rows, gradient)
    else:
        assert (of_rows - gradient).abs().max() > 1e-3 * gradient.abs().max()


def test_turns_have_their_own_advantages():
    by_hand = torch.zeros(16, 6, dtype=torch.float64)
    for row, counts in enumerate(NAMES["mask"].tolist()):
        turn, before = -1, False
        for position, written in enumerate(counts):
            turn += written and not before
            before = written
            if written:
                by_hand[row, position] = NAMES["advantages"][row] + NAMES["turn_advantages"][row, turn]
    assert_rounding(NAMES["per_token"].where(NAMES["mask"], 0.0), by_hand)
    assert NAMES["turn"].max() == 2
