"""The specification: plain PyTorch, the gradient by autograd, float64-capable. Read this to know what is computed."""

import functools

from egpo_kernels.formulas import whole_groups
from egpo_kernels.reference.kept import kept_logits
from egpo_kernels.reference.linear import linear_logits
from egpo_kernels.reference.log_probs import token_log_probs
from egpo_kernels.reference.policy_loss import policy_loss

group_advantages = functools.partial(whole_groups.group_advantages, look=False)

__all__ = ["group_advantages", "kept_logits", "linear_logits", "policy_loss", "token_log_probs"]
