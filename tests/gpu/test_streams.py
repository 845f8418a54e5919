"""What a stream demands: nothing waits for the device, and all of it can be captured in a CUDA graph and replayed."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.batches import (
    EVERY_LAYOUT,
    FAST_BACKEND,
    PATHS,
    Result,
    assert_same,
    differentiate,
    every_helper,
    from_log_probs,
    make_batch,
    one_pass,
    two_pass,
)
from tests.support.device import DEVICE, captured, no_sync

pytestmark = pytest.mark.gpu


def per_token(batch, backend):
    """Reduction `none`, per-token temperatures, rollout weights with one that is missing."""
    heat, weights = torch.full_like(batch.old_log_probs, 0.8), torch.ones_like(batch.advantages)
    weights[1:2] = torch.nan
    config = ek.PolicyLossConfig(reduction="none", dual_clip=3.0, entropy_coef=0.1)
    loss, metrics = one_pass(batch, backend, config, temperature=heat, rollout_weights=weights)
    return ek.LossOutput(loss.sum(), metrics)


def scaled(batch, backend):
    """Counts on the device, and another upstream than the expected one."""
    loss, metrics = one_pass(batch, backend, num_tokens=batch.counts.sum(), grad_scale=0.5)
    return ek.LossOutput(3 * loss, metrics)


def in_place(batch, backend):
    """The gradient over the logits."""
    return one_pass(batch._replace(logits=batch.logits * 1), backend, inplace_grad=True)


EVERY_PATH = [*PATHS.values(), from_log_probs, per_token, scaled, in_place]


@pytest.mark.parametrize("path", EVERY_PATH, ids=lambda path: path.__name__)
@EVERY_LAYOUT
@FAST_BACKEND
def test_no_loss_waits_for_the_device(path, layout, backend):
    batch = make_batch(layout)
    with no_sync():
        found = differentiate(path, batch, backend)
        merged = ek.combine_metrics([found.metrics, found.metrics])
    assert found.loss.isfinite() and found.gradient.isfinite().all()
    assert merged.keys() == found.metrics.keys()


GROUPS = {
    "int": lambda: 2,
    "names": lambda: ["b", "b", "a", "a"],
    "ids on the host": lambda: torch.tensor([4, 4, 1, 1]),
    "ids on the device": lambda: torch.tensor([4, 4, 1, 1], device=DEVICE),
}


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@EVERY_LAYOUT
@FAST_BACKEND
def test_no_group_waits_for_the_device(groups, group_size, layout, backend):
    batch, ids = make_batch(layout), groups()
    logits = batch.logits.clone().requires_grad_()
    shared = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens, "group_size": group_size, "backend": backend}
    with no_sync():
        grouped = ek.group_advantages(ids, batch.rewards, batch.old_log_probs, **shared)
        given = {"old_log_probs": batch.old_log_probs, **shared}
        ek.egpo_loss(logits, batch.tokens, ids, batch.rewards, **given).loss.backward()
    assert grouped.advantages.isfinite().all() and grouped.metrics["egpo/groups/sum"] == 2
    assert logits.grad.isfinite().all()


def test_next_token_targets_wait_for_nothing():
    batch = make_batch()
    with no_sync():
        tokens, mask = ek.next_token_targets(batch.tokens, batch.mask)
    assert torch.equal(tokens[:, :-1], batch.tokens[:, 1:]) and not mask[:, -1].any()


@EVERY_LAYOUT
def test_no_helper_waits_for_the_device(layout):
    batch = make_batch(layout)
    with no_sync():
        found = every_helper(batch)
    assert all(value.device.type == torch.device(DEVICE).type for value in found)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@EVERY_LAYOUT
def test_a_graph_replayed_on_new_values(path, layout, inplace):
    """Loss, gradient and metrics of values written into the captured inputs: bit for bit those of a plain call."""
    first, second = make_batch(layout), make_batch(layout, seed=1)
    held = first.clone()
    held.logits.requires_grad_()

    def step():
        held.logits.grad = None
        loss, metrics = path(held, "triton", inplace_grad=inplace)
        loss.backward()
        return Result(loss.detach(), held.logits.grad, metrics)

    replay = captured(step)
    for given in (second, first):
        with torch.no_grad():
            for mine, new in zip(held, given, strict=True):
                if mine is not None:
                    mine.copy_(new)
        found, wanted = replay(), differentiate(path, given, "triton")
        assert_same(found, wanted)
        for key, value in wanted.metrics.items():
            assert torch.equal(found.metrics[key], value) or value.isnan(), key


@pytest.mark.parametrize("path", [one_pass, two_pass])
def test_a_graph_of_another_upstream(path):
    """The pass over the gradient happens or not as the upstream gradient of each replay says."""
    batch = make_batch()
    logits, upstream = batch.logits.clone().requires_grad_(), torch.ones((), device=DEVICE)

    def step():
        logits.grad = None
        path(batch._replace(logits=logits), "triton").loss.backward(upstream)
        return logits.grad

    replay = captured(step)
    wanted = differentiate(path, batch, "triton").gradient
    for value in (1.0, 4.0, 1.0):
        upstream.fill_(value)
        assert torch.equal(replay(), wanted * value)
