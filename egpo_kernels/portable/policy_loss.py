"""Log-prob level: the token losses of `egpo_kernels.surrogates`, differentiated by torch.func over `[N]` vectors."""

import torch
from torch import Tensor

from egpo_kernels.metrics import token_metrics
from egpo_kernels.surrogates import token_terms
from egpo_kernels.types import PolicyLossConfig, Rows


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
    factor = rows.factor
    assert factor is not None

    def total(values: Tensor) -> Tensor:
        return token_terms(values, None, rows, segments[0], config).loss(factor, config).sum()

    # Inside an operator autograd's graph is off; the functional transform works there too.
    slope = torch.func.grad(total)(log_probs)
    live = rows.mask & (log_probs != -torch.inf)
    return slope, torch.where(live, -config.entropy_coef * factor, 0.0)
