"""Bad log-probs, ratios, advantages and logits under every surrogate, ratio and KL option."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_rounding
from tests.support.batches import (
    EVERY_BACKEND,
    EVERY_LAYOUT,
    assert_same,
    differentiate,
    make_batch,
    one_pass,
)
from tests.support.device import DEVICE, size

NAN, INF = torch.nan, torch.inf
VARIANTS = {
    "clip": {},
    "dual clip": {"dual_clip": 3.0},
    "k1": {"kl": "k1"},
    "k2": {"kl": "k2"},
    "kl max": {"kl_max": 10.0},
    "kl times ratio": {"kl_times_ratio": True},
    "sequence": {"ratio": "sequence"},
    "sequence token": {"ratio": "sequence_token"},
    "cispo": {"surrogate": "cispo"},
    "cispo cap": {"surrogate": "cispo", "ratio_cap": 2.0},
    "sapo": {"surrogate": "sapo"},
    "gmpo": {"surrogate": "gmpo"},
}
WALKED = size(list(VARIANTS), ["clip", "sequence", "cispo", "gmpo"])  # each is another kernel to be compiled
EVERY_VARIANT = pytest.mark.parametrize("options", [VARIANTS[name] for name in WALKED], ids=WALKED)


def everywhere(test):
    return EVERY_VARIANT(EVERY_LAYOUT(EVERY_BACKEND(test)))


def tensors_of(batch):
    """Every per-token input of `policy_loss`, ratios around 1."""
    given = {"log_probs": batch.old_log_probs + 0.1, "old_log_probs": batch.old_log_probs}
    given |= {"ref_log_probs": batch.ref_log_probs, "entropy": torch.ones_like(batch.old_log_probs)}
    given |= {"advantages": batch.per_token(batch.advantages)}
    return {**given, "rollout_weights": torch.full_like(given["advantages"], 0.5)}


def run(batch, tensors, backend, options, **settings):
    """Loss, metrics and the gradients of log-probs and entropy."""
    leaves = {key: tensors[key].clone().requires_grad_() for key in ("log_probs", "entropy")}
    config = ek.PolicyLossConfig(**{"kl_coef": 0.1, "entropy_coef": 0.02, **options, **settings})
    loss, metrics = ek.policy_loss(
        **{**tensors, **leaves}, mask=batch.mask, cu_seqlens=batch.cu_seqlens, config=config, backend=backend
    )
    loss.sum().backward()
    return loss.detach(), metrics, leaves["log_probs"].grad, leaves["entropy"].grad


def changed(tensors, index, **values):
    """The tensors with values written at an index."""
    made = {key: tensor.clone() for key, tensor in tensors.items()}
    for key, value in values.items():
        made[key][index] = value
    return made


@everywhere
def test_masked_positions_contribute_exactly_nothing(options, layout, backend):
    batch = make_batch(layout)
    tensors, unused = tensors_of(batch), ~batch.counts
    loss, metrics, *gradients = run(batch, tensors, backend, options)
    assert loss.isfinite() and all((gradient[batch.counts] != 0).any() for gradient in gradients)
    for value in (NAN, INF, -INF):
        found = run(batch, changed(tensors, unused, **dict.fromkeys(tensors, value)), backend, options)
        assert torch.equal(found[0], loss)
        assert all(torch.equal(found[1][key], seen) for key, seen in metrics.items())
        for gradient, wanted in zip(found[2:], gradients, strict=True):
            assert torch.equal(gradient, wanted) and (gradient[unused] == 0).all()


@everywhere
def test_masked_logits_contribute_exactly_nothing(options, layout, backend):
    batch = make_batch(layout)
    config, unused = ek.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.02, **options), ~batch.counts
    wanted = differentiate(one_pass, batch, backend, config=config)
    dirty = batch.clone()
    dirty.logits[unused], dirty.tokens[unused] = NAN, -100
    dirty.old_log_probs[unused], dirty.ref_log_probs[unused] = -INF, NAN
    assert_same(differentiate(one_pass, dirty, backend, config=config), wanted)
    assert wanted.loss.isfinite() and (wanted.gradient[unused] == 0).all()


FAR = {"old": ("old_log_probs", -INF), "old below": ("old_log_probs", -1e30), "old above": ("old_log_probs", 1e30)}
FAR |= {"ref": ("ref_log_probs", -INF), "ref above": ("ref_log_probs", 1e30), "own": ("log_probs", -1e30)}


@pytest.mark.parametrize("name, value", FAR.values(), ids=FAR)
@everywhere
def test_far_log_probs_stay_finite(name, value, options, layout, backend):
    batch = make_batch(layout)
    tensors = tensors_of(batch)
    for sequence in (0, 1):  # one advantage of each sign
        tensors = changed(tensors, batch.at(sequence, 1), **{name: value})
    found = run(batch, tensors, backend, options)
    wanted = run(batch, tensors, "reference", options)
    assert all(result.isfinite().all() for result in (found[0], *found[2:]))
    for result, other in zip((found[0], *found[2:]), (wanted[0], *wanted[2:]), strict=True):
        assert_rounding(result, other)


@everywhere
def test_advantage_zero_beats_an_overflowing_ratio(options, layout, backend):
    batch = make_batch(layout)
    for old in (-INF, INF):
        tensors = changed(tensors_of(batch), ..., advantages=0.0, old_log_probs=old)
        found = run(batch, tensors, backend, {**options, "kl_times_ratio": False}, kl_coef=0.0, entropy_coef=0.0)
        assert found[0] == 0 and (found[2] == 0).all()


@everywhere
def test_log_prob_of_minus_infinity_is_dead(options, layout, backend):
    batch = make_batch(layout)
    dead = batch.at(3, 1)
    tensors = changed(tensors_of(batch), dead, log_probs=-INF)
    loss, metrics, *gradients = run(batch, tensors, backend, options, reduction="none")
    assert loss[dead] == 0 and loss.isfinite().all()
    assert all(gradient[dead] == 0 and gradient.isfinite().all() for gradient in gradients)
    assert metrics["policy/nonfinite_rows/sum"] == 1 and metrics["policy/tokens/sum"] == batch.counts.sum()


@pytest.mark.parametrize("bad", [-INF, NAN, INF])
@everywhere
def test_bad_logits_stay_in_their_sequence(bad, options, layout, backend):
    clean = make_batch(layout)
    here, config = clean.at(3, 1), ek.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.02, **options)
    batch = clean._replace(logits=clean.logits.clone())
    batch.logits[here][batch.tokens[here]] = bad
    found, wanted = (differentiate(one_pass, given, backend, config=config) for given in (batch, clean))
    assert found.metrics["policy/nonfinite_rows/sum"] == 1
    assert found.loss.isfinite() == (bad == -INF)
    if bad == -INF:
        assert found.gradient.isfinite().all() and (found.gradient[here] == 0).all()
    for number in (0, 1, 2):
        assert torch.equal(batch.sequence(number, found.gradient), batch.sequence(number, wanted.gradient))


@pytest.mark.parametrize("name", ["log_probs", "old_log_probs", "ref_log_probs", "advantages"])
@everywhere
def test_nan_reaches_the_loss_and_no_other_sequence(name, options, layout, backend):
    batch = make_batch(layout)
    clean = tensors_of(batch)
    tensors = changed(clean, batch.at(3, 1), **{name: NAN})
    found, wanted = run(batch, tensors, backend, options), run(batch, clean, backend, options)
    assert found[0].isnan()
    assert found[1]["policy/nonfinite_rows/sum"] == (name == "log_probs")
    # A minimum or maximum that drops NaN would hide it.
    ratio_is_lost = name in ("log_probs", "old_log_probs")
    assert all(found[1][f"policy/ratio/{end}"].isnan() == ratio_is_lost for end in ("min", "max", "mean"))
    for number in (0, 1, 2):
        for gradient, other in zip(found[2:], wanted[2:], strict=True):
            assert torch.equal(batch.sequence(number, gradient), batch.sequence(number, other))


@everywhere
def test_weight_nan_means_one_and_is_counted(options, layout, backend):
    batch = make_batch(layout)
    tensors, here = tensors_of(batch), batch.at(1, 0)
    found = run(batch, changed(tensors, here, rollout_weights=NAN), backend, options)
    wanted = run(batch, changed(tensors, here, rollout_weights=1.0), backend, options)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[2], wanted[2])
    assert found[1]["policy/unscored_tokens/sum"] == 1 and wanted[1]["policy/unscored_tokens/sum"] == 0


@EVERY_VARIANT
@EVERY_BACKEND
def test_nothing_counts(options, backend):
    batch = make_batch()
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    loss, _, *gradients = run(batch, tensors_of(batch), backend, options)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)
    empty = {key: torch.zeros(0, 3, device=DEVICE) for key in tensors_of(batch)}
    loss, _, *gradients = run(batch._replace(mask=empty["entropy"] > 0), empty, backend, options)
    assert loss == 0 and all(gradient.shape == (0, 3) for gradient in gradients)
