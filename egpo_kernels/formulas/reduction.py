"""Rows, sequences and groups: sums over segments, and the factor a reduction gives each token."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig


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


def reduction_factor(
    mask: Tensor,
    offsets: Tensor,
    index: Tensor,
    config: PolicyLossConfig,
    num_tokens: Tensor | float | None,
    num_sequences: Tensor | float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return k ``[N]``: what each token's loss is multiplied by before everything is summed.

    ``token_mean`` 1/N_tokens; ``seq_mean_token_mean`` 1/(S n_i); ``seq_mean_token_sum`` 1/S;
    ``seq_mean_token_sum_norm`` 1/(S C); ``sum`` and ``none`` 1. Counts are those of the whole batch unless the
    caller passes global ones; empty sequences do not count in S. Rows that do not count get 0; those that do, where a
    global count says that there are none, NaN.
    """
    ones = torch.ones(mask.shape[0], dtype=dtype, device=mask.device)
    if config.reduction in ("sum", "none"):
        return ones
    counts = counts_per_sequence(mask, offsets)
    if config.reduction == "token_mean":
        denominator = _as_count(num_tokens, counts.sum(), ones) * ones
    else:
        denominator = _as_count(num_sequences, (counts > 0).sum(), ones) * ones
        if config.reduction == "seq_mean_token_mean":
            denominator = denominator * per_row(counts.to(dtype), index)
        elif config.norm_length is not None:
            denominator = denominator * config.norm_length
    sound = (denominator > 0) & denominator.isfinite()
    return torch.where(mask, torch.where(sound, 1 / denominator, torch.nan), 0.0)


def _as_count(given: Tensor | float | None, counted: Tensor, like: Tensor) -> Tensor | float:
    if given is None:
        return counted.to(like.dtype)
    return given.detach().to(like) if isinstance(given, Tensor) else float(given)
