"""SkyRL's registry, batch, trainer and losses, with ours in them."""

import importlib
import typing
from types import SimpleNamespace

import pytest
import torch
import typing_extensions

pytest.importorskip("skyrl", reason="skyrl is not installed (make parity installs it)")

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)  # pydantic wants that below Python 3.12
    importlib.import_module("skyrl.train.trainer")

import cloudpickle
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch, pad_training_input_batch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config import AlgorithmConfig

from egpo_kernels import PolicyLossConfig, group_advantages, policy_loss, recipes
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.kept_sets import assert_over, joined, sets_with
from tests.integrations.models import VOCAB, make_model
from tests.parity.batch import assert_same, differentiated, make_batch, ours
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import run

BATCH = make_batch()
TOKENS = BATCH.advantages[:, None] * BATCH.mask
UIDS = ["a", "a", "a", "a", "b", "b", "b", "b"]


@pytest.fixture(scope="module")
def page():
    return run("docs/skyrl.md")


def scaled(loss_reduction, max_seq_len=None):
    """Advantages as SkyRL's trainer hands them to the workers."""
    options = {"micro_batch_size": 4, "max_seq_len": max_seq_len}
    return ppo_utils.apply_loss_reduction_to_advantages_minibatch(TOKENS, BATCH.mask.float(), loss_reduction, **options)


def summed(function, advantages, rows=(slice(None),), config=None):
    """Sum of a SkyRL loss over micro-batches."""

    def total(log_probs):
        return sum(
            function(
                log_probs[row],
                BATCH.old_log_probs[row],
                advantages[row],
                config=config or AlgorithmConfig(policy_loss_type="egpo"),
                loss_mask=BATCH.mask[row].float(),
                rollout_logprobs=None,
            )[0]
            for row in rows
        )

    return differentiated(total, BATCH.log_probs)


def test_the_registered_loss_survives_pickling(page):
    function = cloudpickle.loads(cloudpickle.dumps(ppo_utils.PolicyLossRegistry.get("egpo")))
    config = recipes.EGPO.replace(reduction="sum").loss

    def direct(log_probs):
        return policy_loss(log_probs, BATCH.old_log_probs, scaled("token_mean"), BATCH.mask, config=config).loss

    found, expected = summed(function, scaled("token_mean")), differentiated(direct, BATCH.log_probs)
    assert_bits(found.loss, expected.loss, "loss")
    assert_bits(found.gradient, expected.gradient, "gradient")


@pytest.mark.parametrize("rows", [(slice(0, 8),), (slice(0, 4), slice(4, 8)), (slice(0, 1), slice(1, 8))])
@pytest.mark.parametrize(
    "loss_reduction, settings",
    [
        ("token_mean", {"reduction": "token_mean"}),
        ("sequence_mean", {"reduction": "seq_mean_token_mean"}),
        ("seq_mean_token_sum_norm", {"reduction": "seq_mean_token_sum_norm", "norm_length": 32.0}),
    ],
)
def test_micro_batches_add_up_to_the_reduction(page, loss_reduction, settings, rows):
    expected = ours(BATCH, **settings)
    found = summed(page["egpo_loss"], scaled(loss_reduction, 32), rows)
    assert_same(expected, found)


@pytest.mark.parametrize(
    "policy_loss_type, settings",
    [
        ("regular", {}),
        ("dual_clip", {"dual_clip": 3.0}),
        ("gspo", {"ratio": "sequence_token"}),
        ("sapo", {"surrogate": "sapo"}),
    ],
)
def test_same_numbers_as_theirs(page, monkeypatch, policy_loss_type, settings):
    monkeypatch.setitem(page, "SUM", PolicyLossConfig(reduction="sum", **settings))
    found = summed(page["egpo_loss"], scaled("token_mean"))
    theirs = summed(
        ppo_utils.PolicyLossRegistry.get(policy_loss_type),
        scaled("token_mean"),
        config=AlgorithmConfig(policy_loss_type=policy_loss_type),
    )
    assert_same(found._replace(size=ours(BATCH, **settings).size), theirs)


def test_the_trainer_gives_groups_their_advantages(page):
    rewards = torch.zeros(8, 24)
    rewards[1, 2] = rewards[6, 5] = 1.0
    names = ("rewards", "response_mask", "loss_mask", "action_log_probs", "values")
    mask = BATCH.mask.long()
    response = mask.flip(1).cummax(1).values.flip(1)  # a tool's output is part of the response
    data = TrainingInputBatch(dict(zip(names, (rewards, response, mask, BATCH.old_log_probs, None), strict=True)))
    data.metadata = {"uids": list(UIDS), "avg_response_length": 1.0}
    data = pad_training_input_batch(data, 2)
    trainer = object.__new__(page["EGPOTrainer"])
    generator = SimpleNamespace(step_wise_trajectories=False)
    trainer.cfg = SimpleNamespace(generator=generator, trainer=SimpleNamespace(algorithm=AlgorithmConfig()))
    trainer.all_metrics = {}
    found = trainer.compute_advantages_and_returns(data)["advantages"]
    groups = torch.tensor([0] * 4 + [1] * 4)
    expected = group_advantages(groups, rewards.sum(-1), BATCH.old_log_probs, mask).advantages
    assert_rounding(found[:8], expected[:, None] * response)
    assert found[:8].abs().sum() > 0 and found[8:].abs().sum() == 0


def test_a_fused_model_gives_log_probs_over_the_record(page):
    model, generator = make_model(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (3, 9), generator=generator)
    attention = (torch.arange(9) < torch.tensor([9, 7, 9])[:, None]).long()
    logits = model(ids, attention_mask=attention).logits.detach()[:, 3:-1] / 0.9
    sets = [sets_with(row.tolist(), VOCAB) for row in ids[:, 4:]]
    sets[1], sets[2] = sets[1][:3], [[]] * 5  # as long as its response; not recorded
    width = max(len(each) for row in sets for each in row)
    supports = [torch.tensor([each + [-1] * (width - len(each)) for each in row]) for row in sets]
    given = ids, attention, 5, supports, 0.9
    found = page["replayed_log_probs"](fuse_policy_loss(model), *given).detach()
    scored = attention[:, 4:].bool()
    assert_over(found[scored], logits[scored], ids[:, 4:][scored], joined(sets))
