"""Log-prob level: the token losses of `egpo_kernels.formulas.surrogates` and their derivatives, in closed form."""

from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.selection import standing
from egpo_kernels.formulas.surrogates import own_log_ratios, token_slopes, token_terms
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
    """The loss, 0-d or ``per_token`` the reduced losses ``[N]``, and the metrics vector, ``[0]`` unless ``reported``.

    Only a ratio that sequences share needs ``segments``.
    """
    assert rows.factor is not None
    own = own_log_ratios(log_probs, rows)
    found = standing(log_probs, own, rows.mask, config.max_log_ratio)
    terms = token_terms(log_probs, own, rows, found, segments, config)
    losses = found.live.keep(terms.loss(entropy, rows.factor, config))
    loss = wide_sum(losses).to(losses.dtype)
    if not reported:
        return losses if per_token else loss, log_probs.new_empty(0)
    raw = token_metrics(terms, loss, log_probs, entropy, rows, found, config, vocab)
    return losses if per_token else loss, metrics.finish(raw, metrics.TOKEN)


def policy_loss_gradient(
    log_probs: Tensor,
    rows: Rows,
    segments: Segments,
    config: PolicyLossConfig,
    upstream: Tensor | float,
    want_bonus: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``sum(upstream * losses)`` by ``log_probs`` ``[N]`` and by entropy (``[0]`` unless ``want_bonus``).

    ``upstream`` is a number, 0-d or ``[N]``; where a row does not count the gradient is 0, whatever it holds.
    """
    assert rows.factor is not None
    own = own_log_ratios(log_probs, rows)
    found = standing(log_probs, own, rows.mask, config.max_log_ratio)
    factor = (rows.factor * upstream).to(log_probs.dtype)
    terms = token_terms(log_probs, own, rows, found, segments, config)
    slope = found.live.keep(token_slopes(terms, factor, rows, found, segments, config))
    return slope, found.live.keep(-config.entropy_coef * factor) if want_bonus else log_probs.new_empty(0)
