"""What a batch of tokens fills into the raw slots of `egpo_kernels.formulas.metrics.TOKEN`."""

import torch
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows
from egpo_kernels.formulas.metrics import NOTHING, TOKEN
from egpo_kernels.formulas.selection import Standing
from egpo_kernels.formulas.surrogates import TokenTerms
from egpo_kernels.inputs.segments import accumulation_dtype

BLOCK = 256
"""Values that are added up before their sum is widened."""


def token_metrics(
    terms: TokenTerms,
    loss: Tensor,
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    found: Standing,
    config: PolicyLossConfig,
    vocab: int,
) -> Tensor:
    """Fill the slots of `TOKEN`, in its order; ``loss`` is the sum, ``vocab`` 0 where tokens are not known.

    Nothing may require a gradient. On a CPU what a look shows to be 0 is not added up.
    """
    assert rows.factor is not None
    (counted, live, calm), factor, none = found, rows.factor, log_probs.new_zeros(())
    if log_probs.shape[0] == 0:
        return torch.cat([log_probs.new_zeros(len(TOKEN.sums)), log_probs.new_full((len(TOKEN.maxima),), NOTHING)])
    plain, weights = terms.kl is None and entropy is None, rows.rollout_weights
    ratio = counted.keep(terms.ratio if calm else torch.where(live.rows, terms.ratio, 1.0))
    clipped = live.keep(terms.clipped)
    how_many, upward = wide_sum(clipped.abs()), wide_sum(clipped)
    # With no row but live ones, a factor that is NaN makes the loss NaN.
    factors_are_known = calm and not loss.isnan()
    number = rows.mask.count_nonzero()
    sums = (
        number,
        loss,
        loss if plain else wide_sum(live.keep(factor * terms.surrogate)),
        none if terms.kl_term is None else config.kl_coef * wide_sum(live.keep(factor * terms.kl_term)),
        none if entropy is None else -config.entropy_coef * wide_sum(live.keep(factor * entropy)),
        (how_many - upward) / 2,
        (how_many + upward) / 2,
        wide_sum(ratio),
        wide_sum(live.keep((terms.ratio - 1).sub_(terms.log_ratio))),
        none if terms.kl is None else wide_sum(live.keep(terms.kl)),
        none if entropy is None else wide_sum(live.keep(entropy)),
        none if rows.tokens is None else (rows.mask & ((rows.tokens < 0) | (rows.tokens >= vocab))).count_nonzero(),
        none if calm else (rows.mask & ~log_probs.isfinite()).count_nonzero(),
        none if weights is None else (rows.mask & weights.isnan()).count_nonzero(),
        none if factors_are_known else (rows.mask & factor.isnan()).count_nonzero(),
    )
    nothing = torch.where(number > 0, 0.0, NOTHING)
    maxima = (nothing + ratio.amax(), nothing - counted.least(ratio))
    return torch.stack([value.to(ratio.dtype) for value in sums + maxima])


def wide_sum(values: Tensor) -> Tensor:
    """Sum of ``values [N]``, 0-d float64 where the device has it; blocks are added up in the values' own dtype.

    That loses up to two eps. Converting them all first, which loses nothing, takes more than twice the time.
    """
    wide, rest = accumulation_dtype(values.device), values.shape[0] % BLOCK
    if rest == 0:
        return values.view(-1, BLOCK).sum(-1).sum(dtype=wide)
    return wide_sum(values[:-rest]) + values[-rest:].sum(dtype=wide)
