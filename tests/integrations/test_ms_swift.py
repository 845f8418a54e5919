"""ms-swift's GRPO trainer and loss beside ours; it needs a TRL, and so an environment, of its own (make apart)."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("swift", reason="ms-swift is not installed (make apart runs this)")
pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO, which ms-swift imports (make apart)")

from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

from egpo_kernels import PolicyLossConfig, Recipe, group_advantages, policy_loss
from tests.parity.batch import assert_same, differentiated, make_batch, ours
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import run

BATCH = make_batch()
STEPS = PROCESSES = 2


@pytest.fixture(scope="module")
def page():
    return run("docs/ms_swift.md")


def trainer_of(kind, **options):
    """As much of a trainer on one of the processes as the two methods look at."""
    trainer = object.__new__(kind)
    gather = SimpleNamespace(gather_for_metrics=lambda values: values[None] if values.dim() == 0 else values)
    trainer.accelerator = SimpleNamespace(num_processes=PROCESSES, **vars(gather))
    trainer.args = SimpleNamespace(
        delta=None, top_entropy_quantile=1.0, log_entropy=False, gradient_accumulation_steps=STEPS
    )
    trainer.model = SimpleNamespace(training=True)
    trainer._get_per_token_logps_and_entropies = lambda model, inputs, batch, **_: (inputs["log_probs"], None)
    settings = {
        "compute_entropy": False,
        "overlong_filter": False,
        "beta": 0.0,
        "kl_in_reward": False,
        "rollout_importance_sampling_mode": None,
        "log_rollout_offpolicy_metrics": False,
        "disable_rollout_importance_sampling": False,
        "importance_sampling_level": "token",
        "_has_teacher": False,
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "off_policy_sequence_mask_delta": None,
        "sdar_loss_coef": 0.0,
        "chord_sft_iterator": None,
        "model_accepts_loss_kwargs": False,
        "compute_loss_func": None,
    }
    for name, value in (settings | options).items():
        setattr(trainer, name, value)
    return trainer


def grpo_batch(rows=slice(None), batch=BATCH):
    mask = batch.mask[rows]
    return GRPOBatch(
        completion_mask=mask,
        truncated_mask=torch.zeros(len(mask), dtype=torch.bool),
        seq_lengths=mask.sum(1),
        old_per_token_logps=BATCH.old_log_probs[rows],
        advantages=BATCH.advantages[rows, None].expand(mask.shape),
        num_items_in_batch=BATCH.mask.sum(),
    )


def step(trainer, rows):
    """What accumulations on all processes backpropagate: each loss over the steps, the mean of the processes."""

    def loss(log_probs):
        found = [
            trainer._compute_loss_and_metrics(None, {"log_probs": log_probs[row]}, grpo_batch(row))[0] for row in rows
        ]
        return sum(found) / STEPS / PROCESSES

    return differentiated(loss, BATCH.log_probs)


def test_same_as_a_direct_call(page):
    trainer, log_probs = trainer_of(page["EGPOTrainer"]), BATCH.log_probs
    tokens = BATCH.mask.sum() / PROCESSES
    loss, logged = trainer._compute_loss_and_metrics(None, {"log_probs": log_probs}, grpo_batch())
    direct = policy_loss(log_probs, BATCH.old_log_probs, BATCH.advantages, BATCH.mask, num_tokens=tokens).loss
    assert_bits(loss, STEPS * direct, "loss")
    trainer._metrics = {"train": defaultdict(list)}
    trainer._update_metrics(logged)
    assert not trainer._metrics["train"]


@pytest.mark.parametrize(
    "settings, options",
    [
        ({}, {}),
        ({"clip_low": 0.1, "clip_high": 0.28}, {"epsilon_low": 0.1, "epsilon_high": 0.28}),
        ({"ratio": "sequence"}, {"importance_sampling_level": "sequence"}),
        ({"surrogate": "cispo", "clip_low": 1.0, "ratio_cap": 2.0}, {"loss_type": "cispo", "epsilon_high": 2.0}),
    ],
)
def test_same_numbers_as_theirs(page, monkeypatch, settings, options):
    monkeypatch.setitem(page, "RECIPE", Recipe(loss=PolicyLossConfig(**settings)))
    rows, expected = (slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 8)), ours(BATCH, **settings)
    assert_same(expected, step(trainer_of(page["EGPOTrainer"], **options), rows))
    assert_same(expected, step(trainer_of(GRPOTrainer, **options), rows))


@pytest.mark.parametrize("batch", [BATCH, make_batch(empty=True)], ids=["whole", "an empty response"])
@pytest.mark.parametrize("mode, group_size", [("train", 4), ("eval", 2)])
def test_groups_get_their_advantages(page, mode, group_size, batch):
    trainer = trainer_of(
        page["EGPOTrainer"],
        num_generations=4,
        num_generations_eval=2,
        dynamic_num_samples=False,
        reward_weights=torch.tensor([1.0, 0.5]),
        advantage_estimator="grpo",
        scale_rewards="group",
        reward_func_names=["right", "form"],
    )
    trainer.model.training = mode == "train"
    trainer._metrics = {mode: defaultdict(list)}
    trainer._logs = {"rewards": defaultdict(list)}
    rewards = torch.tensor([[0.0, 0], [1, 0.5], [0, 1], [0, 0], [0, 0], [0, torch.nan], [0, 0], [0, 0]])
    batches = [{"grpo_batch": grpo_batch(rows, batch)} for rows in (slice(0, 5), slice(5, 8))]
    found = trainer._compute_advantages([], rewards, batches)
    weighted = (rewards * trainer.reward_weights).nansum(1)
    expected = group_advantages(group_size, weighted, batch.old_log_probs, batch.mask).advantages
    assert_rounding(found, expected)
    assert trainer._metrics[mode]["reward"]
