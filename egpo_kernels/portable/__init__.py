"""The same results anywhere torch runs: rows in cache-sized chunks, hand-written gradient of the logits."""

from egpo_kernels.formulas.kept import entries_of as kept_entries
from egpo_kernels.formulas.rows import token_rows
from egpo_kernels.formulas.whole_groups import group_advantages
from egpo_kernels.portable.chunks import scratch_bytes
from egpo_kernels.portable.kept import (
    add_gathered,
    gathered_products,
    kept_gradient,
    kept_logits,
    kept_statistics,
    put_kept_,
    support_metrics,
)
from egpo_kernels.portable.logits import (
    logits_gradient,
    logits_loss_gradient,
    logits_policy_loss,
    row_statistics,
    token_scores,
)
from egpo_kernels.portable.policy_loss import (
    policy_loss,
    policy_loss_and_gradient,
    policy_loss_gradient,
    scaled_gradients,
)
from egpo_kernels.portable.rescale import rescale_
from egpo_kernels.portable.shards import merged_shards, shard_statistics

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
    "policy_loss_and_gradient",
    "policy_loss_gradient",
    "put_kept_",
    "rescale_",
    "row_statistics",
    "scaled_gradients",
    "scratch_bytes",
    "shard_statistics",
    "support_metrics",
    "token_rows",
    "token_scores",
]
