"""A call of each public function that is accepted, with every argument that it can be given."""

from typing import Any

import torch

import egpo_kernels as ek
from tests.support.batches import make_batch
from tests.support.device import DEVICE

LOSS, ADVANTAGE = ek.PolicyLossConfig(kl_coef=0.1), ek.AdvantageConfig()
FUNCTIONS = ["egpo_loss", "group_advantages", "policy_loss", "logits_policy_loss", "token_log_probs"]
"""Those that take a backend."""


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
