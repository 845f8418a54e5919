"""Rows whose columns are spread over ranks: what this rank tells the others of its own."""

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.formulas.shards import merged as merged_shards
from egpo_kernels.formulas.shards import told
from egpo_kernels.portable.logits import sums_of
from egpo_kernels.portable.softmax import Sums, own_logits

__all__ = ["merged_shards", "shard_statistics"]


def shard_statistics(
    logits: Tensor,
    rows: Rows,
    temperature: float,
    want_entropy: bool,
    capacity: int,
    alike: Rows,
    seed: int,
    start: int,
) -> Tensor:
    """What this rank tells of its columns, from ``start`` on: see `egpo_kernels.formulas.shards.told`."""
    assert rows.tokens is not None
    columns, dtype = logits.shape[-1], compute_dtype(logits.dtype)
    own = torch.zeros_like(rows.mask, dtype=dtype)
    sums = Sums.nothing(rows.mask.shape[0], logits, want_entropy)
    if columns:
        places = rows.tokens - start
        column, own = own_logits(logits, rows._replace(tokens=places))
        own = torch.where(column == places, own, 0.0)
        sums = sums_of(logits, rows, temperature, want_entropy)
    maximum, sum_exp, sum_x = sums
    # Of -inf alone, or of nothing, there is no maximum to subtract.
    empty = maximum.isneginf() if columns else torch.ones_like(rows.mask)
    maximum = torch.where(empty, torch.finfo(dtype).min, maximum)
    found = [maximum, torch.where(empty, 0.0, sum_exp), own]
    if sum_x is not None:
        found.append(torch.where(empty, 0.0, sum_x))
    return told(rows.mask, found, capacity, alike, seed, start, columns)
