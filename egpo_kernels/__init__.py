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
from egpo_kernels.metrics import combine_metrics
from egpo_kernels.targets import next_token_targets
from egpo_kernels.types import (
    AdvantageConfig,
    GroupAdvantages,
    LossOutput,
    PolicyLossConfig,
    Recipe,
    TokenLogProbs,
)

__version__ = "0.1.0"

__all__ = [
    "AdvantageConfig",
    "GroupAdvantages",
    "LossOutput",
    "PolicyLossConfig",
    "Recipe",
    "TokenLogProbs",
    "combine_metrics",
    "egpo_loss",
    "group_advantages",
    "logits_policy_loss",
    "next_token_targets",
    "policy_loss",
    "recipes",
    "token_log_probs",
]
