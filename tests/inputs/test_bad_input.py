"""Bad values inside tensors of the right shape: in positions that do not count, in the vocabulary, in the ratio."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_rounding
from tests.support.batches import (
    EVERY_BACKEND,
    EVERY_LAYOUT,
    EVERY_PATH,
    PATHS,
    assert_same,
    differentiate,
    from_log_probs,
    make_batch,
    one_pass,
    only_log_probs,
    two_pass,
    whole_groups,
)

NAN, INF = torch.nan, torch.inf


def everywhere(*marks):
    """Parametrise over backends, layouts and further marks."""

    def decorate(test):
        for mark in (EVERY_BACKEND, EVERY_LAYOUT, *marks):
            test = mark(test)
        return test

    return decorate


# Positions that do not count.


def spoiled(batch, logit, token, log_prob):
    """The batch with garbage wherever no token counts."""
    batch, unused = batch.clone(), ~batch.counts
    batch.logits[unused] = logit
    batch.logits[unused, 0] = 0.0
    batch.tokens[unused] = token
    batch.old_log_probs[unused] = log_prob
    batch.ref_log_probs[unused] = log_prob
    return batch


@everywhere(EVERY_PATH)
def test_masked_positions_contribute_exactly_nothing(path, layout, backend):
    clean = make_batch(layout)
    wanted = differentiate(path, clean, backend)
    assert wanted.loss.isfinite() and wanted.gradient[clean.counts].abs().sum() > 0
    for garbage in ((NAN, -100, NAN), (INF, 10**12, -INF)):
        found = differentiate(path, spoiled(clean, *garbage), backend)
        assert_same(found, wanted)
        assert (found.gradient[~clean.counts] == 0).all()
        for key, value in wanted.metrics.items():
            assert torch.equal(found.metrics[key], value) or value.isnan(), key


@everywhere(pytest.mark.parametrize("path", [one_pass, two_pass]))
def test_masked_constants_contribute_exactly_nothing(path, layout, backend):
    batch = make_batch(layout)
    batch = batch._replace(advantages=batch.per_token(batch.advantages))
    weights = torch.full_like(batch.advantages, 0.5)
    heat = torch.full_like(batch.advantages, 0.7)
    wanted = differentiate(path, batch, backend, rollout_weights=weights, temperature=heat)
    unused = ~batch.counts
    for value in (NAN, INF, 0.0):
        tensors = [tensor.masked_fill(unused, value) for tensor in (batch.advantages, weights, heat)]
        dirty = batch._replace(advantages=tensors[0])
        assert_same(differentiate(path, dirty, backend, rollout_weights=tensors[1], temperature=tensors[2]), wanted)


@everywhere()
def test_masked_log_probs_contribute_exactly_nothing(layout, backend):
    batch = make_batch(layout)
    unused = ~batch.counts

    def gradient(value):
        log_probs = torch.where(unused, value, batch.old_log_probs + 0.1).requires_grad_()
        entropy = torch.where(unused, value, 1.0).requires_grad_()
        loss, _ = ek.policy_loss(
            log_probs,
            torch.where(unused, value, batch.old_log_probs),
            batch.advantages,
            batch.mask,
            entropy=entropy,
            config=ek.PolicyLossConfig(entropy_coef=0.1),
            cu_seqlens=batch.cu_seqlens,
            backend=backend,
        )
        loss.backward()
        assert (log_probs.grad[unused] == 0).all() and (entropy.grad[unused] == 0).all()
        return loss.detach(), log_probs.grad, entropy.grad

    for value in (NAN, INF, -INF):
        for found, wanted in zip(gradient(value), gradient(-1.0), strict=True):
            assert torch.equal(found, wanted)


# -inf in the vocabulary.


def without_columns(batch, first, stop):
    """The batch over a vocabulary that lacks columns ``first : stop``."""
    kept = torch.cat([batch.logits[..., :first], batch.logits[..., stop:]], -1).contiguous()
    return batch._replace(
        logits=kept, tokens=torch.where(batch.tokens >= stop, batch.tokens - stop + first, batch.tokens)
    )


@everywhere(EVERY_PATH, pytest.mark.parametrize("masked", [(30, 37), (0, 20)], ids=["tail", "head"]))
def test_masked_vocabulary_is_as_if_it_were_not_there(path, layout, backend, masked):
    first, stop = masked
    batch = make_batch(layout)
    inside = (batch.tokens >= first) & (batch.tokens < stop)
    batch = batch._replace(tokens=torch.where(inside, (batch.tokens + stop - first) % 37, batch.tokens))
    batch = batch._replace(tokens=torch.where((batch.tokens >= first) & (batch.tokens < stop), 25, batch.tokens))
    full = batch._replace(logits=batch.logits.clone())
    full.logits[..., first:stop] = -INF
    found = differentiate(path, full, backend)
    wanted = differentiate(path, without_columns(batch, first, stop), backend)
    assert (found.gradient[..., first:stop] == 0).all()
    assert_rounding(found.loss, wanted.loss)
    kept = torch.cat([found.gradient[..., :first], found.gradient[..., stop:]], -1)
    assert_rounding(kept, wanted.gradient)
    assert found.metrics.get("policy/nonfinite_rows/sum", 0) == 0


@pytest.mark.parametrize("path", [one_pass, only_log_probs])
@EVERY_BACKEND
def test_leading_block_of_minus_inf(path, backend):
    # Longer than any kernel's block.
    vocab, start = 17003, 16500
    batch = make_batch("packed", vocab, lengths=(1, 2))
    batch = batch._replace(tokens=start + batch.tokens % (vocab - start))
    batch.logits[:, :start] = -INF
    found = differentiate(path, batch, backend)
    wanted = differentiate(path, without_columns(batch, 0, start), backend)
    assert (found.gradient[..., :start] == 0).all()
    assert_rounding(found.loss, wanted.loss)
    assert_rounding(found.gradient[..., start:], wanted.gradient)


@everywhere(
    pytest.mark.parametrize("path", [one_pass, two_pass, whole_groups]),
    pytest.mark.parametrize("whole_row", [False, True], ids=["own", "row"]),
)
def test_token_whose_own_logit_is_minus_inf(path, layout, backend, whole_row):
    clean = make_batch(layout)
    dead = clean.at(3, 1)
    batch = clean._replace(logits=clean.logits.clone())
    batch.logits[dead][... if whole_row else batch.tokens[dead]] = -INF
    found, wanted = differentiate(path, batch, backend), differentiate(path, clean, backend)
    assert found.loss.isfinite() and found.gradient.isfinite().all()
    assert (found.gradient[dead] == 0).all()
    assert found.metrics["policy/nonfinite_rows/sum"] == 1
    assert found.metrics["policy/tokens/sum"] == wanted.metrics["policy/tokens/sum"]
    for number in (0, 1) if path is whole_groups else (0, 1, 2):
        rows = batch.sequence(number, found.gradient)
        assert torch.equal(rows, batch.sequence(number, wanted.gradient))


@everywhere(pytest.mark.parametrize("config", [ek.PolicyLossConfig(reduction="none", kl_coef=0.1, entropy_coef=0.1)]))
def test_dead_token_has_loss_zero(layout, backend, config):
    batch = make_batch(layout)
    dead = batch.at(3, 1)
    batch.logits[dead][batch.tokens[dead]] = -INF
    loss, _ = one_pass(batch, backend, config)
    assert loss[dead] == 0
    log_probs, entropy = ek.token_log_probs(batch.logits, batch.tokens, return_entropy=True, backend=backend)
    assert log_probs[dead] == -INF and entropy[dead].isfinite()


@everywhere()
def test_dead_token_passes_no_gradient_to_log_probs_and_entropy(layout, backend):
    batch = make_batch(layout)
    dead = batch.at(3, 1)
    batch.logits[dead][batch.tokens[dead]] = -INF
    gradient = differentiate(only_log_probs, batch, backend).gradient
    assert (gradient[dead] == 0).all() and gradient.isfinite().all()


# Far logits, far ratios.


SHIFTS = [(path, torch.float32, -10000.0) for path in PATHS.values()]
SHIFTS += [(one_pass, torch.float32, 1e6), (one_pass, torch.bfloat16, 120.0), (two_pass, torch.float16, -1000.0)]


@everywhere(pytest.mark.parametrize("path, dtype, shift", SHIFTS))
def test_shifted_logits_give_the_same_bits(path, layout, backend, dtype, shift):
    batch = make_batch(layout)
    batch = batch._replace(logits=batch.logits.round().clamp(-8, 8).to(dtype))
    shifted = batch._replace(logits=batch.logits + shift)
    assert torch.equal(shifted.logits.double() - shift, batch.logits.double())
    wanted = differentiate(path, batch, backend, temperature=0.7)
    assert wanted.loss.isfinite()
    assert_same(differentiate(path, shifted, backend, temperature=0.7), wanted)


FAR = {
    "old_minus_inf": ("old_log_probs", -INF),
    "old_far_below": ("old_log_probs", -1000.0),
    "old_far_above": ("old_log_probs", 1000.0),
    "ref_minus_inf": ("ref_log_probs", -INF),
    "ref_far_below": ("ref_log_probs", -1e30),
    "ref_far_above": ("ref_log_probs", 1e30),
}


@everywhere(
    pytest.mark.parametrize("path", [one_pass, two_pass, from_log_probs]),
    pytest.mark.parametrize("name, value", FAR.values(), ids=FAR),
)
def test_far_log_probs_stay_finite(path, layout, backend, name, value):
    batch = make_batch(layout)
    # One advantage of each sign.
    for sequence in (0, 1):
        getattr(batch, name)[batch.at(sequence, 1)] = value
    found, wanted = differentiate(path, batch, backend), differentiate(path, batch, "reference")
    assert found.loss.isfinite() and found.gradient.isfinite().all()
    torch.testing.assert_close(found.loss, wanted.loss)
    assert_rounding(found.gradient, wanted.gradient)


@everywhere(pytest.mark.parametrize("config", [ek.PolicyLossConfig(), ek.PolicyLossConfig(ratio="sequence")]))
def test_advantage_zero_beats_an_overflowing_ratio(layout, backend, config):
    batch = make_batch(layout)
    batch = batch._replace(advantages=torch.zeros_like(batch.advantages))
    batch.old_log_probs[:] = -INF
    found = differentiate(one_pass, batch, backend, config=config)
    assert found.loss == 0 and (found.gradient == 0).all()


@everywhere(
    pytest.mark.parametrize("path", [one_pass, two_pass, whole_groups]), pytest.mark.parametrize("bad", [NAN, INF])
)
def test_nan_logits_are_reported_and_stay_in_their_sequence(path, layout, backend, bad):
    clean = make_batch(layout)
    batch = clean._replace(logits=clean.logits.clone())
    batch.logits[batch.at(3, 1)][5] = bad
    found, wanted = differentiate(path, batch, backend), differentiate(path, clean, backend)
    assert found.loss.isnan()
    assert found.metrics["policy/nonfinite_rows/sum"] == 1
    assert wanted.metrics["policy/nonfinite_rows/sum"] == 0
    for number in (0, 1) if path is whole_groups else (0, 1, 2):
        assert torch.equal(batch.sequence(number, found.gradient), batch.sequence(number, wanted.gradient))
