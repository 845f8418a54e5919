"""Rows and the sequences they belong to: sums over segments, and values spread back over rows."""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows

IGNORED = -100
"""The token id that marks a position as not counted when no mask is given."""


def counted_rows(
    mask: Tensor | None, tokens: Tensor | None, offsets: Tensor | None, num_rows: int, device: torch.device
) -> Tensor:
    """Rows that count: nonzero ``mask``, else ``tokens != -100``, else all ``[N]``; none past ``offsets``, where all
    are ``[N]``; otherwise mask and tokens may be of any shape, which the result has.
    """
    if mask is not None:
        rows = mask if mask.dtype == torch.bool else mask != 0
    elif tokens is not None:
        rows = tokens.long() != IGNORED
    else:
        rows = torch.ones(num_rows, dtype=torch.bool, device=device)
    return rows if offsets is None else rows & (torch.arange(num_rows, device=device) < offsets[-1])


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def flat(values: MaybeTensor) -> MaybeTensor:
    """``[N]``, of a tensor per token in any shape."""
    return values if values is None or values.dim() == 1 else values.reshape(-1)


def flat_rows(rows: Rows) -> Rows:
    """The same rows, each ``[N]``."""
    mask, *others = map(flat, rows)
    assert mask is not None
    return Rows(mask, *others)


def even_offsets(num_rows: int, num_segments: int, device: torch.device) -> Tensor:
    """Bounds ``[S + 1]`` of segments of equal length."""
    return torch.arange(num_segments + 1, device=device) * (num_rows // max(num_segments, 1))


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class _SegmentSum(torch.autograd.Function):
    """`torch.segment_reduce`, whose own backward cannot be differentiated: this one is a gather, which can."""

    @staticmethod
    def forward(values: Tensor, offsets: Tensor) -> Tensor:
        """Accumulate in float64 where the device has it."""
        wide = values.to(accumulation_dtype(values.device))
        return torch.segment_reduce(wide, "sum", offsets=offsets, unsafe=True).to(values.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the offsets."""
        values, offsets = inputs
        ctx.save_for_backward(offsets)
        ctx.num_rows = values.shape[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Give each row its segment's gradient; rows past the last offset are in no sum."""
        (offsets,) = ctx.saved_tensors
        inside = torch.arange(ctx.num_rows, device=offsets.device) < offsets[-1]
        return torch.where(inside, per_row(gradient, segment_index(offsets, ctx.num_rows)), 0.0), None


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum floating ``values [N]`` over ``offsets[i] : offsets[i + 1]`` to ``[S]``; twice differentiable, repeatable.

    Accumulates in float64 where the device has it, so that a sequence of 70000 tokens loses nothing.
    """
    return _SegmentSum.apply(values, offsets)


def segment_index(offsets: Tensor, num_rows: int) -> Tensor:
    """Return the segment ``[N]`` of each row; rows past the last offset get the last segment."""
    rows = torch.arange(num_rows, device=offsets.device)
    return torch.searchsorted(offsets[1:], rows, right=True).clamp(max=max(offsets.shape[0] - 2, 0))


def per_row(values: Tensor, index: Tensor) -> Tensor:
    """Spread ``values [S]`` over their rows ``[N]``; with no sequences rows get 0, which still depends on them."""
    return (values if values.shape[0] else torch.nn.functional.pad(values, (0, 1)))[index]


def counts_per_sequence(mask: Tensor, offsets: Tensor) -> Tensor:
    """Counted tokens of each sequence: ``mask [N]`` to ``[S]`` int64, exactly."""
    running = torch.nn.functional.pad(mask.long().cumsum(0), (1, 0))
    return running[offsets[1:]] - running[offsets[:-1]]


class Segments(NamedTuple):
    """How ``num_rows`` rows belong to sequences: as many to each, or by ``offsets [S + 1]``."""

    num_rows: int
    num_sequences: int
    offsets: Tensor | None = None

    @property
    def length(self) -> int:
        """Rows of each sequence where there are as many of each."""
        return self.num_rows // (self.num_sequences or 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of numbers per row, as sequences lie: ``(S, T)`` where there are as many rows of each, else ``(N,)``."""
        return (self.num_sequences, self.length) if self.offsets is None else (self.num_rows,)

    def laid(self, values: Tensor) -> Tensor:
        """Contiguous ``values`` per row, of `shape`; a view costs more than a look at it."""
        return values if values.shape == self.shape else values.view(self.shape)

    def bounds(self, device: torch.device) -> Tensor:
        """``[S + 1]``: sequence i owns rows ``bounds[i] : bounds[i + 1]``."""
        return even_offsets(self.num_rows, self.num_sequences, device) if self.offsets is None else self.offsets

    def counts(self, mask: Tensor) -> Tensor:
        """Counted tokens of each sequence: ``mask [N]``, or of `shape`, to ``[S]`` int64."""
        if self.offsets is None:
            return mask.view(self.num_sequences, self.length).sum(1)
        return counts_per_sequence(mask, self.offsets)

    def sum(self, values: Tensor) -> Tensor:
        """Sum ``values [N]``, or of `shape`, over each sequence to ``[S]``, as `segment_sum` does."""
        if self.offsets is None:
            wide = values.view(self.num_sequences, self.length).sum(1, dtype=accumulation_dtype(values.device))
            return wide.to(values.dtype)
        return segment_sum(values, self.offsets)

    def spread(self, values: Tensor) -> Tensor:
        """``values [S]`` over their rows ``[N]``."""
        return self.column(values).expand(self.shape).reshape(-1)

    def column(self, values: Tensor) -> Tensor:
        """``values [S]`` as they go with numbers of `shape`: a view ``[S, 1]``, or spread over packed rows ``[N]``."""
        if self.offsets is None:
            return values[:, None]
        return per_row(values, segment_index(self.offsets, self.num_rows))
