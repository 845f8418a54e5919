"""Rows of logits whose columns are spread over ranks: what each rank tells the others of its own, and what follows.

Of each row a rank tells its maximum ``m_r``, ``s_r = sum e^x``, the token's logit ``t_r`` (0 where another rank has it)
and ``w_r = sum x e^x`` (0 where no entropy is wanted), with ``x = (z - m_r) / temperature`` over its own columns.
Against its own maximum: with that of all ranks it would have to ask twice. Before the rows come headers, one for each
`HEADED` rows: where the rank's columns start, how many they are, and a checksum of what all ranks must have alike.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows

WIDTH = 4
"""Numbers that are told of a row, whatever is wanted: ranks that want different things must not wait for ever."""
HEADED = 1024
"""Rows that share a header."""
LOWEST = -1e4
"""Of an exponent: e to this is 0, and 0 times this is 0."""
PRIME, SHIFT, CHECKED = 16777619, 15, (1 << 24) - 1
"""Of the checksum, FNV's prime among them; it has 24 bits, which a float32 holds."""


class Merged(NamedTuple):
    """Log-prob, entropy (``[0]`` unless wanted), maximum, sum of exponentials ``[N]`` of whole rows; and ``status
    [2]``: how many ranks do not fit the others, and NaN if any, else 1.
    """

    log_probs: Tensor
    entropy: Tensor
    maximum: Tensor
    sum_exp: Tensor
    status: Tensor


def num_headers(num_rows: int) -> int:
    """Headers of so many rows; at least one."""
    return max(1, -(-num_rows // HEADED))


def told(mask: Tensor, found: list[Tensor], capacity: int, alike: Rows, seed: int, start: int, columns: int) -> Tensor:
    """What a rank tells, ``[K + capacity, 4]``, of statistics ``found``: ``[N]`` each, N up to ``capacity``.

    All ranks must have the rows ``alike``, and the ``seed``.
    """
    count, headers = mask.shape[0], num_headers(capacity)
    table = found[0].new_zeros(headers + capacity, WIDTH)
    table[:headers, 0], table[:headers, 1] = start, columns
    table[:headers, 2] = checksums(alike, seed, headers).to(table.dtype)
    table[headers : headers + count, : len(found)] = torch.where(mask[:, None], torch.stack(found, 1), 0.0)
    return table


def checksums(rows: Rows, seed: int, headers: int) -> Tensor:
    """Of a seed and of what rows ``[N]`` hold that count, a whole number below 2^24 for each header."""
    mixed = torch.arange(rows.mask.shape[0], dtype=torch.int32, device=rows.mask.device)
    for field in rows:
        mixed = (mixed if field is None else mixed ^ _bits(field)) * PRIME
        mixed = mixed ^ (mixed >> SHIFT)
    mixed = torch.where(rows.mask, mixed, 0).long()
    padded = torch.nn.functional.pad(mixed, (0, headers * HEADED - mixed.shape[0]))
    return (padded.view(headers, HEADED).sum(1) + seed) & CHECKED


def _bits(field: Tensor) -> Tensor:
    """32 bits of each number."""
    if field.dtype == torch.float64:
        field = field.view(torch.int64)
        field = field ^ (field >> 32)
    return field.view(torch.int32) if field.dtype == torch.float32 else field.to(torch.int32)


def misfits(headers: Tensor, vocab: int) -> Tensor:
    """Ranks, 0-d, of ``headers [P, K, 4]`` whose columns do not follow those of the rank before, or that have other
    rows than the first; the last one's end with the vocabulary.
    """
    start, columns, checksum = headers[:, :, :3].unbind(-1)
    stop = columns.cumsum(0)
    gap = start != stop - columns
    gap[-1] |= stop[-1] != vocab
    return (gap | (checksum != checksum[0])).any(1).sum()


def merged(gathered: Tensor, rows: Rows, temperature: float, want_entropy: bool, vocab: int, capacity: int) -> Merged:
    """Statistics of whole rows from what all ranks told, ``[P, K + capacity, 4]``, added up in the ranks' order.

    ``M = max m_r``, ``f_r = e^((m_r - M) / T)``, ``S = sum f_r s_r``, ``W = sum f_r (w_r + s_r (m_r - M) / T)`` and
    ``l = (t - M) / T - log S``, ``Ent = log S - W / S``. ``rows`` are of the whole vocabulary; all are NaN where a rank
    does not fit.
    """
    assert rows.tokens is not None
    headers, count = num_headers(capacity), rows.mask.shape[0]
    wrong = misfits(gathered[:, :headers], vocab).to(gathered.dtype)
    poison = torch.where(wrong > 0, torch.nan, 1.0).to(gathered.dtype)
    maxima, sums, own, weighted = gathered[:, headers : headers + count].unbind(-1)
    heat = temperature if rows.temperature is None else torch.where(rows.temperature > 0, rows.temperature, torch.nan)
    maximum = maxima.amax(0)
    shift = ((maxima - maximum) / heat).clamp(min=LOWEST)
    decay = shift.exp()
    sum_exp, token = _in_order(decay * sums), _in_order(own)
    log_sum = sum_exp.log()
    log_probs = torch.where(token == -torch.inf, -torch.inf, (token - maximum) / heat - log_sum)
    log_probs = torch.where((rows.tokens >= 0) & (rows.tokens < vocab), log_probs, torch.nan)
    entropy = gathered.new_empty(0)
    if want_entropy:
        total = _in_order(decay * (weighted + sums * shift))
        entropy = torch.where(rows.mask, torch.where(sum_exp == 0, 0.0, log_sum - total / sum_exp), 0.0) * poison
    log_probs = torch.where(rows.mask, log_probs, 0.0) * poison
    return Merged(log_probs, entropy, maximum, sum_exp * poison, torch.stack([wrong, poison]))


def _in_order(values: Tensor) -> Tensor:
    """Sum ``[N]`` of ``[P, N]``, which `torch.sum` may add up in another order for another N."""
    return functools.reduce(torch.add, values.unbind(0))
