"""What a batch of tokens fills into the raw slots of `egpo_kernels.formulas.metrics.TOKEN`."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas.arrays import at_hand
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
    (counted, live, calm), factor, seen = found, rows.factor, at_hand(terms.ratio)
    if log_probs.numel() == 0:
        return torch.cat([log_probs.new_zeros(len(TOKEN.sums)), log_probs.new_full((len(TOKEN.maxima),), NOTHING)])
    none: Any = 0.0 if seen else log_probs.new_zeros(())

    def told(value: Tensor) -> Any:
        return value.detach().item() if seen else value

    def total(values: Tensor) -> Any:
        return told(wide_sum(live.keep(values)))

    def number(which: Tensor) -> Any:
        return np.count_nonzero(which.numpy()) if seen else which.count_nonzero()

    ratio = counted.keep(terms.ratio if calm else torch.where(live.rows, terms.ratio, 1.0))
    clipped, plain, weights = live.keep(terms.clipped), terms.kl is None and entropy is None, rows.rollout_weights
    count, whole, how_many, upward = (
        number(rows.mask),
        told(loss),
        told(wide_sum(clipped.abs())),
        told(wide_sum(clipped)),
    )
    # With no row but live ones, a factor that is NaN makes the loss NaN.
    factors_are_known = calm and not loss.isnan()
    sums = (
        count,
        whole,
        whole if plain else total(factor * terms.surrogate),
        none if terms.kl_term is None else config.kl_coef * total(factor * terms.kl_term),
        none if entropy is None else -config.entropy_coef * total(factor * entropy),
        (how_many - upward) / 2,
        (how_many + upward) / 2,
        told(wide_sum(ratio)),
        total((terms.ratio - 1).sub_(terms.log_ratio)),
        none if terms.kl is None else total(terms.kl),
        none if entropy is None else total(entropy),
        none if rows.tokens is None else number(rows.mask & ((rows.tokens < 0) | (rows.tokens >= vocab))),
        none if calm else number(rows.mask & ~log_probs.isfinite()),
        none if weights is None else number(rows.mask & weights.isnan()),
        none if factors_are_known else number(rows.mask & factor.isnan()),
    )
    high = told(ratio.amax())
    # A NaN ratio makes both NaN.
    low = high if seen and math.isnan(high) else counted.least(ratio)
    if seen:
        nothing: Any = 0.0 if count else NOTHING
        return torch.tensor((*sums, nothing + high, nothing - low), dtype=ratio.dtype, device=ratio.device)
    nothing = torch.where(count > 0, 0.0, NOTHING)
    return torch.stack([value.to(ratio.dtype) for value in (*sums, nothing + high, nothing - low)])


def wide_sum(values: Tensor) -> Tensor:
    """Sum of all ``values``, 0-d float64 where the device has it; blocks are added up in the values' own dtype.

    That loses up to two eps. Converting them all first, which loses nothing, takes more than twice the time.
    """
    values = values.reshape(-1)
    wide, rest = accumulation_dtype(values.device), values.shape[0] % BLOCK
    if rest == 0:
        return values.view(-1, BLOCK).sum(-1).sum(dtype=wide)
    # A whole block too, so that zeros behind the last value change no bit.
    last = torch.nn.functional.pad(values[-rest:], (0, BLOCK - rest)).sum()
    return wide_sum(values[:-rest]) + last.to(wide)
