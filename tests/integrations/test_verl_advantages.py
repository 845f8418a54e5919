"""Advantages of whole groups through verl's trainers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("verl", reason="verl is not installed (make parity installs it)")

from omegaconf import OmegaConf

import egpo_kernels as ek
from tests.integrations.verl_runs import (
    BATCH,
    REWARDS,
    advantages,
    algorithm,
    expected_advantages,
    ray_trainer,
    rollout,
    v1,
)
from tests.support.accuracy import assert_bits
from tests.support.page import PAGES


@pytest.mark.parametrize("through", ["ray_trainer", "v1"])
@pytest.mark.parametrize("kind", ["hydra", "dataclass"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nsr_scale": 0.5, "weight_bounds": [0.9, 1.5]},
        {"recipe": "egpo_c5"},
        {"recipe": "dapo"},
        {"recipe": "rloo", "singleton": "raw"},
    ],
    ids=str,
)
def test_advantages_are_our_own(settings, kind, through):
    data = advantages(rollout(), algorithm(kind=kind, **settings), through)
    changes = {name: value for name, value in settings.items() if name != "recipe"}
    recipe = ek.recipes.RECIPES[settings.get("recipe", "egpo")]
    expected = expected_advantages(config=recipe.replace(**changes).advantage)
    assert_bits(data.batch["advantages"], expected, "advantages")
    assert_bits(data.batch["returns"], expected, "returns")
    assert expected.any()


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 8), st.lists(st.sampled_from("abc"), min_size=8, max_size=8))
def test_groups_may_come_in_any_order(order, size, names):
    uid = np.array([f"{name}-{name}" for name in names], dtype=object)
    rows = list(order[:size])
    data = advantages(rollout(uid=uid).select_idxs(rows), algorithm(), "v1")
    assert_bits(data.batch["advantages"], expected_advantages(uid=uid, rows=rows), "advantages")


def test_other_estimators_are_verls():
    data = advantages(rollout(), algorithm("grpo"))
    plain = ray_trainer.compute_advantage.__wrapped__(
        rollout(), adv_estimator="grpo", config=algorithm("grpo"), num_repeat=4
    )
    assert_bits(data.batch["advantages"], plain.batch["advantages"], "advantages")
    assert v1.compute_advantage is ray_trainer.compute_advantage


@pytest.mark.parametrize("through", ["ray_trainer", "v1"])
def test_correctness_is_of_the_scores(through):
    rewards = REWARDS - 0.9  # a KL in the rewards
    data = advantages(rollout(rewards, scores=REWARDS), algorithm(), through)
    assert_bits(data.batch["advantages"], expected_advantages(rewards, correct=REWARDS > 0.5), "advantages")
    assert not torch.equal(data.batch["advantages"], expected_advantages(rewards))
    unscored = rollout(rewards)
    del unscored.batch["token_level_scores"]
    assert_bits(advantages(unscored, algorithm()).batch["advantages"], expected_advantages(rewards), "advantages")


def test_all_wrong_with_a_kl_in_the_rewards():
    """Such rewards differ, and the rule for groups that agree does not see them; the page names the one that does."""
    assert "+algorithm.egpo.all_wrong=negative_no_correct" in PAGES["docs/verl.md"]
    wrong = torch.zeros(8)
    data = advantages(rollout(-torch.arange(8) / 100, scores=wrong), algorithm(all_wrong="negative_no_correct"))
    assert_bits(data.batch["advantages"], expected_advantages(wrong), "advantages")


def test_log_probs_of_the_sampler_do():
    data = advantages(rollout(log_probs="rollout_log_probs"), algorithm())
    assert_bits(data.batch["advantages"], expected_advantages(), "advantages")
    both = rollout()
    both.batch["rollout_log_probs"] = BATCH.log_probs
    assert_bits(advantages(both, algorithm()).batch["advantages"], expected_advantages(), "advantages")
    without = advantages(rollout(log_probs=None), algorithm(weight="none"))
    config = ek.recipes.EGPO.replace(weight="none").advantage
    assert_bits(without.batch["advantages"], expected_advantages(config=config), "advantages")


def test_sessions_of_several_outputs():
    """With adv_estimator=grpo verl passes on only the last output of a session and spreads its advantage."""
    keys = ["p_0_0", "p_0_1", "p_1_0", "p_2_0", "p_2_1", "p_3_0", "p_4_0", "p_5_0"]
    config, uid = algorithm("grpo", recipe="egpo"), np.array(["p"] * 8, dtype=object)
    data = v1.compute_advantage_for_multi_trajectories(
        rollout(uid=uid), batch_keys=keys, adv_estimator="grpo", config=config
    )
    last = [1, 2, 4, 5, 6, 7]
    found = ek.group_advantages(6, REWARDS[last], BATCH.old_log_probs[last], BATCH.mask[last]).advantages
    spread = found[[0, 0, 1, 2, 2, 3, 4, 5]]
    assert_bits(data.batch["advantages"], spread[:, None] * BATCH.mask, "advantages")


def test_a_mask_is_made_where_there_is_none():
    data = rollout()
    del data.batch["response_mask"]
    data.batch["responses"] = torch.zeros(8, 24).long()
    data.batch["attention_mask"] = torch.cat([torch.ones(8, 3), BATCH.mask], -1).long()
    assert_bits(advantages(data, algorithm()).batch["advantages"], expected_advantages(), "advantages")


@pytest.mark.parametrize(
    "config, given, message",
    [
        (algorithm(nsr_scale=-1.0), {}, r"algorithm\.egpo\.nsr_scale is -1\.0; it must be"),
        (algorithm(clip_high=0.2), {}, r"algorithm\.egpo has no setting 'clip_high'; it must be one of baseline, "),
        (algorithm(recipe="ppo"), {}, r"algorithm\.egpo: recipe is 'ppo'; it must be .* one of egpo, "),
        (algorithm(recipe="edge_grpo"), {}, r"entropy is None with weight .* statistic 'shannon'; it must be given"),
        (algorithm(), {"log_probs": None}, r"neither old_log_probs nor rollout_log_probs.*calculate_log_probs=True"),
        (algorithm("rloo", nsr_scale=0.5), {}, r"algorithm\.adv_estimator is 'rloo' beside algorithm\.egpo"),
        (algorithm("gae", nsr_scale=0.5), {}, r"algorithm\.adv_estimator is 'gae' beside algorithm\.egpo"),
        (
            OmegaConf.create({"adv_estimator": "egpo", "egpo": [1]}),
            {},
            r"algorithm\.egpo is \[1\]; it must be settings",
        ),
        (
            OmegaConf.create({"adv_estimator": "egpo", "egpo": True}),
            {},
            r"algorithm\.egpo is True; it must be settings",
        ),
    ],
)
def test_refused_advantages(config, given, message):
    with pytest.raises(ValueError, match=message):
        advantages(rollout(**given), config)


def test_verls_own_normalisation_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.norm_adv_by_std_in_grpo is False; it must be True here"):
        advantages(rollout(), algorithm(), norm_adv_by_std_in_grpo=False)
