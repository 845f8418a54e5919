"""Which rows are multiplied, how many at a time, and the walk over them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.inputs.validation import checks_values
from egpo_kernels.linear import sizes
from egpo_kernels.linear.head import Head, Wanted, sums_apart
from egpo_kernels.parallel.shard import Shard


class Chunk(NamedTuple):
    """Some of the rows: their place among all ``N``, hidden states ``[R, H]``, 0 where they do not count, what is per
    token ``[R]``, and memory ``[R, V]`` for logits and their gradient, the same unless they are kept apart.
    """

    place: Tensor | slice
    hidden: Tensor
    rows: Rows
    logits: Tensor
    gradient: Tensor


class Plan(NamedTuple):
    """Which rows are multiplied, None for all of them; how many they are, or could be, and how many at a time."""

    places: Tensor | None
    total: int
    size: int

    @property
    def once(self) -> bool:
        """Whether one chunk holds them all, so that no sum over chunks is rounded."""
        return self.total <= self.size


def chunk_rows(
    head: Head, wanted: Wanted, max_chunk_bytes: int | None, scratch: int, total: int, shard: Shard | None = None
) -> int:
    """Rows of a chunk, of ``total`` that are multiplied; as many on all ranks where each has a ``shard``."""
    weight, vocab, ahead = head.weight, head.vocab if shard is None else shard.even, shard is not None
    apart = wanted.of_head and sums_apart(weight)
    kind = sizes.Kind(vocab, head.logits_dtype, weight.dtype, bool(head.softcap), wanted.weight, apart, ahead)
    memory = sizes.device_memory(weight.device)
    if ahead and memory is not None:
        memory = sizes.in_steps(memory)
    return sizes.chunk_rows(kind, total, max_chunk_bytes, memory, scratch)


def check_num_active(mask: Tensor, num_active: int | None) -> None:
    """Raise when more rows of a mask count than ``num_active`` says, where looking costs no sync."""
    if num_active is not None and checks_values(mask.device) and int(mask.sum()) > num_active:
        raise ValueError(
            f"num_active is {num_active}, and {int(mask.sum())} rows count; it must be at least as many: pass their "
            "number, or None"
        )


def active_rows(mask: Tensor, host_mask: Tensor | None, num_active: int | None) -> Tensor | None:
    """Places of the rows to multiply, a superset of ``mask [N]``; None, which is all, where the host cannot know."""
    check_num_active(mask if host_mask is None else host_mask, num_active)
    if mask.device.type == "cpu":
        return (mask if host_mask is None else mask & host_mask).nonzero()[:, 0]
    if host_mask is not None:
        return places_on(host_mask, mask.device)
    return None if num_active is None else first_places(mask, num_active)


def too_many(mask: Tensor, host_mask: Tensor | None, num_active: int | None) -> Tensor | None:
    """0-d: whether rows that count are left out, where `active_rows` could not look; None where none can be."""
    if num_active is None or host_mask is not None or checks_values(mask.device):
        return None
    return mask.sum() > num_active


def places_on(host_mask: Tensor, device: torch.device) -> Tensor:
    """Places of what counts in a mask on the host, copied to ``device`` without blocking."""
    places = host_mask.nonzero()[:, 0]
    return (places.pin_memory() if device.type == "cuda" else places).to(device, non_blocking=True)


def first_places(mask: Tensor, count: int) -> Tensor:
    """Places of the first ``count`` rows that count, then of others; without a sync."""
    return mask.argsort(descending=True, stable=True)[:count]


def chunks(hidden: Tensor, head: Head, rows: Rows, plan: Plan, ahead: bool) -> Iterator[Chunk]:
    """Walk over the rows of ``hidden [B, T, H]`` that are planned, and make their logits.

    A softcap's derivative needs them beside their gradient; without one the gradient lies over them. Where the walk is
    ``ahead`` by a chunk of whoever uses them, the last one's stay.
    """
    length, (places, total, size) = hidden.shape[1], plan
    if places is None and not hidden.is_contiguous():
        places = torch.arange(total, device=hidden.device)
    shape = (min(size, total), head.vocab)
    memory = [hidden.new_empty(shape, dtype=head.logits_dtype) for _ in range(1 + (ahead and total > size))]
    apart = torch.empty_like(memory[0]) if head.softcap else None
    for number, start in enumerate(range(0, total, size)):
        stop = min(start + size, total)
        place: Tensor | slice
        if places is None:
            place = slice(start, stop)
            states = hidden.flatten(0, 1)[place]
        else:
            place = places[start:stop]
            states = hidden[place // length, place % length]
        chosen = Rows(rows.mask[place], *(None if field is None else field[place] for field in rows[1:]))
        # What does not count may be NaN, and 0 times that is no 0.
        states = torch.where(chosen.mask[:, None], states, 0.0).to(head.weight.dtype)
        logits = memory[number % len(memory)][: states.shape[0]]
        head.project(states, logits)
        yield Chunk(place, states, chosen, logits, logits if apart is None else apart[: states.shape[0]])
