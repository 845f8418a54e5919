"""Scaling a gradient that was computed ahead of its upstream gradient."""

from torch import Tensor


def rescale_(gradient: Tensor, upstream: Tensor, expected: float) -> None:
    """Multiply ``gradient`` by ``upstream / expected`` in place; on a CPU, where looking is free, only if not 1."""
    ratio = upstream / expected
    if ratio.device.type != "cpu" or ratio != 1:
        gradient.mul_(ratio)
