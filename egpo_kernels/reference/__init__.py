"""The specification: plain PyTorch, the gradient by autograd, float64-capable. Read this to know what is computed."""

from egpo_kernels.formulas.groups import group_advantages
from egpo_kernels.reference.linear import linear_logits
from egpo_kernels.reference.log_probs import token_log_probs
from egpo_kernels.reference.policy_loss import policy_loss

__all__ = ["group_advantages", "linear_logits", "policy_loss", "token_log_probs"]
