"""A call of each public function that is accepted, with every argument that it can be given."""

from typing import Any

import torch

import egpo_kernels as ek
from tests.support.batches import make_batch
from tests.support.device import DEVICE

LOSS, ADVANTAGE = ek.PolicyLossConfig(kl_coef=0.1), ek.AdvantageConfig()
OF_LOGITS = ["egpo_loss", "logits_policy_loss", "token_log_probs"]
OF_HIDDEN = ["linear_egpo_loss", "linear_policy_loss", "linear_token_log_probs"]
"""The same three, each with what it needs instead of logits."""
FUNCTIONS = [*OF_LOGITS, "group_advantages", "policy_loss", *OF_HIDDEN]
"""Those that take a backend."""
DIFFERENTIABLE = ("logits", "log_probs", "entropy", "hidden", "weight", "bias")
"""Arguments that a gradient may be asked for."""


def lead(name: str) -> str:
    """The argument that says what shape, and where, the others must be."""
    if name in OF_HIDDEN:
        return "hidden"
    return {"group_advantages": "old_log_probs", "policy_loss": "log_probs"}.get(name, "logits")


def of_hidden(name: str, layout: str, vocab: int) -> dict[str, Any]:
    """Arguments of a function of hidden states: those of its twin, with a layer in place of logits."""
    given = valid(OF_LOGITS[OF_HIDDEN.index(name)], layout, vocab)
    logits = given.pop("logits")
    del given["inplace_grad"]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    layer = {"hidden": normal(*logits.shape[:-1], 4), "weight": normal(vocab, 4), "bias": normal(vocab)}
    layer |= {"lora": (normal(2, 4), normal(vocab, 2), 0.5), "logit_scale": 0.5, "logit_softcap": 9.0}
    return {**layer, "num_active": 16, "max_chunk_bytes": 2000, **given}


def valid(name: str, layout: str = "padded", vocab: int = 37) -> dict[str, Any]:
    """Arguments that a public function accepts, all tensors among them."""
    batch = make_batch(layout, vocab)
    level = {"mask": batch.mask, "old_log_probs": batch.old_log_probs, "cu_seqlens": batch.cu_seqlens}
    token = {"ref_log_probs": batch.ref_log_probs, "rollout_weights": torch.ones(4, device=DEVICE)}
    token |= {"num_tokens": 12, "num_sequences": torch.tensor(4, device=DEVICE)}
    logits = {"logits": batch.logits, "tokens": batch.tokens, "temperature": torch.ones(4, device=DEVICE)}
    logits |= {"grad_scale": 1.0, "inplace_grad": False, "metrics": "all"}
    group = {"groups": batch.groups, "rewards": batch.rewards, "entropy_mask": batch.mask}
    group |= {"correct": batch.rewards > 0, "group_size": 2}
    if name in OF_HIDDEN:
        return of_hidden(name, layout, vocab)
    if name == "egpo_loss":
        return {**logits, **group, **level, **token, "recipe": ek.Recipe(loss=LOSS)}
    if name == "logits_policy_loss":
        return {**logits, **level, **token, "advantages": batch.advantages, "config": LOSS}
    if name == "policy_loss":
        entropy = {"entropy": -batch.old_log_probs, "log_probs": batch.old_log_probs, "config": LOSS}
        return {**entropy, **level, **token, "advantages": batch.advantages}
    if name == "group_advantages":
        return {**group, **level, "entropy": -batch.old_log_probs, "config": ADVANTAGE}
    if name == "token_log_probs":
        given = {key: logits[key] for key in ("logits", "tokens", "inplace_grad")}
        return {**given, "mask": batch.counts, "temperature": 0.7, "return_entropy": True}
    return {"input_ids": batch.tokens, "mask": batch.mask}


def call(name: str, arguments: dict[str, Any], backend: str = "portable") -> Any:
    return getattr(ek, name)(**arguments, **({"backend": backend} if name in FUNCTIONS else {}))
