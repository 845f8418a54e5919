"""A chunk of rows: softmax, statistics, and the gradient of the logits.

With ``x = (z - max z) / temperature``, ``s = sum e^x``, ``p = e^x / s``, upstream ``a = dL/dl`` and ``c = dL/dEnt``:
``Ent = log s - sum p x`` and ``dz = (a onehot - (a + c (Ent - log s)) p - c p x) / temperature``.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.types import Rows, compute_dtype

CPU_CHUNK_BYTES = 5 << 20
"""Working memory of a chunk on a CPU: it stays in cache from one step over it to the next."""
DEVICE_CHUNK_BYTES = 256 << 20
"""Elsewhere: rows enough to fill the device."""
LOWEST = -1e4
"""exp of this is 0 in float64 too; 0 times it is 0, where 0 times -inf would be NaN."""


class Chunk(NamedTuple):
    """Consecutive rows: ``logits`` and ``out`` ``[R, V]`` where they lie, scratch ``p`` and ``spare`` in the compute
    dtype, ``rows`` of those ``[R]``, and where they stand among all.
    """

    logits: Tensor
    out: Tensor
    p: Tensor
    spare: Tensor
    rows: Rows
    place: slice


class Statistics(NamedTuple):
    """What a row's logits say, ``[R]`` each; entropy is None unless it was asked for."""

    log_probs: Tensor
    entropy: Tensor | None
    maximum: Tensor
    sum_exp: Tensor


def chunks(logits: Tensor, rows: Rows, live: Tensor, out: Tensor | None = None) -> Iterator[Chunk]:
    """Walk over ``logits [B, T, V]`` in chunks; on a CPU one without a ``live`` row is not read: its ``out`` is zeroed.

    ``out`` may be ``logits``; without it ``Chunk.out`` is empty.
    """
    batch, length, vocab = logits.shape
    dtype, on_cpu = compute_dtype(logits.dtype), logits.device.type == "cpu"
    size = max(1, (CPU_CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES) // (vocab * dtype.itemsize))
    out = logits[..., :0] if out is None else out
    if _merges(logits) and _merges(out):
        batch, length = 1, batch * length
        logits, out = (tensor.as_strided((1, length, tensor.shape[-1]), _steps(tensor)) for tensor in (logits, out))
    size = min(size, max(length, 1))
    p, spare = (torch.empty((size, vocab), dtype=dtype, device=logits.device) for _ in range(2))
    for number in range(batch):
        for start in range(0, length, size):
            stop = min(start + size, length)
            place = slice(number * length + start, number * length + stop)
            counted, target = live[place], out[number, start:stop]
            if on_cpu and not counted.any():
                target.zero_()
                continue
            here = Rows(counted, *(None if field is None else field[place] for field in rows[1:]))
            used = stop - start
            yield Chunk(logits[number, start:stop], target, p[:used], spare[:used], here, place)


def _merges(tensor: Tensor) -> bool:
    """Whether the rows of ``[B, T, V]`` are one run of equal steps."""
    batch, length, _ = tensor.shape
    return batch <= 1 or length <= 1 or tensor.stride(0) == length * tensor.stride(1)


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    return 0, tensor.stride(0) if tensor.shape[1] == 1 else tensor.stride(1), tensor.stride(2)


def softmax(chunk: Chunk, temperature: float, want_entropy: bool) -> Statistics:
    """Fill ``chunk.p`` with the probabilities (and ``chunk.spare`` with p x); return the rows' statistics."""
    heat = _temperature(chunk, temperature)
    heated = isinstance(heat, Tensor) or heat != 1
    maximum = chunk.logits.amax(-1).to(chunk.p.dtype)
    scaled = chunk.logits
    if heated or scaled.dtype != chunk.p.dtype:
        scaled = chunk.spare.copy_(chunk.logits)
    if heated:
        scaled.sub_(maximum[:, None]).div_(heat[:, None] if isinstance(heat, Tensor) else heat)
    torch.softmax(scaled, -1, out=chunk.p)
    # The largest probability is exp(0) / s.
    sum_exp = chunk.p.amax(-1).reciprocal()
    entropy = None
    if want_entropy:
        if not heated:
            torch.sub(scaled, maximum[:, None], out=chunk.spare)
        entropy = torch.where(maximum == -torch.inf, 0.0, sum_exp.log() - _mean_exponent(chunk))
    return Statistics(_log_probs(chunk, maximum, sum_exp, heat), entropy, maximum, sum_exp)


def _mean_exponent(chunk: Chunk) -> Tensor:
    """Turn ``chunk.spare`` from x into p x and return its row sums."""
    # A sum over one row alone is split over threads and rounds differently: never sum fewer than two.
    rows = chunk.spare.expand(2, -1) if chunk.spare.shape[0] == 1 else chunk.spare
    on_cpu = chunk.spare.device.type == "cpu"
    # 0 * -inf is NaN where a probability is 0. On a CPU, where looking is free, -inf is looked for first; a NaN in
    # another row hides it.
    if not on_cpu or not chunk.spare.amin() > -torch.inf:
        chunk.spare.clamp_(min=LOWEST)
    chunk.spare.mul_(chunk.p)
    return rows.sum(-1)[: chunk.spare.shape[0]]


def _temperature(chunk: Chunk, temperature: float) -> Tensor | float:
    given = chunk.rows.temperature
    return temperature if given is None else torch.where(given > 0, given, torch.nan)


def _token_column(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Token ids ``[R, 1]`` that may be used as indices, and where they are the caller's ``[R]``."""
    assert chunk.rows.tokens is not None
    valid = (chunk.rows.tokens >= 0) & (chunk.rows.tokens < chunk.logits.shape[-1])
    return torch.where(valid, chunk.rows.tokens, 0)[:, None], valid


def _log_probs(chunk: Chunk, maximum: Tensor, sum_exp: Tensor, heat: Tensor | float) -> Tensor:
    column, valid = _token_column(chunk)
    own = chunk.logits.gather(-1, column)[:, 0].to(maximum.dtype)
    found = torch.where(own == -torch.inf, -torch.inf, (own - maximum) / heat - sum_exp.log())
    return torch.where(valid, found, torch.nan)


def write_gradient(
    chunk: Chunk, found: Statistics, grad_log_probs: Tensor, grad_entropy: Tensor | None, temperature: float
) -> None:
    """Turn ``chunk.p`` into dz and write it to ``chunk.out``; rows with nothing upstream get exact zeros."""
    heat = _temperature(chunk, temperature)
    live = chunk.rows.mask & (grad_log_probs != 0)
    slope, tilt = grad_log_probs / heat, None
    level = -slope
    if grad_entropy is not None and found.entropy is not None:
        live = live | (chunk.rows.mask & (grad_entropy != 0))
        tilt = -grad_entropy / heat
        level = level + tilt * (found.entropy - found.sum_exp.log())
    live = live & (found.log_probs != -torch.inf)
    column, _ = _token_column(chunk)
    gradient = chunk.out if chunk.out.dtype == chunk.p.dtype and tilt is None else chunk.p
    torch.mul(chunk.p, level[:, None], out=gradient)
    if tilt is not None:
        gradient.addcmul_(chunk.spare, tilt[:, None])
    gradient.scatter_add_(-1, column, slope[:, None])
    if gradient is not chunk.out:
        chunk.out.copy_(gradient)
    if chunk.out.device.type == "cpu":
        chunk.out.index_fill_(0, (~live).nonzero()[:, 0], 0)
    else:
        chunk.out.masked_fill_(~live[:, None], 0)
