"""A walk over rows of logits, a cache-sized chunk at a time."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.settings import compute_dtype

CPU_CHUNK_BYTES = 5 << 20
"""Working memory of a chunk on a CPU: it stays in cache from one step over it to the next."""
THREAD_BYTES = 640 << 10
"""Of it what each thread has where few steps go over a chunk: that stays in the cache of its own core."""
DEVICE_CHUNK_BYTES = 256 << 20
"""Elsewhere: rows enough to fill the device."""


def scratch_bytes(logits: Tensor) -> int:
    """What a walk over rows holds beside logits and gradient: ``x``, and ``power`` unless the gradient can hold it."""
    return 2 * _chunk_bytes(logits)


class Chunk(NamedTuple):
    """Consecutive rows: ``logits`` and ``out`` ``[R, V]`` where they lie; memory in the compute dtype for ``x`` and for
    ``power``, which is ``out`` where that can hold it; and where they stand among all.
    """

    logits: Tensor
    out: Tensor
    power: Tensor
    x: Tensor
    place: slice


def step_rows(logits: Tensor) -> int:
    """Rows of a chunk over which few steps go: as many for each thread, lest one reads what another has in cache."""
    row, most = _row_bytes(logits), chunk_rows(logits)
    if logits.device.type != "cpu":
        return most
    return min(most, torch.get_num_threads() * max(1, THREAD_BYTES // row))


def chunk_rows(logits: Tensor) -> int:
    """Rows of a chunk but the last."""
    return max(1, _chunk_bytes(logits) // _row_bytes(logits))


def chunks(logits: Tensor, live: Tensor, size: int, two: bool, out: Tensor | None = None) -> Iterator[Chunk]:
    """Walk over ``logits [B, T, V]``, up to ``size`` rows at a time; on a CPU a chunk without a ``live`` row is not
    read: its ``out`` is zeroed.

    ``out`` may be ``logits``; without it ``Chunk.out`` is the logits, which are not to be written to. ``x`` is another
    memory than ``power`` only if there are to be ``two``.
    """
    length, vocab = logits.shape[1:]
    dtype = compute_dtype(logits.dtype)
    size = max(1, min(size, logits.shape[0] * length))
    # Logits that are written over are read until their gradient is there.
    holds = out is not None and out.dtype == dtype and out.data_ptr() != logits.data_ptr()
    number = two + (not holds)
    memory = [torch.empty((size, vocab), dtype=dtype, device=logits.device) for _ in range(number)]
    looked = live.tolist() if live.is_cpu else None
    merges = _merges(logits) and (out is None or _merges(out))
    first = 0
    for rows, targets in zip(_runs(logits, merges), _runs(logits if out is None else out, merges), strict=True):
        parts = rows.split(size)
        for read, target in zip(parts, parts if out is None else targets.split(size), strict=True):
            count = read.shape[0]
            place = slice(first, first + count)
            first += count
            if looked is not None and not any(looked[place]):
                if out is not None:
                    target.zero_()
                continue
            here = memory if count == size else [tensor[:count] for tensor in memory]
            here = [target, *here] if holds else here
            yield Chunk(read, target, here[0], here[-1], place)


def _runs(tensor: Tensor, merges: bool) -> Iterable[Tensor]:
    """Matrices of rows of ``[B, T, V]``: one where they merge."""
    if not merges:
        return tensor
    batch, length, vocab = tensor.shape
    return (tensor.as_strided((batch * length, vocab), (tensor.stride(0 if length == 1 else 1), tensor.stride(2))),)


def _chunk_bytes(logits: Tensor) -> int:
    return CPU_CHUNK_BYTES if logits.device.type == "cpu" else DEVICE_CHUNK_BYTES


def _row_bytes(logits: Tensor) -> int:
    return logits.shape[-1] * compute_dtype(logits.dtype).itemsize


def _merges(tensor: Tensor) -> bool:
    """Whether the rows of ``[B, T, V]`` are one run of equal steps."""
    batch, length, _ = tensor.shape
    return batch <= 1 or length <= 1 or tensor.stride(0) == length * tensor.stride(1)
