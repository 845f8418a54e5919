"""Where other libraries break although nothing raises: normalisation, a term without gradient, a sign, lost weights."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_rounding
from tests.support.batches import (
    EVERY_BACKEND,
    EVERY_LAYOUT,
    LENGTHS,
    assert_same,
    differentiate,
    make_batch,
    one_pass,
)
from tests.support.device import DEVICE

NAN = torch.nan
REDUCTIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "sum"]


def reduced(reduction):
    norm_length = 8 if reduction == "seq_mean_token_sum_norm" else None
    return ek.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1, reduction=reduction, norm_length=norm_length)


def part(batch, first, last):
    """Some of the sequences as a batch of their own."""
    if batch.cu_seqlens is None:
        rows, offsets = slice(first, last), None
    else:
        rows = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
        offsets = batch.cu_seqlens[first : last + 1] - batch.cu_seqlens[first]
    per_token = {name: getattr(batch, name)[rows] for name in batch._fields[:5]}
    return batch._replace(**per_token, advantages=batch.advantages[first:last], cu_seqlens=offsets)


def cat(gradients, like):
    """Gradients of parts in the shape of the whole, zeros past the last sequence."""
    found = torch.cat(gradients)
    return torch.cat([found, torch.zeros_like(like[len(found) :])])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_LAYOUT
@EVERY_BACKEND
def test_micro_batches_of_unequal_size_add_up(reduction, layout, backend):
    # Liger #1082, TRL #5619 #6024: each micro-batch by its own count of tokens is another loss.
    batch, config = make_batch(layout), reduced(reduction)
    counts = {"num_tokens": int(batch.counts.sum()), "num_sequences": len(LENGTHS)}
    whole = differentiate(one_pass, batch, backend, config=config)
    parts = [differentiate(one_pass, part(batch, *ends), backend, config=config, **counts) for ends in ((0, 1), (1, 4))]
    assert_rounding(sum(result.loss for result in parts), whole.loss)
    gradient = cat([result.gradient for result in parts], whole.gradient)
    assert_rounding(gradient, whole.gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS[:4])
@EVERY_LAYOUT
@EVERY_BACKEND
def test_ranks_that_average_gradients(reduction, layout, backend):
    # verl #7321: data parallelism divides by the number of ranks once more.
    batch, config, ranks = make_batch(layout), reduced(reduction), 2
    counts = {"num_tokens": batch.counts.sum() / ranks, "num_sequences": len(LENGTHS) / ranks}
    whole = differentiate(one_pass, batch, backend, config=config)
    parts = [differentiate(one_pass, part(batch, *ends), backend, config=config, **counts) for ends in ((0, 1), (1, 4))]
    gradient = cat([result.gradient / ranks for result in parts], whole.gradient)
    assert_rounding(gradient, whole.gradient)
    # Numbers of the last group's metrics are merged exactly, not averaged.
    merged = ek.combine_metrics([result.metrics for result in parts])
    assert merged["policy/tokens/sum"] == batch.counts.sum()


@EVERY_LAYOUT
@EVERY_BACKEND
def test_the_entropy_bonus_has_its_gradient(layout, backend):
    # TRL #6625 #5596: an entropy that is only reported leaves the loss right and the training wrong.
    batch = make_batch(layout)
    logits = batch.logits.double().requires_grad_()
    log_softmax = logits.log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)[batch.counts].mean()
    (wanted,) = torch.autograd.grad(-0.5 * entropy, logits)
    silent = batch._replace(advantages=torch.zeros_like(batch.advantages))
    config = ek.PolicyLossConfig(entropy_coef=0.5)
    found = differentiate(one_pass, silent, backend, config=config)
    assert_rounding(found.gradient, wanted.float())
    assert_rounding(found.loss, (-0.5 * entropy).float().detach())
    # By way of log-probs, and of the sequence ratio, which needs two passes.
    late = differentiate(one_pass, silent, backend, config=ek.PolicyLossConfig(entropy_coef=0.5, ratio="sequence"))
    assert_rounding(late.gradient, wanted.float())
    given = torch.ones(batch.mask.shape, device=DEVICE, requires_grad=True)
    loss, _ = ek.policy_loss(
        batch.old_log_probs,
        None,
        silent.advantages,
        batch.mask,
        entropy=given,
        cu_seqlens=batch.cu_seqlens,
        config=config,
        backend=backend,
    )
    loss.backward()
    assert_rounding(given.grad, torch.where(batch.counts, -0.5 / batch.counts.sum(), 0.0))


@pytest.mark.parametrize("name", ek.recipes.RECIPES)
@EVERY_BACKEND
def test_a_step_down_the_loss_rewards_what_was_better(name, backend):
    # FLA #1076: with the sign inverted everything runs, and the model unlearns.
    batch = make_batch()
    logits = batch.logits.clone().requires_grad_()
    recipe = ek.recipes.get(name)
    if recipe.loss.reduction == "seq_mean_token_sum_norm":
        recipe = recipe.replace(norm_length=8)
    old = ek.token_log_probs(logits.detach(), batch.tokens, mask=batch.mask).log_probs
    loss, _ = ek.egpo_loss(
        *(logits, batch.tokens, batch.groups, batch.rewards),
        mask=batch.mask,
        old_log_probs=old,
        recipe=recipe,
        backend=backend,
    )
    loss.backward()
    stepped = ek.token_log_probs(logits.detach() - 0.01 * logits.grad, batch.tokens, mask=batch.mask).log_probs
    change = (stepped - old).sum(-1)
    right = batch.rewards > 0
    assert (change[right] >= 0).all() and (change[~right] <= 0).all() and change.abs().max() > 0


@EVERY_LAYOUT
@EVERY_BACKEND
def test_tokens_that_the_sampler_did_not_score(layout, backend):
    # TRL #6693, NeMo #4120 #4154: NaN or None in place of a sampler's log-prob.
    batch = make_batch(layout)
    plain = differentiate(one_pass, batch, backend)
    ones = torch.ones(batch.mask.shape, device=DEVICE)
    for weights in (ones * NAN, torch.full((4,), NAN, device=DEVICE), torch.full((4, 1), NAN, device=DEVICE)):
        found = differentiate(one_pass, batch, backend, rollout_weights=weights)
        assert_same(found, plain)
        assert found.metrics["policy/unscored_tokens/sum"] == batch.counts.sum()
    assert_same(differentiate(one_pass, batch, backend, rollout_weights=ones), plain)


@EVERY_LAYOUT
@EVERY_BACKEND
def test_nothing_from_the_sampler_is_the_on_policy_update(layout, backend):
    batch = make_batch(layout)._replace(old_log_probs=None)
    found = differentiate(one_pass, batch, backend)
    assert found.metrics["policy/ratio/min"] == found.metrics["policy/ratio/max"] == 1
    assert found.metrics["policy/clip_low/mean"] == found.metrics["policy/clip_high/mean"] == 0


@pytest.mark.parametrize("level", [-150.0, -1e4, -1e30, 1e4])
@EVERY_LAYOUT
@EVERY_BACKEND
def test_low_logits_have_finite_log_probs(level, layout, backend):
    # verl: a running maximum that starts at 0 makes every logit below -104 infinitely likely.
    batch = make_batch(layout)
    logits = torch.full_like(batch.logits, level)
    found = ek.token_log_probs(logits, batch.tokens, mask=batch.counts, return_entropy=True, backend=backend)
    wanted = torch.where(batch.counts, torch.tensor(37.0, device=DEVICE).log(), 0.0)
    assert_rounding(found.log_probs, -wanted)
    assert_rounding(found.entropy, wanted)
