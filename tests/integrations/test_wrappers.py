"""What may stand around a model and its head: it is gone through as it is without fusing, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")
pytest.importorskip("accelerate", reason="accelerate is not installed (make parity installs it)")

import accelerate
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState

import egpo_kernels as ek
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import (
    VOCAB,
    assert_same,
    differentiated,
    from_logits,
    fused,
    fused_already,
    make_batch,
    make_model,
)
from tests.support.accuracy import assert_bits, assert_rounding


def pair(name="Llama"):
    """A model in float64 and a batch for it."""
    model = make_model(name)
    batch = make_batch(model).double()
    return model.double(), batch


def halved(forward):
    return lambda *inputs, **named: forward(*inputs, **named) * 0.5


def masked(forward):
    def padded_ids(*inputs, **named):
        return forward(*inputs, **named).index_fill(-1, torch.tensor([VOCAB - 1]), -torch.inf)

    return padded_ids


def patch(module, wrapper):
    module.forward = wrapper(module.forward)


# Put on the head's instance.


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Granite"])
@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_a_patched_forward_that_scales(name, when):
    """Reported: log-probs off by 3.15 where the patch was left out."""
    model, batch = pair(name)
    if when in ("before", "both"):
        patch(model.lm_head, halved)
    if when != "before":
        fuse_policy_loss(model)
        patch(model.lm_head, halved)
    expected = from_logits(model, batch)
    for _ in range(2):
        assert_same(fused_already(model, batch) if when != "before" else fused(model, batch), expected)
    assert_same(fused(model, batch), expected)


@pytest.mark.parametrize("wrapper", [masked, lambda f: lambda x: f(x).clamp(-5, 5), lambda f: lambda x: f(x + 1)])
def test_a_patched_forward_that_does_more_is_refused_by_name(wrapper):
    """Reported: a mask of padded ids, log-probs off by 0.77."""
    model, batch = pair()
    patch(model.lm_head, wrapper)
    with pytest.raises(ValueError, match=r"does more \(around them: head.forward is tests\.integrations\."):
        fuse_policy_loss(model)
    late = fuse_policy_loss(make_model().double())
    fused_already(late, batch)
    patch(late.lm_head, wrapper)
    with pytest.raises(ValueError, match=r"head.forward is tests\.integrations\."):
        late(batch.ids, policy=batch.policy)


def test_a_head_patched_into_float32():
    """Reported: log-probs off by 0.018; there is an option for it."""
    model = make_model().bfloat16()
    head, kept = model.lm_head, make_batch(make_model())
    plain = model.lm_head.forward
    head.forward = lambda x: nn.functional.linear(x.float(), head.weight.float())
    with torch.no_grad():
        wanted = ek.token_log_probs(model(kept.ids).logits, kept.policy["tokens"]).log_probs
    with pytest.raises(ValueError, match=r"logits_dtype=torch.float32 stands for a head put into float32"):
        fuse_policy_loss(model)
    head.forward = plain
    with torch.no_grad():
        policy = {"tokens": kept.policy["tokens"]}
        found = fuse_policy_loss(model, logits_dtype=torch.float32)(kept.ids, policy=policy).log_probs
        rounded = fuse_policy_loss(model)(kept.ids, policy=policy).log_probs
    assert_rounding(found, wanted)
    assert (rounded - wanted).abs().max() > 1e-3
    head.float()
    model.lm_head.forward = lambda x: nn.functional.linear(x.float(), head.weight)
    with torch.no_grad():
        found = fuse_policy_loss(model, logits_dtype=torch.float32)(kept.ids, policy=policy).log_probs
    assert_rounding(found, wanted)


def test_a_forward_put_in_place_of_the_fused_one():
    """It knows nothing of fusing."""
    model, batch = pair()
    before = model.lm_head.forward
    fuse_policy_loss(model)
    model.lm_head.forward = lambda x: 0.5 * before(x)
    expected = from_logits(model, batch)
    assert_same(fused_already(model, batch), expected)


def test_a_head_that_is_not_called():
    model, batch = pair()
    fuse_policy_loss(model)
    model.forward.args[1].__self__.lm_head = nn.Linear(16, VOCAB, dtype=torch.float64)  # another head, not fused yet
    expected = from_logits(model, batch)
    assert_same(fused_already(model, batch), expected)


@pytest.mark.parametrize("level", ["instance", "class"])
def test_a_patched_forward_of_the_model(level, monkeypatch):
    model, batch = pair()
    plain = type(model).forward

    def scaled(self, *inputs, **named):
        output = plain(self, *inputs, **named)
        output.logits = output.logits / 3
        return output

    if level == "class":
        monkeypatch.setattr(type(model), "forward", scaled)
    else:
        model.forward = scaled.__get__(model)
    expected = from_logits(model, batch)
    assert_same(fused(model, batch), expected)


def test_a_scale_in_place():
    """What a model does to the small tensor in the place of its logits does not reach the result."""
    model, batch = pair()
    patch(model, lambda forward: lambda *a, **k: _divided(forward(*a, **k)))
    expected = from_logits(model, batch)
    assert_same(fused(model, batch), expected)


def _divided(output):
    output.logits = output.logits.clone().div_(3)
    return output


@pytest.mark.parametrize("way", [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated")
def test_parametrized_weights(way):
    model, batch = pair()
    way(model.lm_head, "weight")
    model.eval()
    expected = from_logits(model, batch)
    found = fused(model, batch)
    assert_same(found, expected)
    assert sum("lm_head" in name for name in expected.gradients) >= 1


# Hooks.


def test_a_hook_that_looks():
    """It sees a tensor, and changes nothing."""
    model, batch = pair()
    expected = from_logits(model, batch)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model.lm_head.register_forward_pre_hook(lambda module, inputs: None)
    fuse_policy_loss(model)
    shapes.clear()
    assert_same(fused_already(model, batch), expected)
    assert shapes == [(1, 1, 1)]
    with torch.no_grad():
        model(batch.ids, policy={"tokens": batch.policy["tokens"], "return_entropy": True})
    assert shapes[1:] == [(*batch.ids.shape, 1)]


HOOKS = {
    "output": lambda module, inputs, output: output * 2,
    "output in place": lambda module, inputs, output: output.mul_(2) and None,
    "input": lambda module, inputs: (inputs[0] + 1,),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_changes_something_is_refused_by_name(kind, when):
    model, batch = pair()
    register = "register_forward_pre_hook" if kind == "input" else "register_forward_hook"
    if when == "before":
        getattr(model.lm_head, register)(HOOKS[kind])
        with pytest.raises(ValueError, match=r"a forward (pre-)?hook tests.integrations.test_wrappers.<lambda>"):
            fuse_policy_loss(model)
    else:
        fuse_policy_loss(model)
        getattr(model.lm_head, register)(HOOKS[kind])
        with pytest.raises(ValueError, match=r"a forward (pre-)?hook tests.integrations.test_wrappers.<lambda>"):
            model(batch.ids, policy=batch.policy)


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


# Around the model.


def prepared(model, precision="bf16"):
    AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(model)


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
    assert results[0].loss != fused(model, batch).loss


def test_replicas_of_data_parallel_are_refused():
    model = fuse_policy_loss(make_model())
    for module in (model, model.lm_head, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"nn.DataParallel makes replicas .* one process a device"):
            module._replicate_for_data_parallel()


# What is kept, and what comes out.


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
