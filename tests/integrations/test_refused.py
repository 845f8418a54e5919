"""Models that cannot be fused, and calls that cannot be answered."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import from_logits, fused, make_batch, make_model
from tests.support.accuracy import assert_rounding


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def batch(model):
    return make_batch(model)


def changed(function):
    """A Llama whose class does ``function`` to its logits."""

    class Changed(type(make_model())):
        def forward(self, *inputs, **named):
            output = super().forward(*inputs, **named)
            output.logits = function(self, output.logits)
            return output

    model = make_model()
    model.__class__ = Changed
    return model


@pytest.mark.parametrize(
    "function",
    [
        lambda model, logits: logits.clamp(-5, 5),
        lambda model, logits: logits + 0.1,
        lambda model, logits: logits.index_fill(-1, torch.tensor([3]), -1e4),
        lambda model, logits: logits * model.model.norm.weight[0],
        lambda model, logits: logits[..., :-1],
        lambda model, logits: logits.softmax(-1),
    ],
    ids=["clamp", "shift", "one token", "learned scale", "fewer tokens", "softmax"],
)
def test_forwards_that_cannot_be_fused(function):
    with pytest.raises(ValueError, match="model is a Changed, whose forward does more than"):
        fuse_policy_loss(changed(function))


def test_forwards_that_can():
    model = changed(lambda model, logits: 7 * torch.tanh(logits.float() / 14))
    expected = from_logits(model, batch := make_batch(model))
    assert_rounding(fused(model, batch).loss, expected.loss)


def test_models_that_cannot_be_fused(model):
    with pytest.raises(TypeError, match=r"model is a Linear; it must be a transformers.PreTrainedModel"):
        fuse_policy_loss(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model is a OptimizedModule; .* fuse it before"):
        fuse_policy_loss(torch.compile(model))
    with pytest.raises(ValueError, match="model is a LlamaModel without output embeddings; it must be a causal LM"):
        fuse_policy_loss(model.model)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match=r"the head is a torch.nn.*Sequential; it must be a torch.nn.Linear"):
        fuse_policy_loss(model)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"epsilon": 0.2}, TypeError, "policy has 'epsilon'; its keys must be arguments of linear_policy_loss"),
        ({"logit_scale": 2.0}, TypeError, "policy has 'logit_scale'"),
        ({"lora": None}, TypeError, "policy has 'lora'"),
        ({"weight": 2.0}, TypeError, "policy has 'weight'"),
        ({"groups": 2, "rewards": torch.zeros(4)}, TypeError, "policy has 'advantages'.* linear_egpo_loss"),
        (
            {"old_log_probs": torch.zeros(4, 9).bfloat16()},
            TypeError,
            r"policy\['old_log_probs'\] has dtype torch.bfloat16",
        ),
        ({"tokens": torch.zeros(4, 8).long()}, ValueError, "tokens"),
    ],
)
def test_bad_policies(model, batch, change, error, message):
    fuse_policy_loss(model)
    with pytest.raises(error, match=message):
        model(batch.ids, policy=batch.policy | change)


def test_bad_calls(model, batch):
    fuse_policy_loss(model)
    with pytest.raises(TypeError, match="policy lacks 'tokens'; its keys must be arguments of linear_token_log_probs"):
        model(batch.ids, policy={})
    with pytest.raises(TypeError, match=r"policy is \[1\]; it must be a dict"):
        model(batch.ids, policy=[1])
    with pytest.raises(ValueError, match="labels and policy are both given"):
        model(batch.ids, labels=batch.ids, policy=batch.policy)
    with pytest.raises(TypeError, match="2 positional arguments"):
        model(batch.ids, batch.attention, policy=batch.policy)
