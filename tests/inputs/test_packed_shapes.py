"""Packed rows as many as sequences: a shape that can be read two ways is refused unless both say the same."""

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.inputs import layout as layouts
from tests.support.accuracy import assert_bits
from tests.support.batches import BACKENDS
from tests.support.device import DEVICE

VOCAB = 7
OFFSETS = torch.tensor([0, 2, 2, 3], device=DEVICE)
OLD = torch.full((3,), -2.0, device=DEVICE)
VALUES = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)


def inputs(offsets=OFFSETS):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, VOCAB, generator=generator).to(DEVICE)
    tokens = torch.tensor([1, 2, 3], device=DEVICE)
    return logits, tokens, offsets


def by_log_probs(backend, offsets=OFFSETS, **given):
    logits, tokens, offsets = inputs(offsets)
    log_probs = ek.token_log_probs(logits, tokens, backend=backend).log_probs
    return ek.policy_loss(log_probs, log_probs - 0.1, cu_seqlens=offsets, backend=backend, **given).loss


def by_logits(backend, offsets=OFFSETS, **given):
    logits, tokens, offsets = inputs(offsets)
    return ek.logits_policy_loss(logits, tokens, cu_seqlens=offsets, old_log_probs=OLD, backend=backend, **given).loss


def by_hidden(backend, offsets=OFFSETS, **given):
    logits, tokens, offsets = inputs(offsets)
    return ek.linear_policy_loss(
        logits, torch.eye(VOCAB, device=DEVICE), tokens, cu_seqlens=offsets, backend=backend, **given
    ).loss


def by_groups(backend, offsets=OFFSETS, **given):
    logits, tokens, offsets = inputs(offsets)
    del given["advantages"]
    rewards = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    return ek.egpo_loss(logits, tokens, 3, rewards, cu_seqlens=offsets, backend=backend, **given).loss


WAYS = [
    *((function, "advantages") for function in (by_log_probs, by_logits, by_hidden)),
    *((function, "rollout_weights") for function in (by_log_probs, by_logits, by_hidden, by_groups)),
    *((function, "temperature") for function in (by_logits, by_hidden, by_groups)),
]


@pytest.mark.parametrize("function, name", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shape_that_can_be_read_two_ways(function, name, backend, values_are_checked):
    def loss(value, offsets=OFFSETS, **more):
        return function(backend, offsets, **{"advantages": torch.ones(3, 1, device=DEVICE), name: value, **more})

    with pytest.raises(ValueError, match=rf"{name} has shape \[3\], .* pass \[S, 1\] for one number a sequence"):
        loss(VALUES)
    # What does not count need not be the same.
    if function is not by_groups:
        counted = torch.tensor([1, 0, 1], device=DEVICE)
        loss(VALUES, mask=counted)
    # Both readings are the same: equal numbers where tokens count, or one token a sequence.
    alike = torch.tensor([2.0, 2.0, 3.0], device=DEVICE)
    assert_bits(loss(alike), loss(torch.tensor([[2.0], [9.0], [3.0]], device=DEVICE)), name)
    single = torch.arange(4, device=DEVICE)
    assert_bits(loss(VALUES, single), loss(VALUES[:, None], single), name)


@pytest.mark.parametrize("function, name", WAYS)
@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_elsewhere_it_is_nan(function, name, backend, monkeypatch):
    """As on a GPU, whose values are not looked at."""
    monkeypatch.setattr("egpo_kernels.inputs.validation.checks_values", lambda device: False)
    given = {"advantages": torch.ones(3, 1, device=DEVICE), name: VALUES}
    assert function(backend, **given).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_is_per_sequence(backend):
    rows = by_log_probs(backend, advantages=VALUES[:, None])
    longer = torch.tensor([1.0, 1.0, 3.0, 0.0], device=DEVICE)  # a fourth row, past the last sequence, counts nowhere
    logits, tokens, offsets = inputs()
    logits, tokens = torch.cat([logits, logits[:1]]), torch.cat([tokens, tokens[:1]])
    log_probs = ek.token_log_probs(logits, tokens, backend=backend).log_probs
    found = ek.policy_loss(log_probs, log_probs - 0.1, longer, cu_seqlens=offsets, backend=backend).loss
    assert_bits(found, rows, "loss")


def test_off_policy_mask(values_are_checked):
    log_probs, sampled = torch.zeros(3, device=DEVICE), torch.tensor([5.0, 5.0, 0.0], device=DEVICE)
    given = {"cu_seqlens": OFFSETS, "threshold": 0.1}
    with pytest.raises(ValueError, match=r"pass \[S, 1\]"):
        ek.off_policy_mask(log_probs, sampled, torch.tensor([-1.0, 1.0, -1.0], device=DEVICE), **given)
    # Alike going in, but not what would come out: the second sequence is empty, the second token of the first.
    alike = torch.full((3,), -1.0, device=DEVICE)
    with pytest.raises(ValueError, match=r"pass \[S, 1\]"):
        ek.off_policy_mask(log_probs, sampled, alike, **given)
    assert ek.off_policy_mask(log_probs, sampled, alike[:, None], **given).tolist() == [[False], [True], [True]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_groups_of_as_many_tokens_as_sequences(backend):
    """Advantages that the library makes itself are per sequence."""
    logits, tokens, offsets = inputs()
    rewards = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)
    old = torch.zeros(3, device=DEVICE)
    recipe = ek.recipes.GRPO.replace(reduction="none")
    found = ek.egpo_loss(
        logits, tokens, 3, rewards, old_log_probs=old, cu_seqlens=offsets, recipe=recipe, backend=backend
    ).loss
    advantages = ek.group_advantages(3, rewards, config=recipe.advantage, backend=backend).advantages
    wanted = ek.logits_policy_loss(
        logits, tokens, advantages[:, None], old_log_probs=old, cu_seqlens=offsets, config=recipe.loss, backend=backend
    ).loss
    assert_bits(found, wanted, "loss")


@pytest.mark.parametrize("function", [by_logits, by_hidden, by_groups])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_without_dimensions(backend, function):
    value, advantages = torch.tensor(0.7, device=DEVICE), VALUES[:, None]
    found = function(backend, advantages=advantages, temperature=value)
    assert_bits(found, function(backend, advantages=advantages, temperature=value.expand(3, 1)), "loss")
    if function is by_logits:
        assert found != by_logits(backend, advantages=advantages)


def test_layouts_of_one_shape_stay_unambiguous():
    """[S, 1] tokens are per token and per sequence alike."""
    layout = layouts.make_layout("log_probs", (3, 1), None, torch.device("cpu"))
    rows, sound = layout.per_token_or_sequence("advantages", torch.tensor([[1.0], [2.0], [3.0]]), "real")
    assert rows.tolist() == [1, 2, 3] and sound is None
