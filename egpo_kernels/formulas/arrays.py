"""Operations that tensors and numpy arrays spell differently, so that a formula is written once for both.

On a few numbers a CPU spends about 0.5 us in an operation of numpy's, and 1.3 to 2.5 us in one of torch's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.inputs.segments import accumulation_dtype

Array = Any
"""A tensor, or a numpy array; all that belong together are of one kind."""


def at_hand(values: Tensor) -> bool:
    """Whether looking at ``values`` costs no wait: they are on a CPU, and neither traced, transformed nor fake."""
    if type(values) is not Tensor or not values.is_cpu or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


def where(condition: Array, values: Any, otherwise: Any) -> Array:
    """Return ``values`` where the condition holds."""
    return (np if isinstance(condition, np.ndarray) else torch).where(condition, values, otherwise)


def maximum(values: Array, others: Array) -> Array:
    """Return the larger of each two."""
    return (np if isinstance(values, np.ndarray) else torch).maximum(values, others)


def isfinite(values: Array) -> Array:
    """Return where values are neither infinite nor NaN."""
    return (np if isinstance(values, np.ndarray) else torch).isfinite(values)


def clamp(values: Array, low: float, high: float) -> Array:
    """Return values no smaller than ``low`` and no larger than ``high``."""
    if isinstance(values, np.ndarray):
        return np.minimum(np.maximum(values, low), high)
    return values.clamp(low, high)


def at_least(values: Array, low: float) -> Array:
    """Return values no smaller than ``low``."""
    return np.maximum(values, low) if isinstance(values, np.ndarray) else values.clamp(min=low)


def floating(values: Array, like: Array) -> Array:
    """Return ``values`` in the dtype of ``like``: themselves where they have it."""
    if values.dtype == like.dtype:
        return values
    return values.astype(like.dtype) if isinstance(values, np.ndarray) else values.to(like.dtype)


def largest(values: Array) -> Array:
    """Return the largest along the last dimension, which is not empty."""
    return values.max(-1) if isinstance(values, np.ndarray) else values.amax(-1)


def joined(parts: Sequence[Array]) -> Array:
    """Join parts along their first dimension, in a dtype that holds those of all."""
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(tuple(parts))


def picked(values: Array, places: tuple[int, ...]) -> Array:
    """Return ``values [n]`` at these places; without an index on a device, where another stream may not find it yet."""
    if isinstance(values, np.ndarray):
        return values[_index(places)]
    entries = values.unbind()
    return torch.stack([entries[place] for place in places])


@functools.lru_cache(maxsize=64)
def _index(places: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.array(places)


def total(values: Array) -> Array:
    """Sum of all ``values``, in float64 where that is to be had, in their own dtype."""
    if isinstance(values, np.ndarray):
        return values.sum(dtype=np.float64).astype(values.dtype)
    return values.sum(dtype=accumulation_dtype(values.device)).to(values.dtype)
