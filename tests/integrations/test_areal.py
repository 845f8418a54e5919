"""AReaL's actor and loss beside ours; it runs in an environment of its own (make apart)."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

pytest.importorskip("areal", reason="areal is not installed (make apart runs this)")

from areal.api.cli_args import PPOActorConfig
from areal.trainer.ppo.actor import grpo_loss_fn
from areal.utils.data import pack_tensor_dict
from areal.utils.functional import ppo_actor_loss_fn, sapo_loss_fn

from egpo_kernels import PolicyLossConfig, Recipe, group_advantages, policy_loss
from tests.parity.batch import assert_same, differentiated, make_batch, ours
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import run

pytestmark = pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed:UserWarning")
BATCH = make_batch()
SAMPLER = BATCH.sampler_log_probs.nan_to_num()
LENGTHS = BATCH.mask.long().cumsum(1).argmax(1) + 3  # a prompt of two tokens
WIDTH = 26


@pytest.fixture(scope="module")
def page():
    return run("docs/areal.md")


def rolled(values):
    """``[S, T]`` in AReaL's frame: position t holds what is said of token t + 1."""
    return torch.roll(pad(values, (2, 0)), -1, 1)


def packed(rows=slice(None)):
    """A micro-batch as the engine packs it."""
    data = {
        "attention_mask": (torch.arange(WIDTH) < LENGTHS[:, None]).long(),
        "loss_mask": rolled(BATCH.mask.float()),
        "advantages": rolled(BATCH.advantages[:, None] * BATCH.mask),
        "logprobs": rolled(SAMPLER),
        "prox_logp": rolled(BATCH.old_log_probs),
        "now": rolled(BATCH.log_probs),
    }
    return pack_tensor_dict({name: value[rows] for name, value in data.items()})


def step(function, rows=(slice(None),)):
    """What the engine backpropagates: local losses by their share of the counted tokens; gradient in our frame."""

    def loss(log_probs):
        total = 0.0
        for row in rows:
            data = packed(row)
            kept = torch.arange(WIDTH) < LENGTHS[row][:, None]
            now = rolled(log_probs)[row][kept]
            share = data["loss_mask"].count_nonzero() / BATCH.mask.sum()
            total = total + share * function(
                now, torch.zeros_like(now), data, vocab_min_logits=now, vocab_max_logits=now
            )
        return total

    return differentiated(loss, BATCH.log_probs)


def test_same_as_a_direct_call(page):
    data = packed()
    given = {"cu_seqlens": data["cu_seqlens"], "config": PolicyLossConfig()}
    direct = policy_loss(data["now"], data["prox_logp"], data["advantages"], data["loss_mask"], **given).loss
    assert_bits(page["egpo_loss"](data["now"], None, data), direct, "loss")


@pytest.mark.parametrize("rows", [(slice(0, 8),), (slice(0, 3), slice(3, 8))])
@pytest.mark.parametrize(
    "settings, options",
    [
        ({}, {"eps_clip": 0.2}),
        (
            {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 3.0},
            {"eps_clip": 0.1, "eps_clip_higher": 0.28, "c_clip": 3.0},
        ),
        ({"ratio": "sequence"}, {"eps_clip": 0.2, "importance_sampling_level": "sequence"}),
    ],
)
def test_same_numbers_as_theirs(page, monkeypatch, settings, options, rows):
    monkeypatch.setitem(page, "RECIPE", Recipe(loss=PolicyLossConfig(**settings)))

    def theirs(logprobs, entropy, data, **_):
        given = {
            "old_logprobs": data["logprobs"],
            "proximal_logprobs": data["prox_logp"],
            "advantages": data["advantages"],
        }
        mask, cu_seqlens = data["loss_mask"].bool(), data["cu_seqlens"]
        return ppo_actor_loss_fn(logprobs, loss_mask=mask, cu_seqlens=cu_seqlens, **given, **options)[0]

    expected, found = ours(BATCH, **settings), step(page["egpo_loss"], rows)
    assert_same(expected, found)
    assert_same(expected, step(theirs, rows))


def test_sapo(page, monkeypatch):
    settings = PolicyLossConfig(surrogate="sapo")
    monkeypatch.setitem(page, "RECIPE", Recipe(loss=settings))

    def theirs(logprobs, entropy, data, **_):
        mask = data["loss_mask"].bool()
        return sapo_loss_fn(logprobs, data["prox_logp"], data["advantages"], 1.0, 1.05, mask)[0]

    assert_same(ours(BATCH, surrogate="sapo"), step(theirs))
    assert_same(ours(BATCH, surrogate="sapo"), step(page["egpo_loss"]))


@pytest.mark.parametrize("decoupled, recompute, old", [(0, 0, SAMPLER), (0, 1, BATCH.old_log_probs), (1, 0, SAMPLER)])
def test_the_actor_gives_groups_their_advantages(page, decoupled, recompute, old):
    options = {"use_decoupled_loss": bool(decoupled), "recompute_logprob": bool(recompute)}
    config = PPOActorConfig(experiment_name="test", trial_name="test", path="", **options)
    actor = page["GroupActor"](config, SimpleNamespace())
    rewards = torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0])
    data = {
        "input_ids": torch.zeros(8, WIDTH, dtype=torch.long),
        "attention_mask": (torch.arange(WIDTH) < LENGTHS[:, None]).long(),
        "loss_mask": pad(BATCH.mask.long(), (2, 0)),
        "logprobs": pad(SAMPLER, (2, 0)),
        "rewards": rewards,
    }
    if decoupled or recompute:
        data["prox_logp"] = rolled(BATCH.old_log_probs)
    prompts = slice(0, 3), slice(3, 8)  # a sample of the first has failed
    found = actor.compute_advantages([{name: value[rows] for name, value in data.items()} for rows in prompts])
    expected = group_advantages(torch.tensor([0] * 3 + [1] * 5), rewards, old, BATCH.mask).advantages
    for prompt, rows in zip(found, prompts, strict=True):
        assert prompt.keys() >= data.keys() and "group" not in prompt
        assert_rounding(prompt["advantages"], rolled(expected[:, None] * BATCH.mask)[rows])


def test_the_engine_gets_our_loss(page, monkeypatch):
    called = []
    engine = object.__new__(page["EGPOActor"])
    monkeypatch.setattr(type(engine).__mro__[1], "train_batch", lambda self, *given: called.extend(given))
    engine.train_batch("batch", grpo_loss_fn, "weight")
    assert called == ["batch", page["egpo_loss"], "weight"]
