"""Groups of sequences: sums and extremes over each, and what is known of their members.

Groups are segments of the sequences sorted by group id: sequences are ``[S]``, groups ``[P]``. At hand, in arrays of
numpy's, P is how many there are; in tensors nobody may ask, so that P is S and the last ones are empty.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.formulas.arrays import Array, floating, isfinite, where
from egpo_kernels.inputs.segments import accumulation_dtype

EVEN = 512
"""Sequences up to which Python looks first whether groups are of one size and follow each other, as most do."""


class Groups(NamedTuple):
    """Who is in which group.

    ``order [S]`` sorts sequences by group, None where they lie so; ``place [S]`` is the group of each sorted one;
    ``segments [P]`` are the lengths of groups, or at hand their first members; ``sizes [P]`` floating counts members,
    ``others [P]`` one less; ``alone``: whether one may have a single member.
    """

    order: Array | None
    place: Array
    segments: Array
    sizes: Array
    others: Array
    alone: bool
    at_hand: bool

    def sort(self, values: Array) -> Array:
        """Bring ``values [S]`` into the groups' order."""
        return values if self.order is None else values[self.order]

    def restore(self, values: Array) -> Array:
        """Bring sorted ``values [S]`` back into the caller's order."""
        if self.order is None:
            return values
        restored = np.empty_like(values) if self.at_hand else torch.empty_like(values)
        restored[self.order] = values
        return restored

    def spread(self, values: Array) -> Array:
        """Give each sequence the value of its group: ``[P]`` to ``[S]``."""
        return values[self.place]

    def sum(self, values: Array) -> Array:
        """Sum sorted ``values [S]`` over each group, ``[P]``."""
        return self._reduced("sum", np.add, values)

    def high(self, values: Array) -> Array:
        """Largest of sorted ``values [S]`` in each group, ``[P]``."""
        return self._reduced("max", np.maximum, values)

    def low(self, values: Array) -> Array:
        """Smallest of sorted ``values [S]`` in each group, ``[P]``."""
        return self._reduced("min", np.minimum, values)

    def _reduced(self, name: str, function: np.ufunc, values: Array) -> Array:
        if self.at_hand:
            return function.reduceat(values, self.segments)
        return torch.segment_reduce(values, name, lengths=self.segments, unsafe=True)

    def column(self, values: tuple[float, ...], like: Array | None = None) -> Array:
        """Return whole ``values [n, 1]``, or ones in a dtype, where the groups are, without a copy to a device."""
        if self.at_hand:
            return _column(values, "l" if like is None else like.dtype.char)  # a dtype is slow to look up
        dtype = torch.int64 if like is None else like.dtype
        return torch.stack([torch.full((1,), value, dtype=dtype, device=self.place.device) for value in values])


@functools.lru_cache(maxsize=64)
def _column(values: tuple[float, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Return an array ``[n, 1]``, made once; never write to it."""
    return np.array(values, dtype)[:, None]


def make_groups(ids: Tensor) -> Groups:
    """Find the groups of integer ids ``[S]``, on any device and without a sync."""
    order = torch.argsort(ids, stable=True)
    place = _starts(ids[order]).long().cumsum(0) - 1
    lengths = torch.searchsorted(place, torch.arange(ids.shape[0] + 1, device=ids.device)).diff()
    sizes = lengths.to(accumulation_dtype(ids.device))
    return Groups(order, place, lengths, sizes, sizes - 1, True, False)


def _starts(ordered: Tensor) -> Tensor:
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    return starts


def groups_at_hand(ids: np.ndarray[Any, Any]) -> Groups:
    """Find the groups of integer ids ``[S]``, at least one."""
    size = _even_size(ids.tolist()) if len(ids) <= EVEN else 0
    if size:
        return _even_groups(len(ids) // size, size)
    order, bounds = None, _bounds(ids)
    if len(set(ids[bounds[:-1]].tolist())) < len(bounds) - 1:
        order = np.argsort(ids, kind="stable")
        bounds = _bounds(ids[order])
    return _groups_between(order, bounds)


def _groups_between(order: np.ndarray[Any, Any] | None, bounds: np.ndarray[Any, Any]) -> Groups:
    firsts = bounds[:-1]
    lengths = bounds[1:] - firsts
    sizes, others = lengths.astype(np.float64), lengths - 1.0
    return Groups(order, np.arange(len(firsts)).repeat(lengths), firsts, sizes, others, not others.all(), True)


def _even_size(names: list[int]) -> int:
    """Return the size of groups that all have it and follow each other, 0 where that is not so."""
    size = names.count(names[0])
    firsts = names[::size]
    even = len(set(firsts)) * size == len(names) and all(names[place::size] == firsts for place in range(1, size))
    return size if even else 0


@functools.lru_cache(maxsize=64)
def _even_groups(number: int, size: int) -> Groups:
    """Return ``number`` groups of ``size`` members that follow each other, made once; never write to them."""
    return _groups_between(None, np.arange(number + 1) * size)


def _bounds(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where runs of the same id start, and the end, ``[P + 1]``."""
    starts = np.ones(len(ids) + 1, bool)
    np.not_equal(ids[1:], ids[:-1], out=starts[1:-1])
    return starts.nonzero()[0]


def both(one: Array | None, other: Array | None) -> Array | None:
    """Both conditions; None holds everywhere."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def chosen(condition: Array | None, values: Array, otherwise: float) -> Array:
    """Return ``values`` where a condition holds; None holds everywhere."""
    return values if condition is None else where(condition, values, otherwise)


class Known(NamedTuple):
    """Sorted ``values [S]``, 0 where they are not finite; ``finite [S]``: where they are, None: everywhere.

    Of those in each group, ``[P]``: their ``mean``, NaN over nothing, their ``number``, and ``others``, one less.
    """

    values: Array
    finite: Array | None
    mean: Array
    number: Array
    others: Array


def known(values: Array, groups: Groups) -> Known:
    """Tell what is known of sorted floating ``values [S]``."""
    values = floating(values, groups.sizes)
    total = groups.sum(values)
    # What is not finite leaves no finite sum behind.
    if groups.at_hand and math.isfinite(np.add.reduce(total)):
        return Known(values, None, total / groups.sizes, groups.sizes, groups.others)
    finite = isfinite(values)
    values = where(finite, values, 0.0)
    number = groups.sum(floating(finite, values))
    return Known(values, finite, groups.sum(values) / number, number, number - 1)


class Rules(NamedTuple):
    """Which rule each group ``[P]`` falls under.

    Whether it has ``enough`` usable rewards to compare, None: all have; whether they are ``collapsed``; whether nobody
    is correct (``unsolved``); whether it is ``penalised``, None: none is.
    """

    enough: Array | None
    collapsed: Array
    unsolved: Array
    penalised: Array | None
