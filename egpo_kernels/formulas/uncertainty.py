"""Uncertainty H of a sequence (EGPO, arXiv 2602.22751, Eq. 5/6): the mean of what its counted tokens say."""

import math

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.formulas.arrays import Array, at_hand, at_least
from egpo_kernels.formulas.token_metrics import BLOCK
from egpo_kernels.inputs.segments import accumulation_dtype, counts_per_sequence

FEW = 1 << 16
"""Tokens up to which numpy takes no longer in one thread than torch in those that it would use."""


def token_sums(values: Tensor, mask: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of each sequence's counted ``values``, as far as it is one, float64 ``[S]``, and how many count, ``[S]``.

    ``values [N]`` and ``mask``, or ``[S, T]`` without offsets, where ``mask`` None counts all.
    """
    if mask is None:
        total = _sums(values, offsets)
        return total, total.new_full(total.shape, values.shape[1])
    if not at_hand(values):
        values = torch.where(mask, values, 0.0)
        counts = mask.sum(1, dtype=torch.int32) if offsets is None else counts_per_sequence(mask, offsets)
        return _sums(values, offsets), counts
    # A CPU chooses by bools one by one; bits times whole numbers, 1 where the mask is set, it takes a vector at a time.
    whole = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = mask.to(whole)
    counts = bits.sum(1, dtype=torch.int32) if offsets is None else _sums(bits, offsets)
    return _sums(bits.mul_(values.view(whole)).view(values.dtype), offsets), counts


def token_sums_at_hand(values: Tensor, mask: Tensor | None, offsets: Tensor | None) -> tuple[Array, Array]:
    """As `token_sums`, of tensors at hand, in arrays."""
    if offsets is not None or mask is None or values.numel() > FEW:
        totals, counts = token_sums(values, mask, offsets)
        return totals.numpy(), counts.numpy()
    numbers, bits = values.numpy(), mask.numpy()
    total = np.add.reduce(numbers * bits, axis=1, dtype=np.float64)
    if not math.isfinite(np.add.reduce(total)):
        # What does not count may be infinite or NaN, and 0 times that is NaN.
        total = np.add.reduce(np.where(bits, numbers, 0.0), axis=1, dtype=np.float64)
    return total, np.add.reduce(bits, axis=1, dtype=np.int32)


def token_mean(values: Tensor, mask: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `token_sums`, with the mean in place of the sum."""
    total, counts = token_sums(values, mask, offsets)
    return total / counts, counts


def _sums(values: Tensor, offsets: Tensor | None) -> Tensor:
    """Sum each sequence's ``values [N]``, or rows of ``[S, T]`` without offsets, in float64 where the device has it."""
    wide = accumulation_dtype(values.device)
    if offsets is not None:
        return torch.segment_reduce(values.to(wide), "sum", offsets=offsets, unsafe=True)
    if at_hand(values) and values.shape[1] % BLOCK == 0:
        values = values.view(values.shape[0], values.shape[1] // BLOCK, BLOCK).sum(-1)  # see `wide_sum`
    return values.sum(1, dtype=wide)


def as_uncertainty(mean: Array) -> Array:
    """H ``[S]`` (Eq. 5/6) from a mean: at least 0, and NaN where that is not finite."""
    return at_least(mean, 0.0) + (mean - mean)  # 0, or NaN


def sequence_uncertainty(values: Tensor, mask: Tensor, offsets: Tensor) -> Tensor:
    """Return H ``[S]`` of packed ``values [N]``, NaN where a sequence has none.

    ``values`` are negated log-probs of the sampled tokens, or entropies; H is their mean over ``mask``, at least 0.
    """
    return as_uncertainty(token_mean(values, mask, offsets)[0]).to(values.dtype)
