"""The factor a reduction gives each token."""

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas.arrays import at_hand
from egpo_kernels.inputs.segments import Segments


def reduction_factor(
    mask: Tensor,
    segments: Segments,
    config: PolicyLossConfig,
    num_tokens: Tensor | float | None,
    num_sequences: Tensor | float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return k: what each token's loss is multiplied by before everything is summed; ``mask`` is of ``segments.shape``.

    ``token_mean`` 1/N_tokens; ``seq_mean_token_mean`` 1/(S n_i); ``seq_mean_token_sum`` 1/S;
    ``seq_mean_token_sum_norm`` 1/(S C); ``sum`` and ``none`` 1. Counts are those of the whole batch unless the
    caller passes global ones; empty sequences do not count in S. Where a count says that there are none, it is NaN.
    One number is 0-d, one for each sequence ``[S, 1]`` or packed ``[N]``; what it says of other rows means nothing.
    """
    if config.reduction in ("sum", "none"):
        return torch.ones((), dtype=dtype, device=mask.device)
    if config.reduction == "token_mean":
        if num_tokens is None and at_hand(mask):
            return torch.full((), 1 / (np.count_nonzero(mask.numpy()) or torch.nan), dtype=dtype, device=mask.device)
        denominator = _as_count(mask.sum() if num_tokens is None else num_tokens, dtype, mask.device)
    else:
        counts = segments.counts(mask)
        denominator = _as_count((counts > 0).sum() if num_sequences is None else num_sequences, dtype, mask.device)
        if config.reduction == "seq_mean_token_mean":
            denominator = segments.column(denominator * counts.to(dtype))
        elif config.norm_length is not None:
            denominator = denominator * config.norm_length
    sound = (denominator > 0) & denominator.isfinite()
    return torch.where(sound, 1 / denominator, torch.nan)


def _as_count(count: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return count.to(dtype) if isinstance(count, Tensor) else torch.full((), count, dtype=dtype, device=device)
