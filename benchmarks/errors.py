"""How far off an answer is, and how far it may be."""

import torch
from torch import Tensor

FLOAT32_ERROR = 2.0**-15
"""What summing a vocabulary in float32, one term after the other, may cost."""


def distance(found: Tensor, exact: Tensor) -> Tensor:
    """The largest difference to float64 over the largest value; NaN where one is."""
    return (found.detach().double() - exact).abs().max() / exact.abs().max()


def allowance(dtype: torch.dtype) -> float:
    """What rounding to an output's dtype and summing in float32 explain of it."""
    return FLOAT32_ERROR + torch.finfo(dtype).eps
