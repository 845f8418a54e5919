"""A chunk of rows: exponentials, statistics, and the gradient of the logits.

With ``x = (z - max z) / temperature``, ``s = sum e^x``, ``p = e^x / s``, upstream ``a = dL/dl`` and ``c = dL/dEnt``:
``Ent = log s - sum p x`` and ``dz = (a onehot - (a + c (Ent - log s)) p - c p x) / temperature``.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.settings import Rows, compute_dtype

CPU_CHUNK_BYTES = 5 << 20
"""Working memory of a chunk on a CPU: it stays in cache from one step over it to the next."""
DEVICE_CHUNK_BYTES = 256 << 20
"""Elsewhere: rows enough to fill the device."""


def scratch_bytes(logits: Tensor) -> int:
    """What a walk over rows holds beside logits and gradient: ``x``, and ``power`` unless the gradient can hold it."""
    return 2 * (CPU_CHUNK_BYTES if logits.device.type == "cpu" else DEVICE_CHUNK_BYTES)


class Chunk(NamedTuple):
    """Consecutive rows: ``logits`` and ``out`` ``[R, V]`` where they lie; memory in the compute dtype for ``x`` and for
    its ``power`` e^x, which is ``out`` where that can hold it; ``rows`` of those ``[R]``, the logits of their tokens,
    their temperatures; and where they stand among all.
    """

    logits: Tensor
    out: Tensor
    power: Tensor
    x: Tensor
    rows: Rows
    own: Tensor
    column: Tensor
    heat: Tensor | float
    place: slice


class Statistics(NamedTuple):
    """What a row's logits say, ``[R]`` each; entropy is None unless it was asked for."""

    log_probs: Tensor
    entropy: Tensor | None
    maximum: Tensor
    sum_exp: Tensor


def chunks(logits: Tensor, rows: Rows, live: Tensor, temperature: float, out: Tensor | None = None) -> Iterator[Chunk]:
    """Walk over ``logits [B, T, V]`` in chunks; on a CPU one without a ``live`` row is not read: its ``out`` is zeroed.

    ``out`` may be ``logits``; without it ``Chunk.out`` is empty.
    """
    batch, length, vocab = logits.shape
    dtype, on_cpu = compute_dtype(logits.dtype), logits.device.type == "cpu"
    size = max(1, (CPU_CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES) // (vocab * dtype.itemsize))
    column, own = own_logits(logits, rows)
    heat = heats(rows, temperature)
    # Not a view: writing to it, empty as it is, would mark the logits as changed.
    out = logits.new_empty((batch, length, 0)) if out is None else out
    if _merges(logits) and _merges(out):
        batch, length = 1, batch * length
        logits, out = (tensor.as_strided((1, length, tensor.shape[-1]), _steps(tensor)) for tensor in (logits, out))
    size = min(size, max(length, 1))
    x = torch.empty((size, vocab), dtype=dtype, device=logits.device)
    power = None if out.dtype == dtype and out.shape == logits.shape else torch.empty_like(x)
    gaps = on_cpu and not live.all()
    for number in range(batch):
        for start in range(0, length, size):
            stop = min(start + size, length)
            place = slice(number * length + start, number * length + stop)
            counted, target = live[place], out[number, start:stop]
            if gaps and not counted.any():
                target.zero_()
                continue
            yield Chunk(
                logits[number, start:stop],
                target,
                target if power is None else power[: stop - start],
                x[: stop - start],
                Rows(counted, *(None if field is None else field[place] for field in rows[1:])),
                own[place],
                column[place],
                heat[place] if isinstance(heat, Tensor) else heat,
                place,
            )


def own_logits(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Token ids ``[N, 1]`` that may be used as indices, and the tokens' logits ``[N]``, NaN where an id is none."""
    assert rows.tokens is not None
    valid = (rows.tokens >= 0) & (rows.tokens < logits.shape[-1])
    column = torch.where(valid, rows.tokens, 0)[:, None]
    own = logits.gather(-1, column.view(*logits.shape[:2], 1)).view(-1).to(compute_dtype(logits.dtype))
    return column, torch.where(valid, own, torch.nan)


def heats(rows: Rows, temperature: float) -> Tensor | float:
    """The temperature of all rows, or of each ``[N]``, NaN where it is none."""
    return temperature if rows.temperature is None else torch.where(rows.temperature > 0, rows.temperature, torch.nan)


def _merges(tensor: Tensor) -> bool:
    """Whether the rows of ``[B, T, V]`` are one run of equal steps."""
    batch, length, _ = tensor.shape
    return batch <= 1 or length <= 1 or tensor.stride(0) == length * tensor.stride(1)


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    return 0, tensor.stride(0) if tensor.shape[1] == 1 else tensor.stride(1), tensor.stride(2)


def exponentials(chunk: Chunk, want_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill ``chunk.power`` with e^x (and ``chunk.x`` with x e^x); return maximum, sum e^x (and sum x e^x) ``[R]``.

    Not torch.softmax: it goes over a row more often, and adds up a large vocabulary carelessly.
    """
    logits, heat = chunk.logits, chunk.heat
    # What nobody reads again is written over: it is in cache.
    x = chunk.x if want_entropy else chunk.power
    if logits.dtype != x.dtype:
        logits = x.copy_(logits)
    maximum = logits.amax(-1)
    torch.sub(logits, maximum[:, None], out=x)
    if isinstance(heat, Tensor) or heat != 1:
        x.div_(heat[:, None] if isinstance(heat, Tensor) else heat)
    sum_exp = _row_sums(torch.exp(x, out=chunk.power))
    return maximum, sum_exp, _sum_of_exponents(chunk) if want_entropy else None


def read_off(own: Tensor, heat: Tensor | float, maximum: Tensor, sum_exp: Tensor, sum_x: Tensor | None) -> Statistics:
    """Log-prob and entropy of rows ``[R]``, from their tokens' logits, their temperatures and their `exponentials`."""
    log_sum = sum_exp.log()
    log_probs = torch.where(own == -torch.inf, -torch.inf, (own - maximum) / heat - log_sum)
    entropy = None if sum_x is None else torch.where(maximum == -torch.inf, 0.0, log_sum - sum_x / sum_exp)
    return Statistics(log_probs, entropy, maximum, sum_exp)


def softmax(chunk: Chunk, want_entropy: bool) -> Statistics:
    """What the chunk's rows say, with `exponentials` left in its memory."""
    return read_off(chunk.own, chunk.heat, *exponentials(chunk, want_entropy))


def _row_sums(matrix: Tensor) -> Tensor:
    # A sum over one row alone is split over threads and rounds differently: never sum fewer than two.
    count = matrix.shape[0]
    return (matrix.expand(2, -1) if count == 1 else matrix).sum(-1)[:count]


def _sum_of_exponents(chunk: Chunk) -> Tensor:
    """Turn ``chunk.x`` from x into x e^x and return its row sums."""
    found = _row_sums(chunk.x.mul_(chunk.power))
    # 0 * -inf is NaN where a probability is 0; looking for it is free on a CPU. A row that is NaN stays so by its sum.
    if chunk.x.device.type != "cpu" or found.isnan().any():
        found = _row_sums(chunk.x.nan_to_num_(0.0))
    return found


def write_gradient(chunk: Chunk, found: Statistics, grad_log_probs: Tensor, grad_entropy: Tensor | None) -> None:
    """Turn ``chunk.power`` into dz and write it to ``chunk.out``; rows with nothing upstream get exact zeros."""
    live = chunk.rows.mask & (grad_log_probs != 0)
    slope, tilt = grad_log_probs / chunk.heat, None
    level = -slope
    if grad_entropy is not None and found.entropy is not None:
        live = live | (chunk.rows.mask & (grad_entropy != 0))
        tilt = -grad_entropy / chunk.heat
        level = level + tilt * (found.entropy - found.sum_exp.log())
        tilt = tilt / found.sum_exp
    live = live & (found.log_probs != -torch.inf)
    level = level / found.sum_exp
    gradient = chunk.out if chunk.out.dtype == chunk.power.dtype and tilt is None else chunk.power
    torch.mul(chunk.power, level[:, None], out=gradient)
    if tilt is not None:
        gradient.addcmul_(chunk.x, tilt[:, None])
    gradient.scatter_add_(-1, chunk.column, slope[:, None])
    if gradient is not chunk.out:
        chunk.out.copy_(gradient)
    if chunk.out.device.type == "cpu":
        chunk.out.index_fill_(0, (~live).nonzero()[:, 0], 0)
    else:
        chunk.out.masked_fill_(~live[:, None], 0)
