"""How many rows a chunk has: numbers in, a number out, so that equal calls are summed in the same order."""

import functools
from typing import NamedTuple

import torch

from egpo_kernels.config.settings import compute_dtype

CHUNK_BYTES = 256 << 20
"""What a chunk takes at most, unless the caller says, on a CPU and where a device does not tell its memory."""
DEVICE_SHARE = 32
"""On a GPU it takes this part of the device's memory: of all, because what is free changes from call to call, and with
it the number of chunks, the order of summation and the bits; it is a call of the driver, too."""
DEVICE_ROWS = 2048
"""There a chunk has at least as many rows: fewer give ``dL/dh [R, H]`` too few tiles to fill the device."""
TRAINED_ROWS = 4096
"""With a weight that trains a chunk has at least as many rows: its gradient is read and written once a chunk."""
MEMORY_STEP = 8 << 30
"""Ranks that go in step must find chunks of one size."""
TILE = 256
"""On a GPU products are cut into tiles of 128 or 256 rows: part of one costs as much as all of it."""


class Kind(NamedTuple):
    """What decides the bytes of a row.

    ``capped``: a softcap's derivative needs the logits beside their gradient. ``sums_apart``: the head trains, and its
    gradient is summed over chunks from float32 copies. ``ahead``: the next chunk's logits are there too.
    """

    vocab: int
    logits_dtype: torch.dtype
    weight_dtype: torch.dtype
    capped: bool
    weight_trains: bool
    sums_apart: bool
    ahead: bool = False

    @property
    def row_bytes(self) -> int:
        """All that is alive of a row: its logits, their gradient, that gradient in the dtype it is multiplied in."""
        size = self.logits_dtype.itemsize * (1 + self.capped + self.ahead)
        return self.vocab * (size + (0 if self.logits_dtype == self.weight_dtype else self.weight_dtype.itemsize))

    @property
    def scratch_bytes(self) -> int:
        """What a backend holds beside a row at most: probabilities and as much again, in the compute dtype."""
        return 2 * self.vocab * compute_dtype(self.logits_dtype).itemsize


@functools.cache
def device_memory(device: torch.device) -> int | None:
    """Bytes of memory a GPU has, free or not; None on a CPU and on devices that do not tell."""
    if device.type not in ("cuda", "xpu"):
        return None
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def in_steps(memory: int) -> int:
    """About so many bytes, the same for two GPUs of a kind, which may differ by some megabytes."""
    return max(memory - memory % MEMORY_STEP, MEMORY_STEP)


def chunk_rows(kind: Kind, total: int, max_chunk_bytes: int | None, memory: int | None, scratch: int) -> int:
    """Rows of every chunk but the last, which may have fewer, for ``total`` rows in all; at least 1.

    Args:
        kind: What a row takes.
        total: Rows to multiply; up to as many as one chunk holds, that is the answer.
        max_chunk_bytes: A bound that is kept to, down to a single row; None: a default, which has a least of rows too.
        memory: See `device_memory`; where it is known, rows come in multiples of `TILE` if so many fit.
        scratch: Bytes that a backend holds beside at most, if there are rows for so many.
    """
    limit = max_chunk_bytes or (CHUNK_BYTES if memory is None else memory // DEVICE_SHARE)
    least = 1
    if max_chunk_bytes is None:
        least = max(TRAINED_ROWS if kind.weight_trains else 1, 1 if memory is None else DEVICE_ROWS)
    most = max(_fit(kind, kind.row_bytes, limit, scratch), least)
    if most < total and kind.sums_apart:
        most = max(_fit(kind, kind.row_bytes + 4 * kind.vocab, limit, scratch), least)
    if most >= total:
        return max(total, 1)
    step = 1 if memory is None or most < TILE else TILE
    most -= most % step
    even = _over(total, _over(total, most))  # as many chunks as there must be, none much smaller than the rest
    return _over(even, step) * step


def _fit(kind: Kind, row: int, limit: int, scratch: int) -> int:
    """Rows of ``row`` bytes beside all of the scratch, or, where that is more, each beside a scratch of its own."""
    own = kind.scratch_bytes if scratch else 0
    return max((limit - scratch) // row, limit // (row + own))


def _over(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)
