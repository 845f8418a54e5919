"""A case whose logits, or whose output layer, are spread over simulated ranks, and its results as of one process."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from egpo_kernels.formulas.tables import RANKS
from tests.support import linear
from tests.support.accuracy import assert_bits
from tests.support.case import Case
from tests.support.ranks import in_ranks

GARBAGE = (float("nan"), float("inf"), 1e30)
"""What padded columns hold."""


@st.composite
def cuts(draw: Any, vocab: int, ranks: tuple[int, ...] = (2, 3, 4)) -> list[int]:
    """Where each rank's columns begin, and the vocabulary's size: anywhere, so that some have one column, or none."""
    size = draw(st.sampled_from(ranks))
    kind = draw(st.sampled_from(["even", "any", "one column", "empty"]))
    inner = [-(-vocab * rank // size) for rank in range(1, size)]
    if kind == "any":
        inner = sorted(draw(st.lists(st.integers(0, vocab), min_size=size - 1, max_size=size - 1)))
    elif kind == "one column":
        inner = [min(rank, vocab) for rank in range(1, size)]
    elif kind == "empty":
        inner[-1] = inner[0]
    return [0, *sorted(inner), vocab]


def padded(values: Tensor, count: int, dim: int) -> Tensor:
    """With so many columns of garbage behind."""
    if not count:
        return values
    shape = list(values.shape)
    shape[dim] = count
    behind = (
        torch.tensor(GARBAGE)
        .repeat(count)[:count]
        .to(values)
        .view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))])
    )
    return torch.cat([values, behind.expand(shape)], dim)


def columns(bounds: Sequence[int], rank: int) -> dict[str, int]:
    """Arguments that say which columns a rank has."""
    return {"vocab_start": bounds[rank], "vocab_size": bounds[-1]}


def over_ranks(bounds: Sequence[int], function: Callable[..., Any]) -> list[Any]:
    """Results of ``function(rank, start, stop, group)``; nobody may have waited in vain."""
    found = in_ranks(len(bounds) - 1, lambda rank, group: function(rank, bounds[rank], bounds[rank + 1], group))
    return found.results


def joined(results: list[dict[str, Any]], dims: dict[str, int | None], width: Sequence[int]) -> dict[str, Any]:
    """One result of all ranks': the same bits where they must have them, parts of gradients along ``dims``, else alike.

    Of padding, which is what a rank has beyond its ``width``, the gradient is exactly 0.
    """
    first, *others = results
    for other in others:
        assert_bits(other["loss"], first["loss"], "loss")
        assert other["metrics"].keys() == first["metrics"].keys()
        for key, value in first["metrics"].items():
            assert_bits(other["metrics"][key], value, key)
    metrics = dict(first["metrics"])
    if metrics:
        assert metrics.pop(RANKS.keys[0]) == 0
    found = {"loss": first["loss"], "metrics": metrics}
    for name, dim in dims.items():
        if dim is None:
            found[name] = first[name]
            continue
        parts = []
        for result, count in zip(results, width, strict=True):
            own, behind = result[name].split([count, result[name].shape[dim] - count], dim)
            assert (behind == 0).all(), f"{name}: gradient of padding"
            parts.append(own)
        found[name] = torch.cat(parts, dim)
    return found


def split_logits(case: Case, bounds: Sequence[int], run: Callable[..., dict], backend: str, padding: int = 0) -> dict:
    """``run`` (of `tests.support.runs`) on all ranks, the last of which has columns of padding."""

    def own(rank: int, start: int, stop: int, group: Any) -> dict[str, Any]:
        behind = padding if rank == len(bounds) - 2 else 0
        here = case.replace(logits=padded(case.logits[..., start:stop], behind, -1))
        return run(here, backend, vocab_group=group, **columns(bounds, rank))

    results = over_ranks(bounds, own)
    return joined(results, {"gradient": -1}, [stop - start for start, stop in itertools.pairwise(bounds)])


def own_layer(layer: linear.Layer, start: int, stop: int, padding: int) -> linear.Layer:
    """A rank's part of an output layer."""

    def part(values: Tensor | None) -> Tensor | None:
        return None if values is None else padded(values[start:stop], padding, 0)

    lora = None if layer.lora is None else (layer.lora[0], part(layer.lora[1]), layer.lora[2])
    return layer._replace(weight=part(layer.weight), bias=part(layer.bias), lora=lora)


LEAVES = {"hidden": None, "weight": 0, "bias": 0, "A": None, "B": 0}
"""Which dimension of a leaf's gradient is spread over ranks."""


def split_linear(
    case: Case,
    layer: linear.Layer,
    bounds: Sequence[int],
    wanted: tuple[str, ...],
    backend: str,
    groups: bool,
    padding: int = 0,
    **options: Any,
) -> dict:
    """`tests.support.linear.run` on all ranks."""

    def own(rank: int, start: int, stop: int, group: Any) -> dict[str, Any]:
        here = own_layer(layer, start, stop, padding if rank == len(bounds) - 2 else 0)
        return linear.run(case, here, wanted, backend, groups, vocab_group=group, **columns(bounds, rank), **options)

    results = over_ranks(bounds, own)
    return joined(
        results, {name: LEAVES[name] for name in wanted}, [stop - start for start, stop in itertools.pairwise(bounds)]
    )
