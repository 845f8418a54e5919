"""TRL's own loss, advantages and helpers beside ours."""

import dataclasses
import functools

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed (make parity installs it)")

from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

import egpo_kernels as ek
from tests.parity import trl_trainer
from tests.parity.batch import Answer, assert_same, assert_told_apart, make_batch, ours, same, written
from tests.parity.facts import Same, arguments, combinations, named
from tests.parity.facts_trl import TRL
from tests.support.accuracy import assert_rounding

BATCH = make_batch()
NAMES = BATCH._asdict() | {"num_items_in_batch": torch.tensor(400), "num_processes": 2}
WHOLE = {name: NAMES[name] for name in ("num_items_in_batch", "num_processes")}
GROUP = {"reduction": "seq_mean_token_mean"}
REWARDS = torch.tensor([1.0, 0.0, 0.5, torch.nan, 2.0, -1.0, 2.0, 0.1])


def advantages(rewards=REWARDS, **settings):
    config = ek.recipes.GRPO.replace(**settings).advantage
    return ek.group_advantages(rewards.numel() // 2, rewards, config=config).advantages


@pytest.mark.parametrize("rows", combinations(TRL), ids=lambda rows: f"{rows[0].theirs}, {rows[1].theirs}")
def test_losses(rows: tuple[Same, Same]):
    given, options = written(rows, "ours", NAMES), written(rows, "theirs", NAMES)
    assert_same(ours(BATCH, **given), trl_trainer.loss(BATCH, **WHOLE, **options))


def test_the_batch_tells_the_settings_apart():
    assert_told_apart(BATCH, TRL, NAMES, functools.partial(trl_trainer.loss, BATCH, **WHOLE))


@pytest.mark.parametrize("row", TRL.advantages, ids=lambda row: row.theirs)
def test_advantages(row: Same):
    found = trl_trainer.rollout(BATCH, REWARDS, **arguments(row.theirs, NAMES))["advantages"]
    assert_rounding(advantages(**arguments(row.ours, NAMES)), found)


def test_options_exist():
    assert named(TRL) - {"cispo", "dr_grpo"} <= {field.name for field in dataclasses.fields(GRPOConfig)}


def test_soft_overlong_punishment():
    (row,) = TRL.helpers
    lengths = torch.tensor([0, 1, 80, 81, 90, 100, 101, 500])
    theirs = eval(row.theirs, {"get_soft_overlong_punishment": get_soft_overlong_punishment})
    expected = torch.tensor(theirs([[1] * length for length in lengths.tolist()]))
    assert_rounding(arguments(f"found={row.ours}", {"lengths": lengths})["found"], expected)


def test_trl_counts_empty_responses():
    batch = make_batch(empty=True)
    for loss_type in ("grpo", "dr_grpo"):
        (row,) = [row for row in TRL.losses if f'"{loss_type}"' in row.theirs]
        settings = arguments(row.ours, NAMES)
        theirs = trl_trainer.loss(batch, **arguments(row.theirs, NAMES))
        found = ours(batch, **settings)
        assert_same(Answer(*(value * 7 / 8 for value in found)), theirs)
        assert_same(ours(batch, num_sequences=len(batch.mask), **settings), theirs)


def test_trl_averages_the_entropy_over_tokens():
    theirs = trl_trainer.loss(BATCH, loss_type="grpo", entropy_coef=0.1)
    assert not same(ours(BATCH, **GROUP, entropy_coef=0.1), theirs)
    found = ours(BATCH, **GROUP)
    bonus = 0.1 * BATCH.entropy[BATCH.mask].mean()
    assert_same(found._replace(loss=found.loss - bonus), theirs)


def test_trl_gives_the_bonus_to_the_kept_tokens():
    kept = ek.top_entropy_mask(BATCH.entropy, BATCH.mask, fraction=0.2)
    given = {"reduction": "token_mean", "rollout_weights": kept.float()}
    theirs = trl_trainer.loss(BATCH, loss_type="bnpo", entropy_coef=0.1, top_entropy_quantile=0.2)
    assert not same(ours(BATCH, **given, entropy_coef=0.1), theirs)
    found = ours(BATCH, **given)
    assert_same(found._replace(loss=found.loss - 0.1 * BATCH.entropy[kept].mean()), theirs)


def test_trl_bounds_above_one_plus_epsilon():
    below, above = {"delta": 1.1, "epsilon_high": 0.5}, {"delta": 1.5, "epsilon_high": 0.5}
    theirs = trl_trainer.loss(BATCH, loss_type="grpo", **below)
    assert not same(ours(BATCH, **GROUP, clip_high=0.5, dual_clip=1.1), theirs)
    assert_same(ours(BATCH, **GROUP, clip_high=0.5, dual_clip=1.5), trl_trainer.loss(BATCH, loss_type="grpo", **above))
    # Where A < 0 the bound is 1 + epsilon_high all the same; where A > 0 it is delta.
    positive = BATCH._replace(advantages=BATCH.advantages.abs())
    negative = BATCH._replace(advantages=-BATCH.advantages.abs())
    assert_same(ours(positive, **GROUP, clip_high=0.1), trl_trainer.loss(positive, loss_type="grpo", **below))
    assert_same(
        ours(negative, **GROUP, clip_high=0.5, dual_clip=1.5), trl_trainer.loss(negative, loss_type="grpo", **below)
    )


def far(name: str, distance: float):
    """The batch with one counted token, of negative advantage, that far from the current policy."""
    values = getattr(BATCH, name).clone()
    values[4, 2] = BATCH.log_probs[4, 2] + distance
    return BATCH._replace(**{name: values})


def test_trl_does_not_clamp_log_ratios():
    batch = far("old_log_probs", -30)
    theirs = trl_trainer.loss(batch, loss_type="grpo")
    found = ours(batch, **GROUP)
    assert theirs.loss > 1e9 > found.loss and theirs.gradient[4, 2] != 0 == found.gradient[4, 2]
    assert_same(ours(batch, **GROUP, max_log_ratio=60.0), theirs)
    assert trl_trainer.loss(far("old_log_probs", -100), loss_type="grpo").loss.isinf()


def test_trl_clamps_nothing_in_the_kl():
    batch = far("ref_log_probs", 30)
    theirs = trl_trainer.loss(batch, loss_type="grpo", beta=0.1, use_bias_correction_kl=False)
    found = ours(batch, **GROUP, kl_coef=0.1)
    assert theirs.gradient[4, 2] < -1e9 and found.gradient[4, 2].abs() < 1
    assert_same(ours(batch, **GROUP, kl_coef=0.1, max_log_ratio=60.0), theirs)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo"])
def test_trl_takes_sequence_level_with_every_loss(loss_type):
    theirs = trl_trainer.loss(BATCH, loss_type=loss_type, epsilon_high=5.0, importance_sampling_level="sequence")
    assert theirs.loss.isfinite()
    with pytest.raises(ValueError, match="ratio"):
        ek.PolicyLossConfig(surrogate=loss_type, ratio="sequence")


def test_trl_vespo():
    theirs = trl_trainer.loss(BATCH, loss_type="vespo")
    log_ratio = BATCH.log_probs - BATCH.old_log_probs
    gamma = GRPOTrainer.get_gamma_weights(BATCH.advantages[:, None], log_ratio, BATCH.mask, None)
    found = ours(BATCH, old_log_probs=None, rollout_weights=gamma)
    assert_rounding(found.gradient, theirs.gradient)
    assert not same(found, theirs)
    with pytest.raises(ValueError, match="surrogate"):
        ek.PolicyLossConfig(surrogate="vespo")


def test_trl_divides_rounding_by_epsilon():
    rewards = torch.tensor([0.9] * 6 + [0.6] * 6)
    batch = type(BATCH)(*(value.repeat(2, *([1] * (value.dim() - 1)))[:12] for value in BATCH))
    theirs = trl_trainer.rollout(batch, rewards, scale_rewards="group")["advantages"]
    assert (theirs != 0).all()
    assert (advantages(rewards, std_eps=1e-4) == 0).all()


def test_trl_keeps_infinite_rewards():
    rewards = torch.tensor([1.0, 0.0, 0.5, torch.inf, 2.0, -1.0, 2.0, 0.1])
    theirs = trl_trainer.rollout(BATCH, rewards, scale_rewards="none")["advantages"]
    lowest = torch.finfo(torch.float32).min
    assert theirs[:4].tolist() == [lowest, lowest, lowest, 0]
    assert advantages(rewards, scale="none")[:4].tolist() == [0.5, -0.5, 0, 0]


def test_trl_normalizes_each_reward():
    several = torch.stack([REWARDS.nan_to_num(0.3), torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])], -1)
    theirs = trl_trainer.rollout(BATCH, several, multi_objective_aggregation="normalize_then_sum")["advantages"]
    config = ek.recipes.GRPO.replace(std_eps=1e-4).advantage
    summed = sum(ek.group_advantages(4, rewards, config=config).advantages for rewards in several.unbind(-1))
    assert_rounding(ek.group_advantages(8, summed, config=config).advantages, theirs)


def test_trl_multiplies_by_the_mask():
    values = BATCH.old_log_probs.masked_fill(~BATCH.mask, torch.nan)
    batch = BATCH._replace(old_log_probs=values)
    assert trl_trainer.loss(batch, loss_type="grpo").loss.isnan()
    assert_same(ours(batch, **GROUP), ours(BATCH, **GROUP))
