"""Log-prob level: token losses of `egpo_kernels.formulas.surrogates`, differentiated by autograd over `[N]` vectors."""

import torch
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.surrogates import token_terms
from egpo_kernels.inputs.segments import Segments


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    segments: Segments,
    config: PolicyLossConfig,
    vocab: int,
    per_token: bool,
    reported: bool,
) -> tuple[Tensor, Tensor]:
    assert rows.factor is not None
    terms = token_terms(log_probs, entropy, rows, segments.bounds(log_probs.device) if config.pools else None, config)
    losses = terms.loss(rows.factor, config)
    vector = log_probs.new_empty(0)
    if reported:
        vector = metrics.finish(metrics.token_metrics(terms, log_probs, rows, config, vocab), metrics.TOKEN)
    return losses if per_token else metrics.total(losses), vector


def policy_loss_gradient(
    log_probs: Tensor, rows: Rows, segments: Segments, config: PolicyLossConfig, upstream: Tensor, want_bonus: bool
) -> tuple[Tensor, Tensor]:
    assert rows.factor is not None
    factor = rows.factor * upstream
    offsets = segments.bounds(log_probs.device) if config.pools else None
    recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with recording, torch.enable_grad():
        leaf = log_probs.detach().requires_grad_()
        terms = token_terms(leaf, None, rows, offsets, config)
        (slope,) = torch.autograd.grad(terms.loss(factor, config).sum(), leaf)
    bonus = torch.where(terms.live, -config.entropy_coef * factor, 0.0) if want_bonus else slope.new_empty(0)
    return slope, bonus
