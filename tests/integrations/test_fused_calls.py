"""Calls of a fused model: positions, what comes out, calls that meet."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

import egpo_kernels as ek
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import (
    VOCAB,
    assert_same,
    differentiated,
    fused,
    make_model,
)
from tests.integrations.wrappers import pair
from tests.support.accuracy import assert_bits, assert_rounding


def test_replicas_of_data_parallel_are_refused():
    model = fuse_policy_loss(make_model())
    for module in (model, model.lm_head, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"nn.DataParallel makes replicas .* one process a device"):
            module._replicate_for_data_parallel()


def test_positions_by_mask_and_by_row():
    """As transformers 5.24 takes them."""
    model, batch = pair()
    mask = batch.policy["mask"].clone()
    mask[0, 2:4] = False
    logits = model(batch.ids, attention_mask=batch.attention).logits
    policy = {k: v[mask] if torch.is_tensor(v) and v.dim() == 2 else v for k, v in batch.policy.items()}
    policy["cu_seqlens"] = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    expected = differentiated(model, ek.logits_policy_loss(logits[mask], backend="reference", **policy))
    assert_same(fused(model, batch._replace(policy=policy), logits_to_keep=mask), expected)
    rows = torch.tensor([[3, 4], [4, 5], [2, 3], [0, 1]])
    policy = {k: v.gather(1, rows) if torch.is_tensor(v) and v.dim() == 2 else v for k, v in batch.policy.items()}
    logits = model(batch.ids, attention_mask=batch.attention).logits
    chosen = logits.gather(1, rows[..., None].expand(-1, -1, VOCAB))
    expected = differentiated(model, ek.logits_policy_loss(chosen, backend="reference", **policy))
    assert_same(fused(model, batch._replace(policy=policy), logits_to_keep=rows), expected)


def test_a_gradient_through_the_entropy_alone():
    model, batch = pair()
    policy = {"tokens": batch.policy["tokens"], "return_entropy": True}
    fuse_policy_loss(model)
    model(batch.ids, policy=policy).entropy.sum().backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    ek.token_log_probs(model(batch.ids).logits, backend="reference", **policy).entropy.sum().backward()
    assert_rounding(found, model.lm_head.weight.grad)


def test_an_auxiliary_loss_is_refused():
    model, batch = pair()
    fuse_policy_loss(model)
    with pytest.raises(ValueError, match="output_router_logits is True with policy"):
        model(batch.ids, policy=batch.policy, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits is True with policy"):
        model(batch.ids, policy=batch.policy)


def test_a_checkpoint_around_the_model():
    """It may run the forward once more within the forward."""
    model, batch = pair()
    fuse_policy_loss(model)
    expected = model(batch.ids, policy=batch.policy).loss
    found = torch.utils.checkpoint.checkpoint(
        lambda ids: model(ids, policy=batch.policy).loss, batch.ids, use_reentrant=False
    )
    assert_bits(found, expected, "loss")
    gradients = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in (found, expected)]
    assert_bits(*gradients, "gradient")


def test_calls_of_several_threads():
    model, batch = pair()
    fuse_policy_loss(model)
    ids = [batch.ids.roll(shift, 0) for shift in range(4)]
    policies = [{"tokens": batch.policy["tokens"].roll(shift, 0)} for shift in range(4)]

    def call(number):
        with torch.no_grad():
            return model(ids[number % 4], policy=policies[number % 4]).log_probs

    wanted = [call(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(call, range(40))):
            assert_bits(found, wanted[number % 4], "log_probs")


def test_a_call_within_a_call_and_after_an_error():
    model, batch = pair()
    fuse_policy_loss(model)
    policy = {"tokens": batch.policy["tokens"]}
    inner = []

    def look(*_):
        if not inner:
            inner.append(None)
            with torch.no_grad():
                inner.append(model(batch.ids, policy=policy).log_probs)

    handle = model.model.norm.register_forward_hook(look)
    outer = model(batch.ids, policy=policy).log_probs
    assert_bits(inner[1], outer, "log_probs")
    handle.remove()
    with pytest.raises(ValueError, match="tokens"):
        model(batch.ids, policy={"tokens": batch.policy["tokens"] + VOCAB})
    assert model(batch.ids).logits.shape == (*batch.ids.shape, VOCAB)
    assert_bits(model(batch.ids, policy=policy).log_probs, outer, "log_probs")
