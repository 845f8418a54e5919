"""What happens between forward and backward: second derivatives refused, changed inputs noticed."""

import pytest
import torch
from torch.autograd import forward_ad

import egpo_kernels as ek
from tests.support.batches import EVERY_WAY, FAST, make_batch
from tests.support.device import DEVICE

LATE = ek.PolicyLossConfig(ratio="sequence")


def through_a_layer(how, backend):
    """Loss of logits that a weight made of its inputs, both wanting gradients."""
    batch = make_batch("padded")
    hidden = torch.randn(*batch.tokens.shape, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, batch.logits.shape[-1], generator=torch.Generator().manual_seed(1))
    hidden, weight = (tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight))
    logits = hidden @ weight
    if how == "log_probs":
        log_probs, _ = ek.token_log_probs(logits, batch.tokens, mask=batch.mask, backend=backend)
        return log_probs.square().sum(), hidden, weight
    config = LATE if how == "late" else ek.PolicyLossConfig()
    given = {"old_log_probs": batch.old_log_probs, "config": config, "backend": backend}
    return ek.logits_policy_loss(logits, batch.tokens, batch.advantages, batch.mask, **given).loss, hidden, weight


@pytest.mark.parametrize("how", ["one_pass", "late", "log_probs"])
@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_never_leaves_out_the_logits(how, backend):
    loss, hidden, weight = through_a_layer(how, backend)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(first.square().sum(), weight)


@pytest.mark.parametrize("name", ["tokens", "old_log_probs"])
@pytest.mark.parametrize("backend", FAST)
def test_inputs_changed_before_backward_are_noticed(name, backend):
    batch = make_batch("padded")
    given = {"tokens": batch.tokens.clone(), "old_log_probs": batch.old_log_probs.clone()}
    logits = batch.logits.detach().clone().requires_grad_()
    tokens, old = given["tokens"], given["old_log_probs"]
    loss, _ = ek.logits_policy_loss(
        logits, tokens, batch.advantages, batch.mask, old_log_probs=old, config=LATE, backend=backend
    )
    given[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_float64_logits_below_float32s_range(backend):
    logits = (
        torch.randint(-3, 4, (2, 3, 9), generator=torch.Generator().manual_seed(0)).double() * 2.0**1000 - 2.0**1020
    )
    logits = logits.to(DEVICE)
    tokens = logits.argmax(-1)
    log_probs, _ = ek.token_log_probs(logits, tokens, backend=backend)
    ties = (logits == logits.amax(-1, keepdim=True)).sum(-1)
    torch.testing.assert_close(log_probs, -ties.double().log(), rtol=0, atol=4 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_the_default_dtype_changes_nothing(backend):
    batch = make_batch("padded")

    def loss():
        given = {"old_log_probs": batch.old_log_probs, "backend": backend}
        return ek.logits_policy_loss(batch.logits, batch.tokens, batch.advantages, batch.mask, **given).loss

    wanted = loss()
    torch.set_default_dtype(torch.float64)
    try:
        found = loss()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_a_gradient_is_written_over_only_once_nobody_holds_it(backend, dtype):
    batch = make_batch("padded")

    def gradient():
        logits = batch.logits.detach().to(dtype, copy=True).requires_grad_()
        ek.logits_policy_loss(logits, batch.tokens, batch.advantages, batch.mask, backend=backend).loss.backward()
        return logits.grad

    first = gradient()
    kept, view = first.clone(), first[0]
    again = gradient()
    assert again.data_ptr() != first.data_ptr() and torch.equal(first, kept) and torch.equal(again, kept)
    free = again.data_ptr()
    del first, again
    third = gradient()
    # Triton's interpreter holds the tensors of a launch a little longer.
    assert backend == "triton" or third.is_cuda or third.data_ptr() == free
    assert torch.equal(view, kept[0]) and torch.equal(third, kept)


class Dropped(torch.autograd.Function):
    """What lets no gradient through."""

    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, _):
        return None


@EVERY_WAY
@pytest.mark.parametrize("backend", FAST)
def test_no_gradient_from_upstream_is_none(path, backend):
    batch = make_batch()
    logits = batch.logits.clone().requires_grad_()
    Dropped.apply(path(batch._replace(logits=logits), backend).loss).backward()
    assert logits.grad is None or not logits.grad.any()


@pytest.mark.parametrize("backend", FAST)
def test_forward_mode_is_refused_and_writes_over_no_logits(backend):
    batch = make_batch("padded")
    logits, given = batch.logits.detach(), (batch.tokens, batch.advantages, batch.mask)
    before = logits.clone()
    with forward_ad.dual_level():
        ek.logits_policy_loss(logits, *given, inplace_grad=True, backend=backend)
        dual = forward_ad.make_dual(logits, torch.ones_like(logits))
        for score in (
            lambda: ek.logits_policy_loss(dual, *given, inplace_grad=True, backend=backend),
            lambda: ek.token_log_probs(dual, batch.tokens, backend=backend),
        ):
            with pytest.raises(NotImplementedError):
                score()
    assert torch.equal(logits, before)
