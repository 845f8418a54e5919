"""From what the caller gave to the rows ``[N]`` that every backend reads: mask, reduction factor, spread values."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas.arrays import at_hand
from egpo_kernels.formulas.reduction import reduction_factor
from egpo_kernels.inputs.layout import FOR_ALL, PER_SEQUENCE, PER_TOKEN
from egpo_kernels.inputs.segments import Segments, counted_rows

Given = Sequence[Tensor | None]
"""What the caller gave in the order of `Rows`, flat or of the tokens' shape, of any dtype; nothing for the factor."""


class Purpose(NamedTuple):
    """What rows are made for: a loss, or (None) log-probs alone; the numbers' dtype, and which rows it looks at."""

    config: PolicyLossConfig | None
    dtype: torch.dtype
    only_active: bool

    def made(self, given: Given, kinds: Sequence[int], packed: bool) -> tuple[bool, ...]:
        """Which of the rows must be made; the others are what was given."""
        mask, tokens, *numbers = given
        masked = mask is not None and mask.dtype == torch.bool and not packed and not self.drops
        ids = tokens is not None and tokens.dtype != torch.long
        spread = [
            values is not None and (kind != PER_TOKEN or values.dtype != self.dtype)
            for values, kind in zip(numbers, kinds[2:], strict=True)
        ]
        spread[2] = self.config is not None
        return (not masked, ids, *spread)

    @property
    def drops(self) -> bool:
        """Whether rows whose gradient is known to be 0 are not looked at."""
        config = self.config
        return self.only_active and config is not None and config.kl_coef == 0 and not config.has_bonus

    @property
    def masks(self) -> bool:
        """Whether the factor is 0 where a row does not count, rather than 1 everywhere."""
        return self.config is not None and self.config.reduction not in ("sum", "none")


class Counts(NamedTuple):
    """Tokens and sequences that count in the whole batch, as the caller gave them; None: those here."""

    tokens: Tensor | float | None = None
    sequences: Tensor | float | None = None

    def apart(self) -> tuple[list[float], list[Tensor | None]]:
        """Those that are numbers, NaN where one is not, and those that are tensors: two arguments of operators."""
        if self.tokens is None and self.sequences is None:
            return [torch.nan, torch.nan], [None, None]
        numbers = [torch.nan if count is None or isinstance(count, Tensor) else float(count) for count in self]
        return numbers, [count if isinstance(count, Tensor) else None for count in self]


NO_COUNTS = Counts()


class Material(NamedTuple):
    """What rows are made of: what the caller gave and of which ``kinds`` it is (see `egpo_kernels.inputs.layout`),
    the sequences, what is NaN (0-d) where those are not sound and goes into the factor, counts, and what for.
    """

    given: Given
    kinds: Sequence[int]
    segments: Segments
    poison: Tensor | None
    counts: Counts
    purpose: Purpose

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(tensor for tensor in self.given if tensor is not None).device


def token_rows(material: Material) -> Rows:
    """Rows ``[N]`` as kernels read them."""
    rows, shape = broad_rows(material), material.segments.shape
    if rows.factor is not None:
        masks = material.purpose.masks
        kept = torch.where(rows.mask, rows.factor, 0.0) if masks else rows.factor.expand(shape)
        rows = rows._replace(factor=kept.contiguous())
    mask, *others = (None if values is None else values.expand(shape).reshape(-1) for values in rows)
    assert mask is not None
    return Rows(mask, *others)


def broad_rows(material: Material) -> Rows:
    """As `token_rows`, of ``segments.shape`` or broadcasting to it; its factor says nothing of rows that do not count.

    Nothing is spread that need not be: where sequences are padded, a number for each is ``[S, 1]``.
    """
    (mask, tokens, *numbers), kinds, segments, poison, counts, purpose = material
    shape = segments.shape
    counted = counted_rows(mask, tokens, segments.offsets, segments.num_rows, material.device).reshape(shape)

    def spread(values: Tensor | None, kind: int) -> Tensor | None:
        if values is None:
            return None
        values = values.to(purpose.dtype)
        if kind == PER_SEQUENCE:
            return segments.column(values)
        return values if kind == FOR_ALL else values.reshape(shape)

    heats, advantages, _, *others = map(spread, numbers, kinds[2:])
    rows = Rows(counted, None if tokens is None else tokens.long().reshape(shape), heats, advantages, None, *others)
    if purpose.config is None:
        return rows
    factor = reduction_factor(counted, segments, purpose.config, counts.tokens, counts.sequences, purpose.dtype)
    rows = rows._replace(factor=factor if poison is None else factor * poison.to(purpose.dtype))
    return rows._replace(mask=_active(rows, segments, purpose.config)) if purpose.drops else rows


def _active(rows: Rows, segments: Segments, config: PolicyLossConfig) -> Tensor:
    """Counted rows whose gradient is not known to be zero before they are read."""
    assert rows.advantages is not None
    factors = [rows.advantages] if rows.rollout_weights is None else [rows.advantages, rows.rollout_weights]
    if all(at_hand(each) and np.count_nonzero(each.numpy()) == each.numel() for each in factors):
        return rows.mask
    active = functools.reduce(torch.logical_and, [each != 0 for each in factors])
    # A CPU combines bools four times as fast where both are whole.
    active = rows.mask & active.expand(rows.mask.shape).contiguous()
    # A shared ratio needs every token of the sequences that have an active one.
    return rows.mask & segments.column(segments.counts(active) > 0) if config.pools else active


class Measured(NamedTuple):
    """What a sequence's uncertainty is the mean of and where it counts: as given, ``[S, T]`` or ``[N]``."""

    values: Tensor | None = None
    mask: Tensor | None = None
    tokens: Tensor | None = None
    entropy_mask: Tensor | None = None
    negated: bool = False

    def rows(self, values: Tensor, counted: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values and where they count, of the ``counted``: ``[S, T]`` each, or ``[N]`` where packed."""
        values = segments.laid(values.to(dtype).contiguous())
        if self.entropy_mask is not None:
            counted = counted & segments.laid((self.entropy_mask != 0).contiguous())
        return values, counted

    def counted(self, segments: Segments, device: torch.device) -> Tensor:
        """Rows that count, of `Segments.shape`."""
        rows = counted_rows(self.mask, self.tokens, segments.offsets, segments.num_rows, device)
        return segments.laid(rows.contiguous())
