"""Functions in place of a forward: gone through as they are without fusing, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

import egpo_kernels as ek
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import (
    VOCAB,
    assert_same,
    from_logits,
    fused,
    fused_already,
    make_batch,
    make_model,
)
from tests.integrations.wrappers import halved, pair, patch
from tests.support.accuracy import assert_rounding


def masked(forward):
    def padded_ids(*inputs, **named):
        return forward(*inputs, **named).index_fill(-1, torch.tensor([VOCAB - 1]), -torch.inf)

    return padded_ids


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
    patch(model.lm_head, lambda forward: lambda x: forward(x).div_(3))
    expected = from_logits(model, batch)
    assert_same(fused(model, batch), expected)


def test_a_scale_by_width_is_gone_through():
    """As in muP."""
    model, batch = pair()
    patch(model.lm_head, lambda f: lambda x: f(x) / x.shape[-1] ** 0.5)
    expected = from_logits(model, batch)
    assert_same(fused(model, batch), expected)


def with_adapter(forward):
    """Somebody's own adapter."""
    torch.manual_seed(1)
    layers = nn.Linear(16, 2, dtype=torch.float64), nn.Linear(2, VOCAB, dtype=torch.float64)
    return lambda x: forward(x) + layers[1](layers[0](x))


def with_a_bias(forward):
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    return lambda x: nn.functional.linear(x, forward.__self__.weight, bias)


MORE = {
    "an adapter": with_adapter,
    "another bias": with_a_bias,
    "relu": lambda f: lambda x: f(x.relu()),
    "rounded": lambda f: lambda x: f(x.bfloat16().double()),
    "detached": lambda f: lambda x: f(x.detach()),
    "by position": lambda f: lambda x: f(x) * torch.linspace(1, 2, x.shape[1], dtype=x.dtype)[:, None],
    "by length": lambda f: lambda x: f(x) / x.shape[1] ** 0.5,
    "in training": lambda f: lambda x: f(x) * (0.5 if f.__self__.training else 1.0),
    "dropout in training": lambda f: lambda x: nn.functional.dropout(f(x), 0.5, f.__self__.training),
}


@pytest.mark.parametrize("name", MORE)
def test_more_patches_that_are_refused(name):
    model, _ = pair()
    patch(model.lm_head, MORE[name])
    with pytest.raises(ValueError, match="whose forward does more"):
        fuse_policy_loss(model)


@pytest.mark.parametrize("cut", [lambda o: o[..., :VOCAB], lambda o: o.index_fill(-1, torch.arange(VOCAB, 64), -1e30)])
def test_a_head_wider_than_the_vocabulary_of_the_config(cut):
    """Padded ids that a patch cuts off or masks."""
    model, _ = pair()
    model.lm_head = nn.Linear(16, 64, bias=False, dtype=torch.float64)
    patch(model.lm_head, lambda f: lambda x: cut(f(x)))
    with pytest.raises(ValueError, match="whose forward does more"):
        fuse_policy_loss(model)


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


def test_no_parameter_and_no_generator_is_touched():
    model, _ = pair()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fuse_policy_loss(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not model.training and not model.lm_head.training
