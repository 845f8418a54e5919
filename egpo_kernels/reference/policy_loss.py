"""The token-level loss of EGPO (arXiv 2602.22751, Eq. 12) from log-probabilities, reduced."""

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
    """Loss (0-d, or reduced losses ``[N]``), differentiable in ``log_probs`` and ``entropy``, and the metrics vector.

    ``k (u L + kl_coef KL - entropy_coef Ent)`` with k the reduction factor and u the rollout weight; the loss is the
    sum. Formulas: `egpo_kernels.formulas.surrogates`; k: `egpo_kernels.formulas.reduction.reduction_factor`.
    """
    assert rows.factor is not None
    terms = token_terms(log_probs, entropy, rows, segments.bounds(log_probs.device) if config.pools else None, config)
    losses = terms.loss(rows.factor, config)
    vector = log_probs.new_empty(0)
    if reported:
        vector = metrics.finish(metrics.token_metrics(terms, log_probs, rows, config, vocab).detach(), metrics.TOKEN)
    return losses if per_token else metrics.total(losses), vector
