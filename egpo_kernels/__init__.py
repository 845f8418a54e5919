"""EGPO and GRPO-family policy losses, fused from logits to loss and gradient (arXiv 2602.22751)."""

from egpo_kernels import recipes
from egpo_kernels.api.groups import group_advantages
from egpo_kernels.api.linear import linear_egpo_loss, linear_policy_loss, linear_token_log_probs
from egpo_kernels.api.logits import egpo_loss, logits_policy_loss, policy_loss, token_log_probs
from egpo_kernels.config.results import GroupAdvantages, LossOutput, ResponseSpans, SamplingSupport, TokenLogProbs
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Recipe
from egpo_kernels.engine import ops as ops  # registers the operators that the others call by name
from egpo_kernels.formulas.metrics import combine_metrics
from egpo_kernels.rollouts.kept import pack_support, support_from_lists, top_p_support
from egpo_kernels.rollouts.rewards import informative_groups, soft_overlong_penalty
from egpo_kernels.rollouts.sampling import off_policy_mask, rollout_weights
from egpo_kernels.rollouts.spans import response_spans, top_entropy_mask
from egpo_kernels.rollouts.targets import next_token_targets

__version__ = "0.2.0"

__all__ = [
    "AdvantageConfig",
    "GroupAdvantages",
    "LossOutput",
    "PolicyLossConfig",
    "Recipe",
    "ResponseSpans",
    "SamplingSupport",
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
    "pack_support",
    "policy_loss",
    "recipes",
    "response_spans",
    "rollout_weights",
    "soft_overlong_penalty",
    "support_from_lists",
    "token_log_probs",
    "top_entropy_mask",
    "top_p_support",
]
