"""Log-prob level: token losses of `egpo_kernels.formulas.surrogates`, differentiated by autograd over `[N]` vectors."""

import torch
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows
from egpo_kernels.formulas.metrics import token_metrics
from egpo_kernels.formulas.surrogates import token_terms


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    segments: list[Tensor],
    config: PolicyLossConfig,
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """Reduced loss of each token ``[N]`` and the raw metrics."""
    assert rows.factor is not None
    terms = token_terms(log_probs, entropy, rows, segments[0], config)
    return terms.loss(rows.factor, config), token_metrics(terms, log_probs, rows, config, vocab)


def policy_loss_gradient(
    log_probs: Tensor, entropy: Tensor | None, rows: Rows, segments: list[Tensor], config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed token losses with respect to ``log_probs`` and entropy, ``[N]`` each."""
    assert rows.factor is not None
    # Inside an operator autograd is switched off below the level `enable_grad` reaches.
    recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with recording, torch.enable_grad():
        leaf = log_probs.detach().requires_grad_()
        terms = token_terms(leaf, None, rows, segments[0] if segments else None, config)
        (slope,) = torch.autograd.grad(terms.loss(rows.factor, config).sum(), leaf)
    return slope, torch.where(terms.live, -config.entropy_coef * rows.factor, 0.0)
