"""What callers put around a call: a loss changed in place, a default device, functional transforms, another GPU."""

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.engine import operator
from tests.engine.test_ops import MADE, arguments
from tests.support.accuracy import assert_rounding
from tests.support.batches import (
    EVERY_WAY,
    FAST,
    assert_same,
    differentiate,
    from_log_probs,
    make_batch,
    one_pass,
    two_pass,
)
from tests.support.device import DEVICE


@EVERY_WAY
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_loss_divided_in_place(path, backend):
    batch = make_batch()

    def halved(*given):
        loss, metrics = path(*given)
        loss /= 2
        return loss, metrics

    found, wanted = (differentiate(way, batch, backend).gradient for way in (halved, path))
    assert wanted.any()
    assert_rounding(found, wanted / 2)


@EVERY_WAY
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_default_device_changes_nothing(path, backend):
    batch = make_batch()
    wanted = differentiate(path, batch, backend)
    with torch.device("meta"):
        found = differentiate(path, batch, backend)
    assert_same(found, wanted)
    assert {value.device.type for value in found.metrics.values()} <= {batch.logits.device.type}


BATCH, CONFIG = make_batch(), ek.PolicyLossConfig(kl_coef=0.1, dual_clip=3.0)


def of_log_probs(log_probs):
    """Loss of the reference, with a KL and a ratio that is clipped."""
    given = {"ref_log_probs": BATCH.ref_log_probs, "config": CONFIG, "backend": "reference"}
    return ek.policy_loss(log_probs, BATCH.old_log_probs, BATCH.advantages, BATCH.mask, **given).loss


# vmap has no rule of its own for some operations, and does them one by one.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_reference_is_transformed():
    log_probs = BATCH.old_log_probs + 0.1
    both = torch.stack([log_probs, log_probs - 0.2])
    assert_rounding(torch.func.vmap(of_log_probs)(both), torch.stack([of_log_probs(each) for each in both]))
    leaf = log_probs.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(of_log_probs(leaf), leaf)
    assert wanted.any()
    assert_rounding(torch.func.grad(of_log_probs)(log_probs), wanted)
    assert torch.func.hessian(of_log_probs)(log_probs).any()


# Dynamo warns of whatever caches what it returns.
@pytest.mark.filterwarnings("ignore:.*lru_cache")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_the_reference_is_compiled_whole(compiler):
    torch._dynamo.reset()
    log_probs = BATCH.old_log_probs + 0.1
    found = torch.compile(of_log_probs, fullgraph=True, backend=compiler)(log_probs)
    assert_rounding(found, of_log_probs(log_probs))


def of_groups(rewards):
    """Advantages and metrics of the reference."""
    return ek.group_advantages(2, rewards, BATCH.old_log_probs, BATCH.mask, backend="reference")


@pytest.mark.filterwarnings("ignore:.*lru_cache")
def test_the_reference_of_groups_is_compiled_whole():
    torch._dynamo.reset()
    found = torch.compile(of_groups, fullgraph=True, backend="aot_eager")(BATCH.rewards)
    wanted = of_groups(BATCH.rewards)
    assert wanted.advantages.any()
    assert_rounding(found.advantages, wanted.advantages)
    for key, value in wanted.metrics.items():
        assert_rounding(found.metrics[key], value)


@pytest.mark.parametrize("path", [one_pass, two_pass, from_log_probs])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_counts_are_constants(path, backend):
    count = torch.tensor(9.0, device=DEVICE, requires_grad=True)
    found = differentiate(path, make_batch(), backend, num_tokens=count)
    assert found.gradient.any() and count.grad is None


@pytest.mark.parametrize("name", ["token_rows", "scaled_gradients", "row_statistics", "group_advantages"])
def test_an_operator_makes_its_tensors_gpu_current(name, monkeypatch):
    entered = []

    class Entered:
        def __init__(self, device):
            assert device == 1

        def __enter__(self):
            entered.append(1)

        def __exit__(self, *_):
            entered.append(0)

    monkeypatch.setattr(operator, "_elsewhere", lambda first: 1)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    MADE[name](*arguments(name, "portable"))
    assert entered[:1] + entered[-1:] == [1, 0]
