"""Whole rows of logits on every rank, as the specification needs them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.formulas.shards import misfits, num_headers, told
from egpo_kernels.inputs.segments import flat_rows
from egpo_kernels.parallel.exchange import gather, rank_in
from egpo_kernels.parallel.shard import Shard


class _Whole(torch.autograd.Function):
    """Columns of all ranks, one after the other; each rank gets its own part of the gradient, which all have alike."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: Shard) -> Tensor:
        widths = gather(torch.tensor([logits.shape[-1], shard.columns], device=logits.device), shard.group, shard.size)
        sizes = widths.arrived().tolist()
        most, rank = max(size for size, _ in sizes), rank_in(shard.group)
        ctx.start, ctx.own = sum(own for _, own in sizes[:rank]), shard.columns
        ctx.padding = logits.shape[-1] - shard.columns
        padded = torch.nn.functional.pad(logits, (0, most - logits.shape[-1]))
        found = gather(padded, shard.group, shard.size).arrived()
        return torch.cat([part[..., :own] for part, (_, own) in zip(found, sizes, strict=True)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient[..., ctx.start : ctx.start + ctx.own]
        return torch.nn.functional.pad(own, (0, ctx.padding)), None


def whole_rows(logits: Tensor, shard: Shard) -> Tensor:
    """Logits ``[..., V]`` of the whole vocabulary; differentiable, without communication in backward."""
    return _Whole.apply(logits, shard)


def agreed(rows: Rows, temperature: float, shard: Shard, logits: Tensor) -> Tensor:
    """Status ``[2]``, see `egpo_kernels.formulas.shards.Merged`, of ranks with these rows."""
    rows = flat_rows(rows)
    count, dtype = rows.mask.shape[0], compute_dtype(logits.dtype)
    nothing = torch.zeros(count, dtype=dtype, device=logits.device)
    table = told(rows.mask, [nothing], count, rows, shard.seed(temperature), shard.start, shard.columns)
    table = table[: num_headers(count)]
    wrong = misfits(gather(table, shard.group, shard.size).arrived(), shard.vocab).to(dtype)
    return torch.stack([wrong, torch.where(wrong > 0, torch.nan, 1.0).to(dtype)])
