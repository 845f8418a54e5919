"""verl's own losses and advantages beside ours."""

import dataclasses
import functools
import inspect
import re

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed (make parity installs it)")

from verl.trainer.config import AlgoConfig, RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.reward_manager.dapo import DAPORewardManager

import egpo_kernels as ek
from egpo_kernels.integrations.verl_losses import LOSSES
from tests.parity import verl_actor
from tests.parity.batch import Answer, assert_same, assert_told_apart, make_batch, ours, same, written
from tests.parity.facts import Same, arguments, combinations, named
from tests.parity.facts_verl import VERL
from tests.support.accuracy import assert_rounding

BATCH = make_batch()
NAMES = BATCH._asdict()
VANILLA = {"dual_clip": 3.0}
BY_SEQUENCE = {"reduction": "seq_mean_token_mean"}
GEO_MEAN = BY_SEQUENCE | {"surrogate": "gmpo"}
NAMED = r'(?:loss_mode|adv_estimator)="(\w+)"'
GROUPS, SINGLE = [0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 2, 3, 3]
REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25, 2.0, -1.0, 2.0, 0.1])


def advantages(groups=GROUPS, rewards=REWARDS, mask=BATCH.mask, **settings):
    """Ours, per token."""
    config = ek.recipes.GRPO.replace(**settings).advantage
    found = ek.group_advantages(torch.tensor(groups), rewards, None, mask, config=config).advantages
    return found[:, None] * mask


@pytest.mark.parametrize("rows", combinations(VERL), ids=lambda rows: f"{rows[0].theirs}, {rows[1].theirs}")
def test_losses(rows: tuple[Same, Same]):
    found = ours(BATCH, **written(rows, "ours", NAMES))
    assert_same(found, verl_actor.loss(BATCH, **written(rows, "theirs", NAMES)))


def test_the_batch_tells_the_settings_apart():
    assert_told_apart(BATCH, VERL, NAMES, functools.partial(verl_actor.loss, BATCH))


@pytest.mark.parametrize("row", VERL.advantages, ids=lambda row: row.theirs)
def test_advantages(row: Same):
    settings, options = arguments(row.ours, NAMES), arguments(row.theirs, NAMES)
    # verl's rule for a group of one is `singleton="raw"`; where the row is another, there is none.
    groups = SINGLE if settings.get("singleton") == "raw" else GROUPS
    assert_rounding(advantages(groups, **settings), verl_actor.advantages(groups, REWARDS, BATCH.mask, **options))


def test_options_exist():
    kinds = (ActorConfig, PolicyLossConfig, AlgoConfig, RolloutCorrectionConfig)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)} | set(verl_actor.GLOBAL)
    arguments_of = inspect.signature(DAPORewardManager), inspect.signature(get_policy_loss_fn("vanilla"))
    fields |= {name for signature in arguments_of for name in signature.parameters}
    assert named(VERL) - {"uid", "non_tensor_batch"} <= fields


def test_everything_of_verl_is_in_the_table_or_said_to_be_absent():
    compared = {value for row in (*VERL.losses, *VERL.advantages) for value in re.findall(NAMED, row.theirs)}
    # Our own losses may be there too, by tests/integrations or as a plugin.
    theirs = {*POLICY_LOSS_REGISTRY, *ADV_ESTIMATOR_REGISTRY} - {*LOSSES}
    assert compared | {*VERL.absent} == theirs and not compared & {*VERL.absent}


def test_a_group_of_one_is_zero_in_one_estimator():
    found = advantages(SINGLE, baseline="leave_one_out", scale="none")
    assert_rounding(found, verl_actor.advantages(SINGLE, REWARDS, BATCH.mask, "rloo_vectorized"))


def test_soft_overlong_punishment():
    (row,) = VERL.helpers
    lengths = torch.tensor([0, 1, 80, 81, 90, 100])
    theirs = verl_actor.overlong(lengths, **arguments(row.theirs, {}))
    assert_rounding(arguments(f"found={row.ours}", {"lengths": lengths})["found"], theirs)


@pytest.mark.parametrize("loss_mode", ["sapo", "geo_mean"])
def test_verl_sapo_and_geo_mean_have_one_aggregation(loss_mode):
    by_token, by_sequence = (
        verl_actor.loss(BATCH, loss_mode=loss_mode, loss_agg_mode=mode)
        for mode in ("token-mean", "seq-mean-token-mean")
    )
    assert torch.equal(by_token.loss, by_sequence.loss) and torch.equal(by_token.gradient, by_sequence.gradient)
    surrogate = {"geo_mean": "gmpo"}.get(loss_mode, loss_mode)
    assert_same(ours(BATCH, surrogate=surrogate, **BY_SEQUENCE), by_token)
    assert not same(ours(BATCH, surrogate=surrogate), by_token)


def test_verl_geo_mean_counts_every_row():
    batch = make_batch(empty=True)
    theirs = verl_actor.loss(batch, loss_mode="geo_mean", global_batch_size=32)
    assert_same(Answer(*(value * 7 / 8 for value in ours(batch, **GEO_MEAN))), theirs)
    assert_same(ours(batch, **GEO_MEAN, num_sequences=len(batch.mask)), theirs)


def test_verl_geo_mean_weighs_geometrically():
    theirs = verl_actor.loss(BATCH, loss_mode="geo_mean", rollout_is_weights=BATCH.weights)
    assert not same(ours(BATCH, **GEO_MEAN, rollout_weights=BATCH.weights), theirs)
    mean = (BATCH.weights.log() * BATCH.mask).sum(-1) / BATCH.mask.sum(-1)
    assert_same(ours(BATCH, **GEO_MEAN, rollout_weights=mean.exp()), theirs)


def far(name: str, distance: float, row: int = 4):
    """The batch with all tokens of a response that far from the current policy."""
    values = getattr(BATCH, name).clone()
    values[row] = BATCH.log_probs[row] + distance
    return BATCH._replace(**{name: values})


def test_verl_geo_mean_clamps_one_side():
    batch = far("old_log_probs", 30, row=0)
    theirs = verl_actor.loss(batch, loss_mode="geo_mean")
    found = ours(batch, **GEO_MEAN)
    assert 0 < -theirs.gradient[0, 0] < 1e-12 and found.gradient[0, 0] == 0
    assert_same(ours(batch, **GEO_MEAN, max_log_ratio=60.0), theirs)


def test_verl_gspo_clamps_at_ten():
    gspo = {"ratio": "sequence_token"}
    near, beyond, outlier = far("old_log_probs", -9), far("old_log_probs", -12), far("old_log_probs", -9)
    outlier.old_log_probs[4, 2] = BATCH.log_probs[4, 2] - 25
    assert_same(ours(near, **gspo), verl_actor.loss(near, loss_mode="gspo"))
    # 24 tokens of a response with advantage -0.4.
    for batch, own, other in ((beyond, 12.0, 10.0), (outlier, 9 + 11 / 24, 9 + 16 / 24)):
        for found, log_ratio in ((ours(batch, **gspo), own), (verl_actor.loss(batch, loss_mode="gspo"), other)):
            of_row = 0.4 * 24 / BATCH.mask.sum() * torch.tensor(log_ratio).exp()
            torch.testing.assert_close(found.loss, of_row, rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("kl", ["k1", "k2"])
def test_verl_does_not_clamp_k1_and_k2(kl):
    batch = far("ref_log_probs", 30)
    theirs = verl_actor.loss(batch, loss_mode="vanilla", kl_loss_type=kl, kl_loss_coef=0.1)
    found = ours(batch, **VANILLA, kl=kl, kl_coef=0.1)
    assert (theirs.gradient[4] != found.gradient[4]).all()
    assert_same(ours(batch, **VANILLA, kl=kl, kl_coef=0.1, max_log_ratio=60.0), theirs)


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_verl_straight_through_kl(kl):
    theirs = verl_actor.loss(BATCH, loss_mode="vanilla", kl_loss_type=f"{kl}+", kl_loss_coef=0.1)
    found = ours(BATCH, **VANILLA, kl="k2", kl_coef=0.1)
    assert_rounding(found.gradient, theirs.gradient)
    assert not same(found, theirs)


def test_verl_divides_rounding_by_epsilon():
    rewards = torch.full((8,), 0.9)
    theirs = verl_actor.advantages([0] * 8, rewards, BATCH.mask, "grpo")[BATCH.mask]
    assert (theirs.abs() > 0.05).all()
    assert (advantages([0] * 8, rewards, std_eps=1e-6) == 0).all()


def test_verl_divides_a_single_reward():
    theirs = verl_actor.advantages(SINGLE, REWARDS, BATCH.mask, "grpo")[:, 0]
    assert theirs[5] == REWARDS[5] / torch.tensor(1 + 1e-6)
    assert advantages(SINGLE, singleton="raw")[5, 0] == REWARDS[5]
    assert advantages(SINGLE)[5, 0] == 0


def test_verl_overlong_has_no_floor():
    lengths = torch.tensor([100, 105, 120])
    (row,) = VERL.helpers
    assert_rounding(verl_actor.overlong(lengths, **arguments(row.theirs, {})), torch.tensor([-0.5, -0.625, -1.0]))
    assert arguments(f"found={row.ours}", {"lengths": lengths})["found"].tolist() == [-0.5, -0.5, -0.5]


def test_verl_sums_are_scaled_by_processes():
    theirs = verl_actor.loss(BATCH, loss_mode="vanilla", loss_agg_mode="token-sum", dp_size=2)
    assert_same(Answer(*(2 * value for value in ours(BATCH, **VANILLA, reduction="sum"))), theirs)


def test_verl_takes_the_width_for_a_length():
    theirs = verl_actor.loss(BATCH, loss_mode="vanilla", loss_agg_mode="seq-mean-token-sum-norm")
    settings = VANILLA | {"reduction": "seq_mean_token_sum_norm"}
    assert_same(ours(BATCH, **settings, norm_length=BATCH.mask.shape[1]), theirs)
    with pytest.raises(ValueError, match="norm_length"):
        ours(BATCH, **settings)


@pytest.mark.parametrize(
    "mode, reduction", [("token-mean", "token_mean"), ("seq-mean-token-mean", "seq_mean_token_mean")]
)
def test_verl_multiplies_by_the_mask(mode, reduction):
    batch = BATCH._replace(old_log_probs=BATCH.old_log_probs.masked_fill(~BATCH.mask, torch.nan))
    theirs = verl_actor.loss(batch, loss_mode="vanilla", loss_agg_mode=mode)
    assert theirs.loss.isnan() == (mode != "token-mean")
    assert_same(ours(batch, **VANILLA, reduction=reduction), ours(BATCH, **VANILLA, reduction=reduction))
