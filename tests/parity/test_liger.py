"""Liger's own formulas beside ours: its reference in torch, which its fused linear loss calls chunk by chunk."""

import functools
import inspect

import pytest

pytest.importorskip("liger_kernel", reason="Liger is not installed (make parity installs it)")

from liger_kernel.chunked_loss.grpo_loss import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
    get_gamma_weights,
)

import egpo_kernels as ek
from tests.parity.batch import Answer, assert_same, assert_told_apart, differentiated, make_batch, ours, same, written
from tests.parity.facts import Same, arguments, combinations, named
from tests.parity.facts_liger import LIGER
from tests.support.accuracy import assert_rounding

BATCH = make_batch()
NAMES = BATCH._asdict()
GROUP = {"reduction": "seq_mean_token_mean"}


def liger(batch, **options) -> Answer:
    mask = batch.mask.long()
    given = {
        "attention_mask": mask,
        "full_attention_mask": mask,
        "advantages": batch.advantages,
        "ref_per_token_logps": batch.ref_log_probs,
        "old_per_token_logps": batch.old_log_probs,
        "beta": 0.0,
    } | options
    function = LigerFusedLinearGRPOFunction.ppo_loss_fn
    return differentiated(lambda log_probs: function(log_probs, **given)[0], batch.log_probs)


@pytest.mark.parametrize("rows", combinations(LIGER), ids=lambda rows: f"{rows[0].theirs}, {rows[1].theirs}")
def test_losses(rows: tuple[Same, Same]):
    found = ours(BATCH, **written(rows, "ours", NAMES))
    assert_same(found, liger(BATCH, **written(rows, "theirs", NAMES)))


def test_the_batch_tells_the_settings_apart():
    assert_told_apart(BATCH, LIGER, NAMES, functools.partial(liger, BATCH))


def test_options_exist():
    loss = LigerFusedLinearGRPOLoss
    assert named(LIGER) - {"cispo"} <= {
        *inspect.signature(loss).parameters,
        *inspect.signature(loss.forward).parameters,
    }


def test_liger_counts_empty_responses():
    batch = make_batch(empty=True)
    for loss_type in ("grpo", "dr_grpo"):
        (row,) = [row for row in LIGER.losses if f'"{loss_type}"' in row.theirs]
        settings = arguments(row.ours, NAMES)
        theirs = liger(batch, **arguments(row.theirs, NAMES))
        assert_same(Answer(*(value * 7 / 8 for value in ours(batch, **settings))), theirs)
        assert_same(ours(batch, num_sequences=len(batch.mask), **settings), theirs)


def test_liger_luspo_counts_padding():
    settings = {"ratio": "sequence", "reduction": "seq_mean_token_sum", "kl_coef": 0.1}
    theirs = liger(BATCH, loss_type="luspo", importance_sampling_level="sequence", beta=0.1)
    assert (theirs.gradient[~BATCH.mask] != 0).any()
    found = ours(BATCH, **settings)
    assert (found.gradient[~BATCH.mask] == 0).all() and not same(found, theirs)


def test_liger_bounds_above_one_plus_epsilon():
    below, above = {"delta": 1.1, "epsilon_high": 0.5}, {"delta": 1.5, "epsilon_high": 0.5}
    assert not same(ours(BATCH, **GROUP, clip_high=0.5, dual_clip=1.1), liger(BATCH, loss_type="grpo", **below))
    assert_same(ours(BATCH, **GROUP, clip_high=0.5, dual_clip=1.5), liger(BATCH, loss_type="grpo", **above))
    positive = BATCH._replace(advantages=BATCH.advantages.abs())
    negative = BATCH._replace(advantages=-BATCH.advantages.abs())
    assert_same(ours(positive, **GROUP, clip_high=0.1), liger(positive, loss_type="grpo", **below))
    assert_same(ours(negative, **GROUP, clip_high=0.5, dual_clip=1.5), liger(negative, loss_type="grpo", **below))


@pytest.mark.parametrize("name, distance, beta", [("old_log_probs", -30, 0.0), ("ref_log_probs", 30, 0.1)])
def test_liger_clamps_no_log_ratio(name, distance, beta):
    values = getattr(BATCH, name).clone()
    values[4, 2] = BATCH.log_probs[4, 2] + distance
    batch = BATCH._replace(**{name: values})
    theirs = liger(batch, loss_type="grpo", beta=beta)
    found = ours(batch, **GROUP, kl_coef=beta)
    assert theirs.gradient[4, 2].abs() > 1e9 > found.gradient[4, 2].abs()
    assert_same(ours(batch, **GROUP, kl_coef=beta, max_log_ratio=60.0), theirs)


def test_liger_vespo():
    theirs = liger(BATCH, loss_type="vespo")
    gamma = get_gamma_weights(BATCH.advantages, BATCH.log_probs - BATCH.old_log_probs, BATCH.mask)
    found = ours(BATCH, old_log_probs=None, rollout_weights=gamma)
    assert_rounding(found.gradient, theirs.gradient)
    assert not same(found, theirs)
    with pytest.raises(ValueError, match="surrogate"):
        ek.PolicyLossConfig(surrogate="vespo")
