"""Tensors that lie oddly in memory, that share it, or that come from elsewhere: the same bits as from plain ones."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_alike, assert_rounding
from tests.support.batches import (
    EVERY_BACKEND,
    EVERY_LAYOUT,
    FAST,
    differentiate,
    make_batch,
    one_pass,
)
from tests.support.calls import DIFFERENTIABLE, FUNCTIONS, OF_HIDDEN, call, valid
from tests.support.device import DEVICE
from tests.support.fuzz import untouched
from tests.support.garbage import MILD, twisted

VIEWS = ["spread", "transposed", "negated", "parameter", "subclass", "inference", "grad", "not a leaf"]
assert set(VIEWS) <= set(MILD)


def results(name, arguments, backend):
    """The tensors that a call returns, and the gradient of the first where it has one, by name."""
    fields = call(name, arguments, backend)._asdict()
    found = {key: value.detach() for key, value in fields.items() if isinstance(value, torch.Tensor)}
    leaves = {key: arguments[key] for key in DIFFERENTIABLE if key in arguments}
    leaves = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
    first = next(iter(fields.values()))
    if first.requires_grad:
        gradients = torch.autograd.grad(first.sum(), list(leaves.values()), allow_unused=True)
        found |= {
            f"gradient of {key}": given for key, given in zip(leaves, gradients, strict=True) if given is not None
        }
    return found


def differentiable(arguments):
    """The same, with a gradient wanted."""
    names = [key for key in DIFFERENTIABLE if key in arguments and key != "entropy"]
    return arguments | {key: arguments[key].clone().requires_grad_() for key in names}


def assert_equal(name, found, wanted):
    """Bit for bit; products of matrices depend in their last bits on how those lie in memory."""
    for key in found.keys() & wanted.keys():
        if name in OF_HIDDEN:
            assert_rounding(found[key], wanted[key])
        else:
            assert_alike(found[key], wanted[key], key)


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("name", FUNCTIONS)
@EVERY_LAYOUT
@EVERY_BACKEND
def test_views_give_the_same_bits(name, how, layout, backend):
    plain = valid(name, layout)
    arguments = {key: twisted(value, how, 0) if torch.is_tensor(value) else value for key, value in plain.items()}
    # Logits are read where they lie, or refused; tests/inputs/test_bad_input_degenerate.py has the ways they may lie.
    if "logits" in plain and how in ("spread", "transposed"):
        arguments["logits"] = plain["logits"]
    check = untouched(arguments)
    found = results(name, arguments, backend)
    check(succeeded=True)
    assert_equal(name, found, results(name, differentiable(plain), backend))


@EVERY_LAYOUT
@EVERY_BACKEND
def test_a_parameter_that_holds_nan_is_reported_as_a_tensor_that_does(layout, backend):
    arguments = valid("policy_loss", layout)
    counted = arguments["mask"].nonzero()[1]
    arguments["log_probs"] = arguments["log_probs"].index_put(tuple(counted), torch.tensor(torch.nan, device=DEVICE))
    wanted = call("policy_loss", arguments, backend).metrics
    assert wanted["policy/ratio/min"].isnan() and wanted["policy/ratio/max"].isnan()
    for wants_gradient in (True, False):
        held = torch.nn.Parameter(arguments["log_probs"], requires_grad=wants_gradient)
        found = call("policy_loss", arguments | {"log_probs": held}, backend).metrics
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_alike(found[key], value, key)


@pytest.mark.parametrize("name", ["egpo_loss", "logits_policy_loss", "policy_loss", *OF_HIDDEN[:2]])
@EVERY_LAYOUT
@EVERY_BACKEND
def test_constants_made_under_inference_mode(name, layout, backend):
    # As by an engine that samples: autograd saves none of its tensors.
    arguments = differentiable(valid(name, layout))
    with torch.inference_mode():
        constants = {
            key: value.clone() for key, value in arguments.items() if torch.is_tensor(value) and not value.requires_grad
        }
    assert all(value.is_inference() for value in constants.values())
    found, wanted = (results(name, given, backend) for given in (arguments | constants, arguments))
    assert found.keys() == wanted.keys() and any(key.startswith("gradient") for key in found)
    assert_equal(name, found, wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
@EVERY_LAYOUT
@EVERY_BACKEND
def test_calls_under_inference_mode(name, layout, backend):
    wanted = results(name, valid(name, layout), backend)
    with torch.inference_mode():
        assert_equal(name, results(name, valid(name, layout), backend), wanted)


@EVERY_LAYOUT
@EVERY_BACKEND
def test_expanded_logits(layout, backend):
    batch = make_batch(layout)
    row = batch.logits.flatten(0, -2)[:1]
    shared = row.reshape([1] * (batch.logits.dim() - 1) + [-1]).expand(batch.logits.shape)
    found = one_pass(batch._replace(logits=shared), backend).loss
    assert torch.equal(found, one_pass(batch._replace(logits=shared.contiguous()), backend).loss)
    leaf = row.clone().requires_grad_()
    one_pass(batch._replace(logits=leaf.reshape(shared.shape[-1]).expand(batch.logits.shape)), backend).loss.backward()
    whole = differentiate(one_pass, batch._replace(logits=shared.contiguous()), backend)
    assert_rounding(leaf.grad[0], whole.gradient.flatten(0, -2).sum(0))


@pytest.mark.parametrize("vocab", [2, 33, 300_000])
@pytest.mark.parametrize("backend", FAST)
def test_vocabularies_up_to_300000(vocab, backend):
    batch = make_batch("packed", vocab, lengths=(1, 2))
    found, wanted = differentiate(one_pass, batch, backend), differentiate(one_pass, batch, "reference")
    assert_rounding(found.loss, wanted.loss)
    assert_rounding(found.gradient, wanted.gradient)


@EVERY_BACKEND
def test_masked_everywhere_marks_nothing_as_written(backend):
    # A write into an empty view of the logits counts as a write to the logits.
    for name in ("token_log_probs", "egpo_loss", "logits_policy_loss"):
        arguments = valid(name)
        arguments["mask"] = torch.zeros(arguments["tokens"].shape, dtype=torch.bool, device=DEVICE)
        check = untouched(arguments)
        call(name, arguments, backend)
        check(succeeded=True)
    logits = make_batch().logits.requires_grad_()
    squares = logits.square()
    ek.token_log_probs(logits, make_batch().tokens, mask=torch.zeros(4, 4, device=DEVICE), backend=backend)
    squares.sum().backward()
