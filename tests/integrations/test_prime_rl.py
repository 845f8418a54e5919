"""The page on prime-rl, with stand-ins for what it imports."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from egpo_kernels import group_advantages
from tests.integrations.kept_sets import assert_over, joined, sets_with
from tests.integrations.stand_ins import stand_in
from tests.parity.batch import assert_same, differentiated, make_batch, ours
from tests.support.accuracy import assert_rounding
from tests.support.page import run

BATCH = make_batch()


@pytest.fixture
def page(monkeypatch):
    stand_in(monkeypatch, "prime_rl.orchestrator.algo.grpo", GRPOAlgorithm=object)
    stand_in(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
    return run("docs/prime_rl.md")


def test_samples_add_up_to_the_step(page):
    def step(log_probs):
        total = 0.0
        for row in range(8):
            inputs = SimpleNamespace(
                trainer_logprobs=log_probs[row],
                inference_logprobs=BATCH.old_log_probs[row],
                advantages=BATCH.advantages[row].expand(24),
                loss_mask=BATCH.mask[row],
            )
            found = page["egpo_loss"](inputs)
            assert found.metrics["ratio"].dim() == 0
            total = total + found.loss
        return total / BATCH.mask.sum()  # rl_scale

    assert_same(ours(BATCH), differentiated(step, BATCH.log_probs))


def test_a_group_gets_its_advantages(page):
    rewards, found = [0.0, 1.0, 0.0, 0.0], {}

    def sample(row, start, end):
        mask, log_probs = BATCH.mask[row, start:end], BATCH.old_log_probs[row, start:end]
        return SimpleNamespace(mask=mask.tolist(), logprobs=log_probs.tolist())

    group = [
        SimpleNamespace(
            reward=rewards[row],
            samples=[sample(row, 0, 10), sample(row, 10, 24)],
            assign_advantages=lambda value, row=row: found.__setitem__(row, value),
        )
        for row in range(4)
    ]
    asyncio.run(page["EGPOAlgorithm"]().score_group(group))
    expected = group_advantages(4, torch.tensor(rewards), BATCH.old_log_probs[:4], BATCH.mask[:4]).advantages
    assert_rounding(torch.tensor([found[row] for row in range(4)]), expected)


def test_log_probs_of_a_pack_are_over_the_sets_of_its_record(page):
    """Two samples of five and seven tokens, whose first three are a prompt's."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(31, 8, generator=generator)
    ids = torch.randint(31, (12,), generator=generator)
    places = [*range(5), *range(7)]
    sets = [each if place > 2 else [] for place, each in zip(places, sets_with(ids.tolist(), 31), strict=True)]
    sets[10] = []  # not recorded
    kept, counts = np.array(joined(sets), np.int32), np.array([len(each) for each in sets], np.int32)
    batch = SimpleNamespace(
        input_ids=ids.tolist(),
        position_ids=places,
        loss_mask=[place > 2 for place in places],
        sampling_mask=SimpleNamespace(ids=kept.tobytes(), counts=counts.tobytes()),
    )
    found = page["replayed_log_probs"](hidden, weight, batch, 0.7)
    scored = torch.tensor([token - 1 for token, place in enumerate(places) if place > 2])
    logits = hidden @ weight.T / 0.7
    assert_over(found[scored], logits[scored], ids[scored + 1], [sets[row + 1] for row in scored])
