"""Which columns of a vocabulary a rank has."""

import functools
import json
import zlib
from typing import Any, NamedTuple

from torch import Tensor

from egpo_kernels.config.results import Rows


class Shard(NamedTuple):
    """``columns`` of a vocabulary of ``vocab`` ids, from ``start`` on, of a rank in a ``group`` of ``size``.

    What a tensor has behind so many columns is padding. All ranks must come with the same ``options``.
    """

    group: str
    size: int
    start: int
    columns: int
    vocab: int
    options: str

    @property
    def text(self) -> str:
        """As JSON, which operators are given."""
        return json.dumps(self)

    @property
    def even(self) -> int:
        """Columns of a rank where all have as many: what all ranks can agree on without asking."""
        return -(-self.vocab // self.size)

    def seed(self, *options: Any) -> int:
        """31 bits of all that ranks must have alike beside rows, these ``options`` among it."""
        return zlib.crc32(repr((self.vocab, self.options, options)).encode()) >> 1

    def own(self, matrix: Tensor) -> Tensor:
        """The columns ``[..., V]`` that are no padding."""
        return matrix if matrix.shape[-1] == self.columns else matrix[..., : self.columns]

    def here(self, rows: Rows) -> Rows:
        """Rows whose tokens are places among these columns; those of other ranks are none."""
        assert rows.tokens is not None
        return rows._replace(tokens=rows.tokens - self.start) if self.start else rows


@functools.lru_cache(maxsize=64)
def shard_of(text: str) -> Shard | None:
    """Read back from ``Shard.text``; "" is none."""
    return Shard(*json.loads(text)) if text else None
