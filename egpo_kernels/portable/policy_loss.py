"""Log-prob level: the token losses of `egpo_kernels.formulas.surrogates` and their derivatives, in closed form."""

import math

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.arrays import at_hand
from egpo_kernels.formulas.selection import Standing, standing
from egpo_kernels.formulas.surrogates import TokenTerms, own_log_ratios, token_slopes, token_terms
from egpo_kernels.formulas.token_metrics import token_metrics, wide_sum
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
    """The loss, 0-d or ``per_token`` the reduced losses, and the metrics vector, ``[0]`` unless ``reported``.

    Only a ratio that sequences share needs ``segments``. What is per token is ``[N]``, or all of it of
    ``segments.shape``, to which ``rows`` then need only broadcast.
    """
    terms, found = _terms(log_probs, rows, segments, config)
    loss, vector, losses = _reduced(terms, found, log_probs, entropy, rows, config, vocab, reported)
    return losses if per_token else loss, vector


def policy_loss_gradient(
    log_probs: Tensor,
    rows: Rows,
    segments: Segments,
    config: PolicyLossConfig,
    upstream: Tensor | float,
    want_bonus: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``sum(upstream * losses)`` by ``log_probs`` and by entropy (``[0]`` unless ``want_bonus``).

    Shapes are as in `policy_loss`; ``upstream`` is a number, 0-d or per token: where a row does not count the gradient
    is 0, whatever it holds.
    """
    assert rows.factor is not None
    terms, found = _terms(log_probs, rows, segments, config)
    factor = (rows.factor * upstream).to(log_probs.dtype)
    return _slopes(terms, found, factor, rows, segments, config, want_bonus)


def policy_loss_and_gradient(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    segments: Segments,
    config: PolicyLossConfig,
    reported: bool,
    want_bonus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and metrics vector of `policy_loss` and its gradients from the same terms, and the rows that have one.

    The gradients, of `policy_loss_gradient`, are for an upstream of 1: see `scaled_gradients`.
    """
    terms, found = _terms(log_probs, rows, segments, config)
    loss, vector, _ = _reduced(terms, found, log_probs, entropy, rows, config, 0, reported)
    assert rows.factor is not None
    slope, bonus = _slopes(terms, found, rows.factor, rows, segments, config, want_bonus)
    return loss, vector, slope, bonus, found.live.rows


def scaled_gradients(gradients: list[Tensor], live: Tensor, upstream: Tensor) -> list[Tensor]:
    """Gradients times ``upstream`` 0-d, which reaches only ``live`` rows, whatever it is."""
    if at_hand(upstream) and math.isfinite(upstream.item()):
        return [gradient * upstream for gradient in gradients]
    return [torch.where(live, gradient * upstream, 0.0) for gradient in gradients]


def _terms(log_probs: Tensor, rows: Rows, segments: Segments, config: PolicyLossConfig) -> tuple[TokenTerms, Standing]:
    own = own_log_ratios(log_probs, rows)
    found = standing(log_probs, own, rows.mask, config.max_log_ratio)
    return token_terms(log_probs, own, rows, found, segments, config), found


def _reduced(
    terms: TokenTerms,
    found: Standing,
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    config: PolicyLossConfig,
    vocab: int,
    reported: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics vector, and the losses that the loss is the sum of."""
    assert rows.factor is not None
    losses = found.live.keep(terms.loss(entropy, rows.factor, config))
    loss = wide_sum(losses).to(losses.dtype)
    if not reported:
        return loss, log_probs.new_empty(0), losses
    raw = token_metrics(terms, loss, log_probs, entropy, rows, found, config, vocab)
    return loss, metrics.finish(raw, metrics.TOKEN), losses


def _slopes(
    terms: TokenTerms,
    found: Standing,
    factor: Tensor,
    rows: Rows,
    segments: Segments,
    config: PolicyLossConfig,
    want_bonus: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by log-probs and by entropy (``[0]`` unless ``want_bonus``) of losses times ``factor``."""
    slope = found.live.keep(token_slopes(terms, factor, rows, found, segments, config))
    return slope, found.live.keep(-config.entropy_coef * factor) if want_bonus else slope.new_empty(0)
