"""The token-level loss of EGPO (arXiv 2602.22751, Eq. 12) from log-probabilities, reduced."""

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.selection import standing
from egpo_kernels.formulas.surrogates import own_log_ratios, token_terms
from egpo_kernels.formulas.token_metrics import token_metrics
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

    Rows outside the mask, and counted tokens whose own logit is -inf, are replaced before any arithmetic: nothing they
    hold can reach a value or a gradient.
    """
    assert rows.factor is not None
    values = log_probs.detach()
    found = standing(values, own_log_ratios(values, rows), rows.mask, config.max_log_ratio)
    live = found.live.rows

    def safe(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(live, values, 0.0)

    given = rows._replace(
        advantages=safe(rows.advantages),
        old_log_probs=safe(rows.old_log_probs),
        ref_log_probs=safe(rows.ref_log_probs),
        rollout_weights=safe(rows.rollout_weights),
    )
    own, bonus = torch.where(live, log_probs, 0.0), safe(entropy)
    terms = token_terms(own, own_log_ratios(own, given), given, found, segments, config)
    losses = torch.where(live, terms.loss(bonus, rows.factor, config), 0.0)
    loss, vector = metrics.total(losses), log_probs.new_empty(0)
    if reported:
        with torch.no_grad():
            raw = token_metrics(terms, loss, log_probs, bonus, rows, found, config, vocab)
            vector = metrics.finish(raw, metrics.TOKEN)
    return losses if per_token else loss, vector
