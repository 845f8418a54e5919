"""Token ids, temperatures and offsets that point nowhere: an error where values may be looked at, else NaN."""

import contextlib

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.inputs import validation
from tests.support.batches import (
    EVERY_BACKEND,
    EVERY_LAYOUT,
    EVERY_PATH,
    differentiate,
    make_batch,
    one_pass,
    only_log_probs,
    two_pass,
    whole_groups,
)
from tests.support.device import DEVICE, ON_GPU

VOCAB = 37
WITH_METRICS = pytest.mark.parametrize("path", [one_pass, two_pass, whole_groups])


@pytest.fixture
def unseen(monkeypatch):
    """As on a GPU: values are not looked at."""
    monkeypatch.setattr(validation, "checks_values", lambda device: False)


def bounded(backend):
    """Fail when an interpreted kernel touches memory outside its tensors; torch does so by itself."""
    if backend != "triton" or ON_GPU:
        return contextlib.nullcontext()
    from benchmarks.counts.traffic import count_traffic

    return count_traffic()


def with_token(batch, index, token):
    changed = batch._replace(tokens=batch.tokens.clone())
    changed.tokens[index] = token
    return changed


@EVERY_PATH
@EVERY_LAYOUT
@EVERY_BACKEND
def test_counted_token_outside_the_vocabulary_raises(path, layout, backend, values_are_checked):
    batch = make_batch(layout)
    index = batch.at(1, 3)
    row = index[0] if layout == "packed" else index[0] * 4 + index[1]
    for token in (-1, -100, VOCAB, 2**40):
        with pytest.raises(ValueError, match=rf"tokens holds {token} .*position {row}\b.*\[0, {VOCAB}\)"):
            path(with_token(batch, index, token), backend)


@EVERY_PATH
@EVERY_LAYOUT
@EVERY_BACKEND
def test_unseen_token_outside_the_vocabulary_gives_nan(path, layout, backend, unseen):
    clean = make_batch(layout)
    index = clean.at(3, 1)
    wanted = differentiate(path, clean, backend)
    for token in (-100, VOCAB, 2**40):
        with bounded(backend):
            found = differentiate(path, with_token(clean, index, token), backend)
        assert found.loss.isnan()
        if path is not only_log_probs:
            assert found.metrics["policy/invalid_tokens/sum"] == 1
            assert found.metrics["policy/nonfinite_rows/sum"] == 1
        for number in (0, 1):
            assert torch.equal(clean.sequence(number, found.gradient), clean.sequence(number, wanted.gradient))


@EVERY_LAYOUT
@EVERY_BACKEND
def test_unseen_token_outside_the_vocabulary_has_log_prob_nan(layout, backend, unseen):
    batch = with_token(make_batch(layout), ..., 0)
    index = batch.at(0, 1)
    found = ek.token_log_probs(batch.logits, with_token(batch, index, -1).tokens, mask=batch.mask, backend=backend)
    assert found.log_probs.isnan().nonzero().tolist() == [list(index)]


@EVERY_BACKEND
def test_ignored_token_under_a_true_mask_is_an_error(backend, values_are_checked):
    batch = make_batch()
    tokens = torch.where(batch.mask, batch.tokens, -100)
    without_mask = ek.token_log_probs(batch.logits, tokens, backend=backend).log_probs
    with_mask = ek.token_log_probs(batch.logits, tokens, mask=batch.mask, backend=backend).log_probs
    assert torch.equal(without_mask, with_mask) and (without_mask[~batch.mask] == 0).all()
    with pytest.raises(ValueError, match="tokens holds -100"):
        ek.token_log_probs(batch.logits, tokens, mask=torch.ones_like(batch.mask), backend=backend)


# Whether values may be looked at.


@pytest.mark.parametrize("debug, looks", [(None, False), ("0", False), ("1", True)])
def test_debug_looks_at_values_on_a_device(monkeypatch, debug, looks):
    if debug is None:
        monkeypatch.delenv("EGPO_KERNELS_DEBUG", raising=False)
    else:
        monkeypatch.setenv("EGPO_KERNELS_DEBUG", debug)
    assert validation.checks_values(torch.device("cuda")) is looks
    assert validation.checks_values(torch.device("cpu"))


# Temperatures.


@WITH_METRICS
@EVERY_LAYOUT
@EVERY_BACKEND
def test_temperature_tensor_that_is_not_positive_raises(path, layout, backend, values_are_checked):
    batch = make_batch(layout)
    for value in (0.0, -1.0, 1e-40, torch.nan, torch.inf):
        heat = torch.ones(batch.mask.shape, device=DEVICE)
        heat[batch.at(2, 0)] = value
        with pytest.raises(ValueError, match="temperature holds"):
            path(batch, backend, temperature=heat)


@WITH_METRICS
@EVERY_LAYOUT
@EVERY_BACKEND
def test_unseen_temperature_that_is_not_positive_gives_nan(path, layout, backend, unseen):
    batch = make_batch(layout)
    wanted = differentiate(path, batch, backend, temperature=torch.ones(4, device=DEVICE))
    for value in (0.0, -1.0, torch.nan):
        heat = torch.tensor([1.0, 1.0, 1.0, value], device=DEVICE)
        found = differentiate(path, batch, backend, temperature=heat)
        assert found.loss.isnan()
        for number in (0, 1):
            assert torch.equal(batch.sequence(number, found.gradient), batch.sequence(number, wanted.gradient))


# Offsets of packed sequences.

MALFORMED = {
    "starts late": [1, 3, 7, 9, 13],
    "decreases": [0, 7, 3, 9, 13],
    "too long": [0, 3, 7, 9, 99],
    "negative": [0, -3, 7, 9, 13],
}


@pytest.mark.parametrize("offsets", MALFORMED.values(), ids=MALFORMED)
@WITH_METRICS
@EVERY_BACKEND
def test_malformed_cu_seqlens_raise(path, backend, offsets, values_are_checked):
    batch = make_batch("packed")._replace(cu_seqlens=torch.tensor(offsets, device=DEVICE))
    with pytest.raises(ValueError, match=r"cu_seqlens starts at .* and ends at"):
        path(batch, backend)
    with pytest.raises(ValueError, match=r"cu_seqlens starts at .* and ends at"):
        ek.group_advantages(
            batch.groups, batch.rewards, batch.old_log_probs, cu_seqlens=batch.cu_seqlens, backend=backend
        )


@pytest.mark.parametrize("offsets", MALFORMED.values(), ids=MALFORMED)
@WITH_METRICS
@EVERY_BACKEND
def test_unseen_malformed_cu_seqlens_give_nan(path, backend, offsets, unseen):
    batch = make_batch("packed")._replace(cu_seqlens=torch.tensor(offsets, device=DEVICE))
    with bounded(backend):
        assert differentiate(path, batch, backend).loss.isnan()
        found = ek.group_advantages(
            batch.groups, batch.rewards, batch.old_log_probs, cu_seqlens=batch.cu_seqlens, backend=backend
        )
    assert found.advantages.isnan().all()
