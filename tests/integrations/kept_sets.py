"""Kept sets of a sampler, and log-probs over them the plain way."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.accuracy import assert_accurate


def sets_with(tokens: Sequence[int], vocab: int, seed: int = 0) -> list[list[int]]:
    """For each token up to five ids, itself among them; of every fourth, itself alone."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.rand(len(tokens), vocab, generator=generator).argsort(-1)
    return [sorted({token, *near[row, : 0 if row % 4 == 3 else 4].tolist()}) for row, token in enumerate(tokens)]


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    """One list of several."""
    return list(itertools.chain(*parts))


def log_probs_over(logits: Tensor, tokens: Tensor, sets: Sequence[Sequence[int]]) -> Tensor:
    """Log-softmax of rows ``[N, V]`` that are -inf outside of their sets; an empty set keeps all."""
    kept = torch.zeros(logits.shape, dtype=torch.bool)
    for row, ids in enumerate(sets):
        kept[row, list(ids) or slice(None)] = True
    every = torch.where(kept, logits, -torch.inf).log_softmax(-1)
    return every.gather(-1, tokens[:, None])[:, 0]


def assert_over(found: Tensor, logits: Tensor, tokens: Tensor, sets: Sequence[Sequence[int]]) -> None:
    """Log-probs ``[N]`` are those of float32 logits over the sets, and not of the whole vocabulary."""
    plain, exact = (log_probs_over(each, tokens, sets) for each in (logits, logits.double()))
    whole = log_probs_over(logits.double(), tokens, [[]] * len(sets))
    assert len(found) > 0 and (exact - whole).abs().max() > 0.1
    # A log-prob is a difference of numbers of some nats.
    assert_accurate(found, plain, exact, exact.abs() + 1, "log-probs")
