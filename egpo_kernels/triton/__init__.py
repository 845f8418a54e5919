"""Triton kernels. One file per kernel; `softmax`, `surrogates` and `settings` hold the device functions they share."""

if __name__ != "egpo_kernels.triton":
    raise ImportError(f"imported as {__name__!r}; this package is egpo_kernels.triton and must not shadow triton")

from egpo_kernels.triton.group_advantages import group_advantages
from egpo_kernels.triton.kept_columns import add_gathered, gathered_products
from egpo_kernels.triton.kept_entries import kept_entries, kept_logits, put_kept_, support_metrics
from egpo_kernels.triton.kept_rows import kept_gradient, kept_statistics
from egpo_kernels.triton.logits_gradient import logits_gradient
from egpo_kernels.triton.logits_policy_loss import logits_loss_gradient, logits_policy_loss
from egpo_kernels.triton.policy_loss import policy_loss, policy_loss_gradient
from egpo_kernels.triton.rescale import rescale_
from egpo_kernels.triton.row_making import token_rows
from egpo_kernels.triton.row_statistics import row_statistics, token_scores
from egpo_kernels.triton.shards import merged_shards, shard_statistics
from egpo_kernels.triton.softmax import scratch_bytes

__all__ = [
    "add_gathered",
    "gathered_products",
    "group_advantages",
    "kept_entries",
    "kept_gradient",
    "kept_logits",
    "kept_statistics",
    "logits_gradient",
    "logits_loss_gradient",
    "logits_policy_loss",
    "merged_shards",
    "policy_loss",
    "policy_loss_gradient",
    "put_kept_",
    "rescale_",
    "row_statistics",
    "scratch_bytes",
    "shard_statistics",
    "support_metrics",
    "token_rows",
    "token_scores",
]
