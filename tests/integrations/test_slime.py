"""The adapters for slime on lists of the form that its source has; slime itself needs Megatron."""

from types import SimpleNamespace

import pytest
import torch

from egpo_kernels import PolicyLossConfig, group_advantages, policy_loss, recipes
from egpo_kernels.integrations.slime import samples_advantages, samples_policy_loss
from tests.integrations.stand_ins import stand_in
from tests.parity.batch import assert_same, differentiated, make_batch, ours
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import run

BATCH = make_batch()
SAMPLER = BATCH.sampler_log_probs.nan_to_num()
LENGTHS = [24, 3, 17, 1, 24, 9, 20, 12]
PER_SEQUENCE = {"reduction": "seq_mean_token_mean"}


def lists(values, rows=range(8)):
    """One tensor a sample, without padding."""
    return [values[row, : LENGTHS[row]] for row in rows]


def micro_batch(rows=range(8)):
    masks = lists(BATCH.mask.long(), rows)
    return {
        "advantages": [BATCH.advantages[row].expand(LENGTHS[row]) for row in rows],
        "loss_masks": masks,
        "log_probs": lists(BATCH.old_log_probs, rows),
        "rollout_log_probs": lists(SAMPLER, rows),
        "ref_log_probs": lists(BATCH.ref_log_probs, rows),
        "unconcat_tokens": None,
        "total_lengths": None,
        "response_lengths": [LENGTHS[row] for row in rows],
    }


def reducer(batch, per_token=False):
    """What slime's `get_sum_of_sample_mean` returns without context parallelism."""

    def reduce(values):
        parts = zip(values.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        return sum((part * mask).sum() / (1 if per_token else mask.sum().clamp(min=1)) for part, mask in parts)

    return reduce


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"ratio": "sequence"}, {"kl_coef": 0.1}, {"surrogate": "gmpo", "clip_low": 0.4, "clip_high": 0.4}]
)
def test_micro_batches_add_up_to_the_step(settings, per_token):
    """slime divides what the micro-batches return by the step's rollouts or tokens."""

    def step(log_probs):
        total = 0.0
        for rows in (range(0, 3), range(3, 8)):
            batch = micro_batch(rows)
            found = samples_policy_loss(
                lists(log_probs, rows),
                batch["log_probs"],
                batch,
                reducer(batch, per_token),
                PolicyLossConfig(**settings),
            )
            assert_bits(found[1]["loss"], found[0].detach(), "logged loss")
            total = total + found[0]
        return total / (BATCH.mask.sum() if per_token else len(LENGTHS))

    reduction = "token_mean" if per_token else "seq_mean_token_mean"
    assert_same(ours(BATCH, reduction=reduction, **settings), differentiated(step, BATCH.log_probs))


def test_masks_that_context_parallelism_does_not_cut_are_refused():
    batch = micro_batch()
    with pytest.raises(ValueError, match="mask has shape"):
        samples_policy_loss([each[: len(each) // 2] for each in lists(BATCH.log_probs)], None, batch, reducer(batch))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"entropy_coef": 0.01},
            r"config\.entropy_coef is 0\.01; it must be 0, .* subtract the bonus",
        ),
        (
            {"kl_coef": 0.1},
            r"batch\['ref_log_probs'\] is None with config\.kl_coef 0\.1; .* --use-kl-loss and --ref-load",
        ),
    ],
)
@pytest.mark.parametrize("absent", [{}, {"ref_log_probs": None}])
def test_terms_without_what_they_need_are_refused(settings, message, absent):
    batch = micro_batch()
    del batch["ref_log_probs"]
    with pytest.raises(ValueError, match=message):
        samples_policy_loss(lists(BATCH.log_probs), None, batch | absent, reducer(batch), PolicyLossConfig(**settings))


def samples(lonely=False):
    return [
        SimpleNamespace(
            group_index=row // 4,
            response_length=LENGTHS[row],
            loss_mask=BATCH.mask[row, : LENGTHS[row]].long().tolist() if row in (2, 6) else None,
            rollout_log_probs=None if lonely and row == 3 else SAMPLER[row, : LENGTHS[row]].tolist(),
            get_reward_value=lambda args, row=row: float(row in (1, 6)),
        )
        for row in range(8)
    ]


@pytest.fixture
def page(monkeypatch):
    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy, top_p_token_ids=None
    ):
        assert (top_p_token_ids is None) == (args.rollout_top_p == 1)
        return None, {"log_probs": list(logits.split(response_lengths))}

    def get_rollout_top_p_logprob_kwargs(args, batch):
        return {} if args.rollout_top_p == 1 else {"top_p_token_ids": batch["rollout_top_p_token_ids"]}

    stand_in(monkeypatch, "megatron.core", mpu=SimpleNamespace())
    theirs = get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs
    stand_in(monkeypatch, "slime.backends.megatron_utils.loss", **{each.__name__: each for each in theirs})
    return run("docs/slime.md")


def test_the_page_puts_both_halves_in(page):
    raw, found = page["post_process"](None, samples())
    assert raw == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    expected = group_advantages(torch.arange(8) // 4, torch.tensor(raw), SAMPLER, BATCH.mask).advantages
    assert_rounding(torch.tensor(found), expected)

    batch, flat = micro_batch(), torch.cat(lists(BATCH.log_probs))
    for use_rollout_logprobs, name in ((False, "log_probs"), (True, "rollout_log_probs")):
        args = SimpleNamespace(use_rollout_logprobs=use_rollout_logprobs, rollout_top_p=1)
        loss, _ = page["egpo_loss_of_log_probs"](args, batch, flat, reducer(batch))
        direct, _ = samples_policy_loss(lists(BATCH.log_probs), batch[name], batch, reducer(batch))
        assert_bits(loss, direct, name)
    del batch["log_probs"]
    args = SimpleNamespace(use_rollout_logprobs=False, rollout_top_p=0.95)
    loss, _ = page["egpo_loss_of_log_probs"](args, batch | {"rollout_top_p_token_ids": []}, flat, reducer(batch))
    config = recipes.GRPO.loss
    direct = policy_loss(BATCH.log_probs, None, BATCH.advantages, BATCH.mask, config=config).loss
    assert_rounding(loss, direct * len(LENGTHS))


def test_samples_without_log_probs_are_refused_where_the_weight_needs_them():
    rewards = [1.0, 0, 0, 0, 0, 0, 1, 0]
    with pytest.raises(ValueError, match="old_log_probs is None"):
        samples_advantages(samples(lonely=True), rewards)
    found = samples_advantages(samples(lonely=True), rewards, recipes.GRPO.advantage)
    assert_rounding(found, group_advantages(4, torch.tensor(rewards), config=recipes.GRPO.advantage).advantages)


def test_samples_without_a_group_are_refused():
    given = samples()
    given[2].group_index = None
    with pytest.raises(ValueError, match=r"samples\[2\]\.group_index is None; it must be the number of its prompt"):
        samples_advantages(given, [0.0] * 8)
