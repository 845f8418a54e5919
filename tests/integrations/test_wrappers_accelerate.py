"""What accelerate puts around a model: autocast, float32 outputs, offload hooks."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")
pytest.importorskip("accelerate", reason="accelerate is not installed (make parity installs it)")

import accelerate
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState

from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import (
    assert_same,
    differentiated,
    from_logits,
    fused,
    fused_already,
    make_batch,
    make_model,
)
from tests.integrations.wrappers import pair
from tests.support.accuracy import assert_bits


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_by_accelerate(when):
    """Weights on the meta device until the forward of their module."""
    model, batch = pair()
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    expected = from_logits(model, batch)
    kept = {"weight": model.lm_head.weight.detach().clone()}

    def offload():
        add_hook_to_module(model.lm_head, AlignDevicesHook("cpu", offload=True, weights_map=kept))

    if when == "before":
        offload()
    fuse_policy_loss(model)
    if when == "after":
        offload()
    assert model.lm_head.weight.is_meta
    assert_same(fused_already(model, batch), expected)
    assert model.lm_head.weight.is_meta


def accelerator_of(precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, mixed_precision=precision)


def prepared(model):
    return accelerator_of("bf16").prepare(model)


def test_autocast_put_around_the_forward():
    """Reported: a model prepared by accelerate and fused then ran its decoder in float32."""
    model = make_model()
    batch = make_batch(model)
    early, late = prepared(fuse_policy_loss(copy.deepcopy(model))), fuse_policy_loss(prepared(copy.deepcopy(model)))
    results, dtypes = [], []
    for each in (early, late):
        each.model.layers[0].mlp.up_proj.register_forward_hook(lambda *given: dtypes.append(given[2].dtype))
        results.append(differentiated(each, each(batch.ids, attention_mask=batch.attention, policy=batch.policy)))
    assert dtypes == [torch.bfloat16] * 2
    assert_bits(results[0].loss, results[1].loss, "loss")
    for name, gradient in results[0].gradients.items():
        assert_bits(gradient, results[1].gradients[name], name)
    assert not torch.is_autocast_enabled("cpu")
    assert results[0].loss != fused(model, batch).loss


def test_unwrapped_by_accelerate():
    """`keep_fp32_wrapper=False` makes a method of the forward that it finds."""
    model = make_model()
    batch = make_batch(model)
    accelerator = accelerator_of("bf16")
    wrapped = accelerator.prepare(fuse_policy_loss(model))
    bare = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert_same(fused_already(bare, batch), fused(make_model(), batch))
    assert not torch.is_autocast_enabled("cpu")
