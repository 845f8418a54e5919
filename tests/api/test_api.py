"""The public functions as callers meet them: which backend answers, which rows are read, how results are shaped."""

import os
import subprocess
import sys

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.engine import dispatch
from tests.support.batches import (
    BOTH_TERMS,
    EVERY_BACKEND,
    EVERY_LAYOUT,
    EVERY_WAY,
    FAST,
    NEEDS_TRITON,
    assert_agree,
    assert_same,
    differentiate,
    make_batch,
    one_pass,
    two_pass,
    whole_groups,
)
from tests.support.device import DEVICE

CPU = torch.device("cpu")

# Which backend answers.


@pytest.fixture(autouse=True)
def no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv("EGPO_KERNELS_BACKEND", raising=False)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps", "meta"])
@pytest.mark.parametrize("installed", [False, True])
def test_auto_takes_triton_where_it_can(monkeypatch, device, installed):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", installed)
    wanted = "triton" if installed and device in ("cuda", "xpu") else "portable"
    assert dispatch.choose_backend("auto", torch.device(device)) == wanted


def test_environment_decides_for_auto_only(monkeypatch):
    monkeypatch.setenv("EGPO_KERNELS_BACKEND", "reference")
    assert dispatch.choose_backend("auto", CPU) == "reference"
    assert dispatch.choose_backend("portable", CPU) == "portable"
    monkeypatch.setenv("EGPO_KERNELS_BACKEND", "auto")
    assert dispatch.choose_backend("auto", CPU) == "portable"
    monkeypatch.setenv("EGPO_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="EGPO_KERNELS_BACKEND is 'cuda'; it must be one of 'auto', 'triton'"):
        whole_groups(make_batch(), "auto")
    whole_groups(make_batch(), "portable")


def test_environment_reaches_the_functions(monkeypatch):
    batch = make_batch()
    monkeypatch.setenv("EGPO_KERNELS_BACKEND", "reference")
    assert_same(differentiate(one_pass, batch, "auto"), differentiate(one_pass, batch, "reference"))
    with pytest.raises(ValueError, match="inplace_grad is True with backend 'reference'"):
        one_pass(batch, "auto", inplace_grad=True)


@EVERY_WAY
def test_explicit_choice_never_falls_back(path, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        path(make_batch(), "triton")


@NEEDS_TRITON
def test_triton_on_cpu_tensors_needs_its_interpreter():
    code = """
import torch, egpo_kernels as ek
try:
    ek.token_log_probs(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    assert "backend is 'triton' and the tensors are on cpu" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


# Layouts, shapes, counts.


@EVERY_WAY
@EVERY_BACKEND
def test_packed_equals_padded(path, backend):
    padded, packed = make_batch("padded"), make_batch("packed")
    wanted, found = differentiate(path, padded, backend), differentiate(path, packed, backend)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.gradient[packed.counts], wanted.gradient[padded.counts])
    assert found.metrics.keys() == wanted.metrics.keys()
    for key, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[key], value, equal_nan=True, msg=key)


@EVERY_LAYOUT
@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes_and_dtypes_of_results(layout, backend, dtype):
    batch = make_batch(layout, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = batch.tokens.shape
    for reduction in ("token_mean", "none"):
        loss, metrics = one_pass(batch, backend, ek.PolicyLossConfig(reduction=reduction))
        assert loss.dtype == wide and loss.shape == (shape if reduction == "none" else ())
        assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert (loss[~batch.counts] == 0).all()
    found = ek.token_log_probs(batch.logits, batch.tokens, mask=batch.counts, return_entropy=True, backend=backend)
    for values in found:
        assert values.dtype == wide and values.shape == shape and (values[~batch.counts] == 0).all()
    assert ek.token_log_probs(batch.logits, batch.tokens, mask=batch.counts, backend=backend).entropy is None
    assert differentiate(one_pass, batch, backend).gradient.dtype == dtype


@EVERY_BACKEND
def test_tuples_unpack(backend):
    batch = make_batch()
    loss, metrics = whole_groups(batch, backend)
    advantages, weights, base, _, _ = ek.group_advantages(2, batch.rewards, batch.old_log_probs, backend=backend)
    assert loss.dim() == 0 and metrics and torch.equal(advantages, weights * base)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
@EVERY_BACKEND
def test_global_counts_of_any_kind(reduction, backend):
    batch, config = make_batch(), ek.PolicyLossConfig(reduction=reduction)
    name = "num_tokens" if reduction == "token_mean" else "num_sequences"
    wanted = differentiate(one_pass, batch, backend, config=config, **{name: 24})
    tensors = [torch.tensor(24, dtype=dtype, device=DEVICE) for dtype in (torch.int64, torch.float32, torch.float64)]
    for count in (24.0, *tensors):
        assert_same(differentiate(one_pass, batch, backend, config=config, **{name: count}), wanted)
    own = int(batch.counts.sum()) if name == "num_tokens" else 4
    torch.testing.assert_close(wanted.loss * 24 / own, one_pass(batch, backend, config).loss)


@EVERY_BACKEND
def test_integer_flags_and_rewards_are_accepted(backend):
    batch = make_batch()
    wanted = whole_groups(batch, backend).loss
    for dtype in (torch.long, torch.uint8, torch.float16):
        changed = batch._replace(mask=-batch.mask.to(dtype) if dtype.is_signed else batch.mask.to(dtype))
        assert torch.equal(whole_groups(changed, backend).loss, wanted)
        assert torch.equal(whole_groups(batch._replace(rewards=batch.rewards.to(dtype)), backend).loss, wanted)
    right = whole_groups(
        batch, backend, correct=batch.rewards.bool(), recipe=ek.recipes.EGPO.replace(correct_threshold=9)
    )
    assert torch.equal(right.loss, wanted)


# What is read and reported.


def silent_batch(layout):
    """A sequence with advantage 0 whose logits are NaN at one token."""
    batch = make_batch(layout)
    batch.advantages[2] = 0
    batch.logits[batch.at(2, 1)] = torch.nan
    return batch


TERMLESS = {one_pass: ek.PolicyLossConfig(), two_pass: ek.PolicyLossConfig(ratio="sequence")}


@pytest.mark.parametrize("config", TERMLESS.values(), ids=["one_pass", "two_pass"])
@EVERY_LAYOUT
@EVERY_BACKEND
def test_rows_without_a_gradient_are_read_only_for_metrics(config, layout, backend):
    batch = silent_batch(layout)
    everything = differentiate(one_pass, batch, backend, config=config, metrics="all")
    assert everything.loss.isnan() and everything.metrics["policy/nonfinite_rows/sum"] == 1
    active = differentiate(one_pass, batch, backend, config=config, metrics="active")
    assert active.loss.isfinite() and active.metrics["policy/nonfinite_rows/sum"] == 0
    silent = batch.sequence(2, batch.counts).sum()
    assert active.metrics["policy/tokens/sum"] == batch.counts.sum() - silent
    assert (batch.sequence(2, active.gradient) == 0).all() and active.gradient.isfinite().all()
    nothing = differentiate(one_pass, batch, backend, config=config, metrics="none")
    assert nothing.metrics == {}
    assert_agree(nothing, active)


@EVERY_BACKEND
def test_rows_of_rollout_weight_zero_are_inactive(backend):
    batch, config = silent_batch("padded"), ek.PolicyLossConfig()
    batch.advantages[2] = 1.0
    weights = torch.tensor([1.0, 1.0, 0.0, torch.nan], device=DEVICE)
    found = differentiate(one_pass, batch, backend, config=config, metrics="active", rollout_weights=weights)
    assert found.loss.isfinite() and (found.gradient[2] == 0).all() and found.gradient[3].abs().sum() > 0
    assert found.metrics["policy/unscored_tokens/sum"] == batch.mask[3].sum()


@pytest.mark.parametrize("mode", ["active", "none"])
@EVERY_BACKEND
def test_rows_with_other_terms_are_always_active(mode, backend):
    batch = make_batch()
    batch.advantages[2] = 0
    found, wanted = (differentiate(one_pass, batch, backend, config=BOTH_TERMS, metrics=m) for m in (mode, "all"))
    assert (found.gradient[2] != 0).any()
    assert_same(found, wanted)


@pytest.mark.parametrize("mode", ["active", "none"])
@pytest.mark.parametrize("path", [one_pass, two_pass, whole_groups])
@EVERY_BACKEND
def test_metrics_change_no_result(path, mode, backend):
    batch = make_batch()
    assert_agree(differentiate(path, batch, backend, metrics=mode), differentiate(path, batch, backend))


# Without a gradient.


@EVERY_WAY
@EVERY_BACKEND
def test_value_only(path, backend):
    batch = make_batch()
    wanted = differentiate(path, batch, backend)
    logits = batch.logits.clone().requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss, metrics = path(batch._replace(logits=logits), backend)
        assert not loss.requires_grad
        torch.testing.assert_close(loss.clone(), wanted.loss)
        assert metrics.keys() == wanted.metrics.keys()
    loss, _ = path(batch, backend)
    assert not loss.requires_grad
    assert all(not value.requires_grad for value in wanted.metrics.values())


# Token alignment.


def test_next_token_targets():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    tokens, counts = ek.next_token_targets(ids, mask)
    assert tokens[:, :-1].tolist() == ids[:, 1:].tolist()
    assert counts.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert ek.next_token_targets(ids)[1].tolist() == [[True, True, True, False]] * 2
    assert ek.next_token_targets(ids[0])[0].tolist() == [6, 7, 8, 5]
    empty = ek.next_token_targets(torch.zeros(2, 0, dtype=torch.long))
    assert empty[0].shape == empty[1].shape == (2, 0)


PACKED = torch.tensor([10, 11, 12, 20, 21, 30])
STARTS, PLACES = torch.tensor([0, 3, 5, 6]), torch.tensor([0, 1, 2, 0, 1, 0])


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
@pytest.mark.parametrize("mask", [None, torch.tensor([0, 1, 1, 1, 1, 1])])
def test_next_token_targets_of_packed_sequences(shape, mask):
    """No token is the target of the sequence before."""
    ids, mask = PACKED.view(shape).to(DEVICE), None if mask is None else mask.view(shape).to(DEVICE)
    by_offsets = ek.next_token_targets(ids, mask, cu_seqlens=STARTS.to(DEVICE))
    by_places = ek.next_token_targets(ids, mask, position_ids=PLACES.view(shape).to(DEVICE))
    for tokens, counts in (by_offsets, by_places):
        assert tokens.shape == counts.shape == shape
        assert tokens.flatten().tolist() == [11, 12, 20, 21, 30, 10]
        assert counts.flatten().tolist() == [True, True, False, True, False, False]
    assert ek.next_token_targets(ids, cu_seqlens=STARTS[:1].to(DEVICE))[1].sum() == 0
    short = torch.tensor([0, 3, 3, 5], device=DEVICE)  # an empty one, and a token past the end
    assert ek.next_token_targets(ids, cu_seqlens=short)[1].flatten().tolist() == [1, 1, 0, 1, 0, 0]


def test_next_token_targets_by_positions_of_a_padded_batch():
    """transformers' positions: 1 where a left-padded row has padding; what comes after padding is no target of it."""
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    places = torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]])
    mask = ids != 0
    assert ek.next_token_targets(ids, mask, position_ids=places)[1].tolist() == [[0, 0, 1, 0], [1, 1, 1, 0]]


def test_next_token_targets_of_malformed_offsets_elsewhere(monkeypatch):
    """As on a GPU: no token that a loss would take."""
    monkeypatch.setattr("egpo_kernels.inputs.validation.checks_values", lambda device: False)
    assert (ek.next_token_targets(PACKED, cu_seqlens=STARTS[1:])[0] == -1).all()


@pytest.mark.parametrize("backend", FAST)
def test_next_token_targets_equal_slicing(backend):
    batch = make_batch()
    ids = torch.randint(37, (4, 5)).to(DEVICE)
    logits = torch.cat([batch.logits, batch.logits[:, :1]], 1)
    tokens, mask = ek.next_token_targets(ids)
    whole = ek.logits_policy_loss(logits, tokens, batch.advantages, mask, backend=backend)
    sliced = ek.logits_policy_loss(logits[:, :-1], ids[:, 1:], batch.advantages, backend=backend)
    torch.testing.assert_close(whole.loss, sliced.loss)
