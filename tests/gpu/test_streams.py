"""What streams demand: nothing waits for the device or another stream; graphs are captured, and replayed much later."""

import dataclasses

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.inputs.layout import group_ids
from tests.support.accuracy import assert_bits
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
    only_log_probs,
    two_pass,
    whole_groups,
)
from tests.support.device import DEVICE, captured, no_sync, side_by_side, size

pytestmark = pytest.mark.gpu

MADE_ON_THE_HOST = {"aten::lift_fresh", "aten::pin_memory", "aten::_pin_memory"}
"""What a profile shows where a tensor is made of Python numbers, or copied from the host."""


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


def scalars(number):
    """Settings of call ``number``: none is like another's."""
    config = ek.PolicyLossConfig(kl_coef=0.01 * number, entropy_coef=0.001 * number, max_log_ratio=10 + number / 100)
    return {"config": config, "temperature": 1 + 0.001 * number, "grad_scale": 1 + 0.01 * number}


def loss_of_logits(batch, number):
    return one_pass(batch, "triton", **scalars(number))


def loss_of_sequences(batch, number):
    given = scalars(number)
    config = dataclasses.replace(given.pop("config"), ratio="sequence")
    return one_pass(batch, "triton", config, **given)


def other_upstream(batch, number):
    loss, metrics = one_pass(batch, "triton", **scalars(number))
    return ek.LossOutput((2 + number) * loss, metrics)


def loss_of_groups(batch, number):
    recipe = ek.recipes.EGPO.replace(std_eps=1e-3 * number, nsr_scale=0.01 * number, uncertainty_eps=1e-4 * number)
    return whole_groups(batch, "triton", recipe=recipe, temperature=1 + 0.001 * number)


def warm_log_probs(batch, number):
    return only_log_probs(batch, "triton", temperature=1 + 0.001 * number)


EVERY_SETTING = pytest.mark.parametrize(
    "step",
    [loss_of_logits, loss_of_sequences, other_upstream, loss_of_groups, warm_log_probs],
    ids=lambda step: step.__name__,
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def made(step, batch, number):
    """Loss, gradient and metrics of a call, in one list."""
    loss, gradient, metrics = differentiate(lambda batch, _: step(batch, number), batch, "triton")
    return [loss, gradient, *metrics.values()]


def assert_same_bits(found, wanted):
    for mine, other in zip(found, wanted, strict=True):
        assert_bits(mine, other, "result")


@EVERY_DTYPE
@EVERY_SETTING
def test_settings_are_there_on_every_stream(step, dtype):
    """The first call with its settings waits behind a busy stream; the same on another finds all that it needs."""
    batch = make_batch(dtype=dtype)
    made(step, batch, 1)
    found = side_by_side([lambda: made(step, batch, 2)] * 2)
    wanted = made(step, batch, 2)
    for each in found:
        assert_same_bits(each, wanted)


@EVERY_DTYPE
@EVERY_SETTING
def test_a_graph_outlives_other_settings(step, dtype):
    """A captured graph reads what is its own, whatever other settings come later and memory is used for."""
    batch = make_batch(dtype=dtype)
    logits = batch.logits.clone().requires_grad_()

    def capture():
        logits.grad = None
        loss, metrics = step(batch._replace(logits=logits), 1)
        loss.backward()
        return [loss.detach(), logits.grad, *metrics.values()]

    wanted = made(step, batch, 1)
    replay = captured(capture)
    for number in range(2, size(5, 300)):
        made(step, batch, number)
    held = [torch.full((1 << power,), torch.nan, device=DEVICE) for power in range(4, 20) for _ in range(size(1, 64))]
    found = replay()
    assert held[0].isnan().all()
    assert_same_bits(found, wanted)


@EVERY_DTYPE
@EVERY_SETTING
def test_no_setting_is_copied_to_the_device(step, dtype, monkeypatch):
    """After a first call no tensor is made of numbers on the host, though every setting is another."""
    # On a CPU a gradient's memory is numpy's, which is seen too.
    monkeypatch.setattr("egpo_kernels.engine.memory.new_gradient", torch.empty_like)
    batch = make_batch(dtype=dtype)
    made(step, batch, 1)
    with torch.autograd.profiler.profile() as profile:
        for number in (1001, 1002):  # no other test's
            made(step, batch, number)
    seen = {event.name for event in profile.function_events}
    assert "aten::empty" in seen
    assert not seen & MADE_ON_THE_HOST


def test_making_a_tensor_of_numbers_is_seen():
    """Else the test before would say nothing."""
    with torch.autograd.profiler.profile() as profile:
        torch.tensor([1.0, 2.0]).to(DEVICE)
    assert {event.name for event in profile.function_events} & MADE_ON_THE_HOST


@EVERY_LAYOUT
@FAST_BACKEND
def test_inference_mode(layout, backend):
    """Tensors made there have no versions to count; nothing that is written to may need one."""
    batch = make_batch(layout)
    wanted = only_log_probs(batch, backend).loss
    wanted_loss, _ = one_pass(batch, backend)
    with torch.inference_mode():
        inner = batch.clone()
        assert_bits(only_log_probs(inner, backend).loss, wanted, "log-probs")
        assert_bits(only_log_probs(inner, backend, inplace_grad=True).loss, wanted, "log-probs, in place")
        loss, _ = one_pass(inner, backend, inplace_grad=True)
        assert_bits(loss, wanted_loss, "loss, in place")
        assert_bits(inner.logits, batch.logits, "logits that nobody differentiates")


def test_groups_on_the_host_are_refused_by_a_graph(monkeypatch):
    """A replay would copy from memory that is used for something else by then."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for groups in (["b", "b", "a", "a"], torch.tensor([4, 4, 1, 1])):
        with pytest.raises(ValueError, match=r"groups is on the CPU while a CUDA graph is captured.*; it must be a"):
            group_ids(groups, 4, torch.device("cuda"), None)
