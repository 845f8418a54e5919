"""Hidden states with the head they meet, and the gradients of both."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.engine import kept
from egpo_kernels.inputs.values import check_rows
from egpo_kernels.linear.chunks import Chunk, Plan, active_rows, chunk_rows, chunks
from egpo_kernels.linear.head import Head, HeadGradients, Wanted
from egpo_kernels.parallel.exchange import Pending, add_up_
from egpo_kernels.parallel.shard import Shard
from egpo_kernels.parallel.sharded import Sharded


class Layer(NamedTuple):
    """Hidden states ``[B, T, H]`` and the head they meet, the kernels, and how many rows are multiplied at a time."""

    hidden: Tensor
    head: Head
    package: Any
    host_mask: Tensor | None
    num_active: int | None
    max_chunk_bytes: int | None
    support: kept.Support | None = None
    adds_up: bool = False

    @property
    def shard(self) -> Shard | None:
        """Which columns of the vocabulary the head has, None for all."""
        return self.package.shard if isinstance(self.package, Sharded) else None

    @property
    def vocab(self) -> int:
        """Vocabulary size."""
        return self.head.vocab if self.shard is None else self.shard.vocab

    def parted(self, rows: Rows) -> kept.Parts | None:
        """Rows with a record apart from the others, where there is something to tell them by."""
        return None if self.support is None else kept.parted(self.package, rows, self.support, self.head.vocab)

    def check(self, rows: Rows) -> None:
        """Look at values where that costs no sync."""
        check_rows(rows, self.vocab)
        if self.support is not None:
            kept.check(rows, self.support, self.vocab)

    def plan(self, rows: Rows, wanted: Wanted) -> Plan:
        """The rows that count, and how many of them go together.

        With other ranks, as many as could: where ranks' masks differ, none must wait for a chunk that others do not
        have.
        """
        places, most = active_rows(rows.mask, self.host_mask, self.num_active), rows.mask.shape[0]
        if self.shard is not None:
            total = most if self.num_active is None else min(most, self.num_active)
        else:
            total = most if places is None else places.shape[0]
        scratch = self.package.scratch_bytes(self.hidden)
        return Plan(places, total, chunk_rows(self.head, wanted, self.max_chunk_bytes, scratch, total, self.shard))

    def chunks(self, rows: Rows, plan: Plan) -> Iterator[Chunk]:
        """Walk over the planned rows, with their logits."""
        return chunks(self.hidden, self.head, rows, plan, False)

    def scored(
        self, rows: Rows, plan: Plan, temperature: float, want_entropy: bool, alike: Rows | None = None
    ) -> Iterator[Chunk]:
        """The same walk, for whoever asks the package for statistics; for ``alike`` see `Sharded.ahead`."""
        if self.shard is None:
            return self.chunks(rows, plan)
        walk = chunks(self.hidden, self.head, rows, plan, True)
        return self.package.ahead(walk, alike or rows, temperature, want_entropy, plan.size)

    def zeros(self, rows: Rows, count: int) -> list[Tensor]:
        """Results per row ``[N]``, 0 where rows do not count."""
        return [self.hidden.new_zeros(rows.mask.shape, dtype=compute_dtype(self.hidden.dtype)) for _ in range(count)]


class Gradients:
    """Gradients of hidden states and head, gathered chunk by chunk.

    Those of hidden states that are to be summed over ranks are on their way while the head's are made.
    """

    def __init__(self, layer: Layer, wanted: Wanted, plan: Plan, more: bool) -> None:
        """``more``: something comes from elsewhere too, so that one chunk is not all there is to add."""
        once = plan.total == 0 if more else plan.once
        self.head, self.shard, self.capacity = layer.head, layer.shard, plan.size
        self.hidden = layer.hidden.new_zeros(layer.hidden.shape) if wanted.hidden else None
        self.of_head = HeadGradients(layer.head, wanted, once)
        self.adds_up = layer.adds_up and layer.shard is not None
        self.pending: tuple[Any, Pending] | None = None
        self.apart: Tensor | None = None

    def add(self, chunk: Chunk) -> None:
        """Take what flows back from ``chunk.gradient``."""
        self.head.uncap_(chunk.gradient, chunk.logits)
        gradient = chunk.gradient.to(self.head.weight.dtype)
        if self.hidden is not None:
            self._add_hidden(chunk, gradient, self.hidden.flatten(0, 1))
        if chunk.hidden.shape[0]:
            self.of_head.add(gradient, chunk.hidden)

    def _add_hidden(self, chunk: Chunk, gradient: Tensor, flat: Tensor) -> None:
        (count, width), there = chunk.hidden.shape, isinstance(chunk.place, slice) and flat.dtype == gradient.dtype
        if there:
            found = flat[chunk.place]
        elif self.adds_up:
            found = gradient.new_zeros(self.capacity, width)  # ranks whose masks differ have chunks of other lengths
        else:
            found = gradient.new_empty(count, width)
        self.head.hidden_gradient(gradient, found[:count])
        if self.adds_up and self.shard is not None:
            found = found.to(flat.dtype)
            before, self.pending = self.pending, (chunk.place, add_up_(found, self.shard.group, self.shard.size))
            self._arrived(before, flat)
        elif not there:
            flat[chunk.place] = found.to(flat.dtype)

    def _arrived(self, pending: tuple[Any, Pending] | None, flat: Tensor) -> None:
        if pending is not None:
            place, sums = pending
            found = sums.arrived()
            if not isinstance(place, slice):
                flat[place] = found[: place.shape[0]]
            elif found.data_ptr() != flat[place].data_ptr():
                flat[place] = found[: place.stop - place.start]

    def more_hidden(self) -> Tensor | None:
        """Where gradients of hidden states from elsewhere are to be added, None where there are none."""
        if self.adds_up and self.hidden is not None:
            self.apart = torch.zeros_like(self.hidden)
            return self.apart
        return self.hidden

    def tensors(self) -> list[Tensor]:
        """Of hidden states, weight, bias and both adapters; empty where none was asked for."""
        hidden = self.head.weight.new_empty(0) if self.hidden is None else self.hidden
        if self.pending is not None:
            self._arrived(self.pending, hidden.flatten(0, 1))
        if self.apart is not None and self.shard is not None:
            hidden += add_up_(self.apart, self.shard.group, self.shard.size).arrived()
        found = [hidden, *self.of_head.rounded()]
        if self.shard is not None and found[3].numel():
            # Every rank has all of the first adapter, and made a part of its gradient.
            found[3] = add_up_(found[3], self.shard.group, self.shard.size).arrived()
        return found
