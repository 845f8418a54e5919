"""Rows that count, rows that live: their values selected, and what a look at a CPU tensor spares."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.formulas.arrays import at_hand

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
UNSIGNED = {torch.float32: np.uint32, torch.float64: np.uint64}
INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
"""The bits of inf."""


class Selection(NamedTuple):
    """Some rows: where they are ``[N]``, and integers ``[N]`` as wide as the numbers, with all bits set there."""

    rows: Tensor
    bits: Tensor

    def keep(self, values: Tensor) -> Tensor:
        """Values ``[N]`` of these rows, and 0 in the rest, whatever is there; not differentiable.

        As `torch.where`, which on a CPU takes ten times as long as an addition.
        """
        return (values.view(self.bits.dtype) & self.bits).view(values.dtype)

    def least(self, kept: Tensor) -> Any:
        """The least of positive numbers that were kept, inf where nothing was: 0-d, or at hand a number."""
        if at_hand(kept):
            # In the order of their bits; the rest, 0, becomes the largest when 1 is taken away.
            bits = kept.numpy().view(UNSIGNED[kept.dtype])
            return ((bits - 1).min(keepdims=True) + 1).view(kept.numpy().dtype).item() or math.inf
        rest = (~self.bits).bitwise_and_(INFINITY[kept.dtype])
        return (rest | kept.view(self.bits.dtype)).view(kept.dtype).amin()


class Standing(NamedTuple):
    """Which rows are ``counted``, and which of those ``live``: their log-prob is not -inf.

    ``calm``: a look showed that every log-ratio lies inside its bounds, so that every log-prob is finite.
    """

    counted: Selection
    live: Selection
    calm: bool


def standing(log_probs: Tensor, log_ratios: Tensor, mask: Tensor, bound: float) -> Standing:
    """Read from mask, log-probs and log-ratios ``[N]`` which rows contribute; ``bound`` is that of log-ratios.

    Only on a CPU are values looked at: elsewhere that would wait for the device. Results do not depend on it.
    """
    counted = _selection(mask, log_probs.dtype)
    if at_hand(log_ratios) and log_ratios.numel():
        least, largest = log_ratios.aminmax()
        if least.item() >= -bound and largest.item() <= bound:
            return Standing(counted, counted, True)
    return Standing(counted, _selection(mask & (log_probs != -torch.inf), log_probs.dtype), False)


def _selection(rows: Tensor, dtype: torch.dtype) -> Selection:
    return Selection(rows, rows.to(BITS[dtype]).neg_())
