"""The token-level loss of EGPO (arXiv 2602.22751, Eq. 12) from log-probabilities, reduced."""

from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.surrogates import token_terms


def policy_loss(
    log_probs: Tensor, entropy: Tensor | None, rows: Rows, offsets: Tensor, config: PolicyLossConfig, vocab: int
) -> tuple[Tensor, Tensor]:
    """Reduced loss of each token ``[N]``, differentiable in ``log_probs`` and ``entropy``, and the metrics vector.

    ``k (u L + kl_coef KL - entropy_coef Ent)`` with k the reduction factor and u the rollout weight; the loss is the
    sum. Formulas: `egpo_kernels.formulas.surrogates`; k: `egpo_kernels.formulas.reduction.reduction_factor`.
    """
    assert rows.factor is not None
    terms = token_terms(log_probs, entropy, rows, offsets, config)
    raw = metrics.token_metrics(terms, log_probs, rows, config, vocab)
    return terms.loss(rows.factor, config), metrics.finish(raw.detach(), metrics.TOKEN)
