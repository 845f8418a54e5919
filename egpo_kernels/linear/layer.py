"""Hidden states with the head they meet, and the gradients of both."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.engine import kept
from egpo_kernels.linear.chunks import Chunk, Plan, active_rows, chunk_rows, chunks
from egpo_kernels.linear.head import Head, HeadGradients, Wanted


class Layer(NamedTuple):
    """Hidden states ``[B, T, H]`` and the head they meet, the kernels, and how many rows are multiplied at a time."""

    hidden: Tensor
    head: Head
    package: ModuleType
    host_mask: Tensor | None
    num_active: int | None
    max_chunk_bytes: int | None
    support: kept.Support | None = None

    def parted(self, rows: Rows) -> kept.Parts | None:
        """Rows with a record apart from the others, where there is something to tell them by."""
        return None if self.support is None else kept.parted(self.package, rows, self.support, self.head.vocab)

    def checked(self, rows: Rows) -> kept.Parts | None:
        """As `parted`, with the values looked at where that costs no sync."""
        return None if self.support is None else kept.checked(self.package, rows, self.support, self.head.vocab)

    def plan(self, rows: Rows, wanted: Wanted) -> Plan:
        """The rows that count, and how many of them go together."""
        places = active_rows(rows.mask, self.host_mask, self.num_active)
        total = (rows.mask if places is None else places).shape[0]
        scratch = self.package.scratch_bytes(self.hidden)
        return Plan(places, total, chunk_rows(self.head, wanted, self.max_chunk_bytes, scratch, total))

    def chunks(self, rows: Rows, plan: Plan) -> Iterator[Chunk]:
        """Walk over the planned rows, with their logits."""
        return chunks(self.hidden, self.head, rows, plan)

    def zeros(self, rows: Rows, count: int) -> list[Tensor]:
        """Results per row ``[N]``, 0 where rows do not count."""
        return [self.hidden.new_zeros(rows.mask.shape, dtype=compute_dtype(self.hidden.dtype)) for _ in range(count)]


class Gradients:
    """Gradients of hidden states and head, gathered chunk by chunk."""

    def __init__(self, layer: Layer, wanted: Wanted, plan: Plan, more: bool) -> None:
        """``more``: something comes from elsewhere too, so that one chunk is not all there is to add."""
        once = plan.total == 0 if more else plan.once
        self.head = layer.head
        self.hidden = layer.hidden.new_zeros(layer.hidden.shape) if wanted.hidden else None
        self.of_head = HeadGradients(layer.head, wanted, once)

    def add(self, chunk: Chunk) -> None:
        """Take what flows back from ``chunk.gradient``."""
        self.head.uncap_(chunk.gradient, chunk.logits)
        gradient = chunk.gradient.to(self.head.weight.dtype)
        if self.hidden is not None:
            flat = self.hidden.flatten(0, 1)
            if isinstance(chunk.place, slice) and flat.dtype == chunk.hidden.dtype:
                self.head.hidden_gradient(gradient, flat[chunk.place])
            else:
                found = torch.empty_like(chunk.hidden)
                self.head.hidden_gradient(gradient, found)
                flat[chunk.place] = found.to(flat.dtype)
        self.of_head.add(gradient, chunk.hidden)

    def tensors(self) -> list[Tensor]:
        """Of hidden states, weight, bias and both adapters; empty where none was asked for."""
        hidden = self.head.weight.new_empty(0) if self.hidden is None else self.hidden
        return [hidden, *self.of_head.rounded()]
