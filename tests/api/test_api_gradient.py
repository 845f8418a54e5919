"""The gradient of the logits as callers meet it: scaled, in place, twice, differentiated again."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_rounding
from tests.support.batches import (
    EVERY_BACKEND,
    EVERY_LAYOUT,
    EVERY_PATH,
    FAST_BACKEND,
    TRITON,
    differentiate,
    from_log_probs,
    make_batch,
    one_pass,
    two_pass,
    whole_groups,
)
from tests.support.device import DEVICE

LOSSES = pytest.mark.parametrize("path", [one_pass, two_pass, whole_groups])


def scaled(path, batch, backend, upstream, **options):
    """Gradient of the logits for an upstream gradient."""
    logits = batch.logits.clone().requires_grad_()
    loss, _ = path(batch._replace(logits=logits), backend, **options)
    (loss * upstream).backward()
    return logits.grad


# grad_scale.


@LOSSES
@EVERY_BACKEND
def test_upstream_as_expected_or_not(path, backend):
    batch = make_batch()
    plain = differentiate(path, batch, backend).gradient
    # Powers of two multiply without rounding.
    for expected, upstream in ((8.0, 8.0), (8.0, 2.0), (1.0, 0.5), (0.25, 1.0)):
        found = scaled(path, batch, backend, upstream, grad_scale=expected)
        assert_rounding(found / upstream, plain)
    assert torch.equal(scaled(path, batch, backend, 0.0, grad_scale=4.0), torch.zeros_like(plain))


def test_portable_makes_a_pass_only_for_another_upstream():
    batch = make_batch()
    logits = batch.logits.clone().requires_grad_()
    for upstream, passes in ((4.0, False), (2.0, True)):
        loss, _ = one_pass(batch._replace(logits=logits), "portable", grad_scale=4.0)
        kind = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind], record_shapes=True, acc_events=True) as profile:
            loss.backward(torch.tensor(upstream))
        sizes = [event.input_shapes[:1] for event in profile.events() if event.name == "aten::mul_"]
        assert (list(logits.shape) in [size for (size,) in sizes]) is passes


@pytest.mark.cpu  # counts traffic
@pytest.mark.parametrize("backend", [TRITON])
def test_triton_makes_a_pass_only_for_another_upstream(backend):
    from benchmarks.counts.traffic import count_traffic

    batch = make_batch()
    for upstream, passes in ((4.0, 0), (2.0, 1)):
        logits = batch.logits.clone().requires_grad_()
        loss, _ = one_pass(batch._replace(logits=logits), backend, grad_scale=4.0)
        with count_traffic() as traffic:
            loss.backward(torch.tensor(upstream))
        moved = traffic.of(logits.grad)
        assert moved.loaded == moved.stored == passes * logits.grad.nbytes


def eager_gradient(batch, logits, upstream):
    """What users write by hand."""
    log_probs = logits.float().log_softmax(-1) if logits.dtype == torch.float16 else logits.log_softmax(-1)
    own = log_probs.gather(-1, batch.tokens[..., None])[..., 0]
    ratio = (own - batch.old_log_probs).exp()
    advantages = batch.advantages[:, None]
    losses = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (torch.where(batch.mask, losses, 0).sum() / batch.mask.sum() * upstream).backward()
    return logits.grad


@pytest.mark.parametrize("expected", [65536.0, 1024.0, 1.0])
@EVERY_BACKEND
def test_half_precision_is_as_accurate_as_eager(backend, expected):
    upstream, batch = 65536.0, make_batch(dtype=torch.float16)
    # Over a large vocabulary most probabilities are small: without a scale their gradient is 0 in fp16.
    batch.logits[..., 1:].sub_(9)
    wanted = eager_gradient(batch, batch.logits.double().requires_grad_(), upstream)
    eager = eager_gradient(batch, batch.logits.clone().requires_grad_(), upstream)
    found = scaled(one_pass, batch, backend, upstream, config=ek.PolicyLossConfig(), grad_scale=expected)
    error, limit = (found - wanted).abs(), (eager - wanted).abs()
    half_a_unit = wanted.abs() * 2**-11 + 2**-25
    if expected == 1024:
        # Rounded once more, and at a smaller scale.
        half_a_unit = 2 * half_a_unit + 2**-25 * upstream / expected
    assert (error <= 1.5 * limit.max() * (limit > 0) + half_a_unit * 1.01 + 1e-6 * wanted.abs()).all()
    assert ((found == 0) <= (wanted.abs() < 2**-18)).all()


def test_half_precision_without_a_scale_waits_for_its_upstream():
    batch = make_batch(dtype=torch.float16)
    logits = batch.logits.clone().requires_grad_()
    config = ek.PolicyLossConfig()
    for scale, ahead in ((64.0, True), (1.0, False)):
        loss, _ = one_pass(batch._replace(logits=logits), "portable", config, grad_scale=scale)
        assert ("LogitsPolicyLoss" in loss.grad_fn.name()) is ahead


# In place.


@EVERY_PATH
@EVERY_LAYOUT
@FAST_BACKEND
def test_gradient_in_place_of_the_logits(path, layout, backend):
    batch = make_batch(layout)
    wanted = differentiate(path, batch, backend)
    for leaf in (True, False):
        source = batch.logits.clone().requires_grad_()
        logits = source if leaf else source * 1.0
        version, kept = logits._version, []
        if not leaf:
            logits.register_hook(lambda gradient: kept.append(gradient.data_ptr()))  # noqa: B023
        loss, _ = path(batch._replace(logits=logits), backend, inplace_grad=True)
        loss.backward()
        assert torch.equal(source.grad, wanted.gradient) and torch.equal(loss, wanted.loss)
        assert torch.equal(logits.detach(), wanted.gradient)
        assert (source.grad.data_ptr() if leaf else kept[0]) == logits.data_ptr()
        assert logits._version > version


@LOSSES
@FAST_BACKEND
def test_in_place_with_another_upstream(path, backend):
    batch = make_batch()
    wanted = scaled(path, batch, backend, 3.0)
    assert torch.equal(scaled(path, batch, backend, 3.0, inplace_grad=True), wanted)


@EVERY_PATH
@FAST_BACKEND
def test_second_backward_after_in_place_raises(path, backend):
    batch = make_batch()
    logits = batch.logits.clone().requires_grad_()
    loss, _ = path(batch._replace(logits=logits), backend, inplace_grad=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_grad=False"):
        loss.backward()


@EVERY_PATH
@FAST_BACKEND
def test_logits_needed_elsewhere_are_not_silently_lost(path, backend):
    batch = make_batch()
    source = batch.logits.clone().requires_grad_()
    logits = source * 1.0
    other = logits.square().sum()
    loss, _ = path(batch._replace(logits=logits), backend, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
        other.backward()


@EVERY_PATH
@FAST_BACKEND
def test_overlapping_logits_are_refused_in_place(path, backend):
    batch = make_batch()
    logits = batch.logits[:1].clone().requires_grad_()
    shared = batch._replace(logits=logits.expand(4, -1, -1))
    with pytest.raises(ValueError, match=r"logits with strides .* overlap .*inplace_grad"):
        path(shared, backend, inplace_grad=True)
    loss, _ = path(shared, backend)
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("path", [one_pass, two_pass])
@FAST_BACKEND
def test_logits_stay_where_no_gradient_is_wanted(path, backend):
    batch = make_batch()
    before = batch.logits.clone()
    path(batch, backend, inplace_grad=True)
    with torch.no_grad():
        path(batch._replace(logits=batch.logits.requires_grad_()), backend, inplace_grad=True)
    assert torch.equal(before, batch.logits)


# More than once.


@EVERY_PATH
@EVERY_BACKEND
def test_two_backwards_give_the_same_gradient_twice(path, backend):
    batch = make_batch()
    wanted = differentiate(path, batch, backend).gradient
    logits = batch.logits.clone().requires_grad_()
    loss, _ = path(batch._replace(logits=logits), backend)
    for upstream, last in ((1.0, False), (2.0, False), (1.0, True)):
        logits.grad = None
        loss.backward(torch.tensor(upstream, device=DEVICE), retain_graph=not last)
        assert_rounding(logits.grad / upstream, wanted)
    with pytest.raises(RuntimeError):
        loss.backward()


@EVERY_PATH
@EVERY_BACKEND
def test_gradients_accumulate_over_losses(path, backend):
    batch = make_batch()
    wanted = differentiate(path, batch, backend).gradient
    other = differentiate(from_log_probs, batch, backend).gradient
    logits = batch.logits.clone().requires_grad_()
    shared = batch._replace(logits=logits)
    (path(shared, backend).loss + 2 * from_log_probs(shared, backend).loss).backward()
    assert_rounding(logits.grad, wanted + 2 * other)
    path(shared, backend).loss.backward()
    assert_rounding(logits.grad, 2 * wanted + 2 * other)


@EVERY_PATH
@FAST_BACKEND
def test_two_losses_from_the_same_logits(path, backend):
    batch = make_batch()
    wanted = differentiate(path, batch, backend).gradient
    logits = batch.logits.clone().requires_grad_()
    shared = batch._replace(logits=logits)
    total = path(shared, backend).loss + path(shared, backend).loss
    total.backward()
    assert_rounding(logits.grad, 2 * wanted)


@EVERY_PATH
@EVERY_LAYOUT
@EVERY_BACKEND
def test_gradient_reaches_a_layer_in_front(path, layout, backend):
    batch = make_batch(layout)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(6, 37).to(DEVICE), torch.randn(*batch.tokens.shape, 6).to(DEVICE)

    def gradient(chosen, **options):
        head.zero_grad()
        path(batch._replace(logits=head(hidden)), chosen, **options).loss.backward()
        return head.weight.grad.clone(), head.bias.grad.clone()

    wanted = gradient("reference")
    for options in ({}, {} if backend == "reference" else {"inplace_grad": True}):
        for found, right in zip(gradient(backend, **options), wanted, strict=True):
            assert_rounding(found, right)


# The gradient of the gradient.


@EVERY_PATH
@FAST_BACKEND
def test_second_derivative_is_refused(path, backend):
    batch = make_batch()
    wanted = differentiate(path, batch, backend).gradient
    logits = batch.logits.clone().requires_grad_()
    loss, _ = path(batch._replace(logits=logits), backend)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(gradient, wanted)
    with pytest.raises(RuntimeError, match=rf"differentiates once.*{backend} backend.*backend='reference'"):
        gradient.square().sum().backward()


@FAST_BACKEND
def test_second_derivative_of_log_probs_is_refused(backend):
    batch = make_batch()
    log_probs = batch.old_log_probs.clone().requires_grad_()
    loss, _ = ek.policy_loss(log_probs, batch.old_log_probs - 0.1, batch.advantages, batch.mask, backend=backend)
    (gradient,) = torch.autograd.grad(loss, log_probs, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.square().sum().backward()


@EVERY_PATH
def test_reference_differentiates_twice(path):
    batch = make_batch(dtype=torch.float64, vocab=5, lengths=(2, 1))
    logits = batch.logits.clone().requires_grad_()
    loss, _ = path(batch._replace(logits=logits), "reference")
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    gradient.square().sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
