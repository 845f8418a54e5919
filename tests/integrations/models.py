"""Tiny models of random weights, a batch for them, and one loss by two ways: from logits, and from a fused model."""

import copy
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import egpo_kernels as ek
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.support.accuracy import assert_accurate, assert_rounding
from tests.support.batches import BOTH_TERMS

VOCAB = 61
# Weights large enough that logits reach a softcap.
SHARED = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "initializer_range": 0.4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"tie_word_embeddings": True},
    # Padding must see some of its sequence: eager attention in float64, which 5.21 chooses, is NaN where all is masked.
    "Gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "Gemma3": {"final_logit_softcapping": 4.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 6.0},
    "Cohere": {"logit_scale": 0.3},
}


def make_model(name: str = "Llama", **more: Any) -> nn.Module:
    """A float32 model in eval mode."""
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**SHARED | MODELS[name] | more))
    return model.eval()


class Batch(NamedTuple):
    """Four sequences of up to nine tokens, padded on the right, and what is known of their responses."""

    ids: Tensor
    attention: Tensor
    policy: dict[str, Any]

    def double(self) -> "Batch":
        """The same numbers in float64."""
        return self._replace(policy={name: _double(value) for name, value in self.policy.items()})


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def make_batch(model: nn.Module) -> Batch:
    """A batch whose old log-probs are near the model's."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (4, 9), generator=generator)
    attention = (torch.arange(9) < torch.tensor([9, 7, 8, 5])[:, None]).long()
    tokens, mask = ek.next_token_targets(ids, attention.bool() & (torch.arange(9) >= 3))
    with torch.no_grad():
        now = ek.token_log_probs(model(ids, attention_mask=attention).logits, tokens, mask=mask).log_probs
    old, ref = (now + 0.3 * torch.randn(now.shape, generator=generator) for _ in range(2))
    advantages = torch.tensor([0.7, -0.6, 1.2, -0.9])
    policy = {"tokens": tokens, "mask": mask, "advantages": advantages, "old_log_probs": old.float()}
    return Batch(ids, attention, policy | {"ref_log_probs": ref.float(), "config": BOTH_TERMS})


class Result(NamedTuple):
    """A loss, its metrics, and the gradient of every parameter that trains."""

    loss: Tensor
    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]


def differentiated(model: nn.Module, output: ek.LossOutput) -> Result:
    """Gradients of a loss; those of the model are cleared."""
    output.loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    return Result(output.loss.detach(), output.metrics, gradients)


def from_logits(model: nn.Module, batch: Batch, **more: Any) -> Result:
    """The plain way: whole logits, by the model's own forward."""
    logits = model(batch.ids, attention_mask=batch.attention, **more).logits
    return differentiated(model, ek.logits_policy_loss(logits, backend="reference", **batch.policy))


def fused(model: nn.Module, batch: Batch, **more: Any) -> Result:
    """What is tested; the model given is fused."""
    return fused_already(fuse_policy_loss(model), batch, **more)


def fused_already(model: nn.Module, batch: Batch, **more: Any) -> Result:
    """The same of a model that was fused before, whatever has been put around it since."""
    return differentiated(model, model(batch.ids, attention_mask=batch.attention, policy=batch.policy, **more))


def assert_same(found: Result, expected: Result) -> None:
    """The same numbers to rounding."""
    assert_rounding(found.loss, expected.loss)
    assert found.metrics.keys() == expected.metrics.keys() and found.gradients.keys() == expected.gradients.keys()
    for name, value in expected.metrics.items():
        assert_rounding(found.metrics[name], value)
    largest = max(gradient.abs().max() for gradient in expected.gradients.values())
    assert largest > 0
    for name, gradient in expected.gradients.items():
        # Some are 0 but for rounding; what is lost is lost of what flows through the model.
        both = (torch.cat([each.flatten(), largest[None]]) for each in (found.gradients[name], gradient))
        assert_rounding(*both)


def assert_close_enough(model: nn.Module, batch: Batch, **more: Any) -> None:
    """The rule of `tests.support.accuracy` in float32, for the loss and every gradient."""
    exact = from_logits(copy.deepcopy(model).double(), batch.double(), **more)
    plain = from_logits(model, batch, **more)
    found = fused(model, batch, **more)
    assert_accurate(found.loss, plain.loss, exact.loss, exact.loss.abs(), "loss")
    assert found.gradients.keys() == exact.gradients.keys()
    for name, gradient in exact.gradients.items():
        # The terms of a sum are at least as large as the sum.
        assert_accurate(found.gradients[name], plain.gradients[name], gradient, gradient.abs().max(), name)
