"""Other libraries' Triton kernels, called through their public functions; imported only when they are counted.

Their temperature is compiled in. It is 1 here, which folds their division of every logit away; ours is a run-time
value.
"""

import torch

from benchmarks.counts.cases import Batch, Case

PACKAGES = {"liger": "liger-kernel", "trl": "trl"}


def liger_loss(batch: Batch, level: str) -> None:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        batch.logits, batch.log_probs, None, batch.tokens, batch.advantages, torch.ones_like(batch.log_probs),
        temperature=1.0, beta=0.0, inplace=True, reduce=True, importance_sampling_level=level,
    )  # fmt: skip
    loss.backward()


def liger_log_probs(batch: Batch) -> None:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    fused_selective_log_softmax(batch.logits, batch.tokens, temperature=1.0)


def trl_value(batch: Batch) -> None:
    from trl.kernels import selective_log_softmax_and_entropy

    with torch.no_grad():
        selective_log_softmax_and_entropy(batch.logits, batch.tokens)


def trl_gradient(batch: Batch) -> None:
    from trl.kernels import selective_log_softmax_and_entropy

    log_probs, entropy = selective_log_softmax_and_entropy(batch.logits, batch.tokens)
    (log_probs.sum() + entropy.sum()).backward()


RIVALS = (
    Case("fused_selective_log_softmax, value", liger_log_probs, "liger", extra_positions=1),
    Case("triton_grpo_loss, in place", lambda batch: liger_loss(batch, "token"), "liger", extra_positions=1),
    Case(
        "triton_grpo_loss, sequence ratio, in place",
        lambda batch: liger_loss(batch, "sequence"), "liger", extra_positions=1,
    ),
    Case("selective_log_softmax_and_entropy, value", trl_value, "trl"),
    Case("selective_log_softmax_and_entropy", trl_gradient, "trl"),
)  # fmt: skip
