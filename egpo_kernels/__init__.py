"""EGPO and GRPO-family policy losses, fused from logits to loss and gradient (arXiv 2602.22751)."""

# ops registers the operators that the others call by name.
from egpo_kernels import ops as ops
from egpo_kernels import recipes
from egpo_kernels.api import (
    egpo_loss,
    logits_policy_loss,
    policy_loss,
    token_log_probs,
)
from egpo_kernels.groups import group_advantages
from egpo_kernels.linear.api import linear_egpo_loss, linear_policy_loss, linear_token_log_probs
from egpo_kernels.metrics import combine_metrics
from egpo_kernels.rewards import informative_groups, soft_overlong_penalty
from egpo_kernels.sampling import off_policy_mask, rollout_weights
from egpo_kernels.spans import response_spans, top_entropy_mask
from egpo_kernels.targets import next_token_targets
from egpo_kernels.types import (
    AdvantageConfig,
    GroupAdvantages,
    LossOutput,
    PolicyLossConfig,
    Recipe,
    ResponseSpans,
    TokenLogProbs,
)

__version__ = "0.1.0"

__all__ = [
    "AdvantageConfig",
    "GroupAdvantages",
    "LossOutput",
    "PolicyLossConfig",
    "Recipe",
    "ResponseSpans",
    "TokenLogProbs",
    "combine_metrics",
    "egpo_loss",
    "group_advantages",
    "informative_groups",
    "linear_egpo_loss",
    "linear_policy_loss",
    "linear_token_log_probs",
    "logits_policy_loss",
    "next_token_targets",
    "off_policy_mask",
    "policy_loss",
    "recipes",
    "response_spans",
    "rollout_weights",
    "soft_overlong_penalty",
    "token_log_probs",
    "top_entropy_mask",
]
