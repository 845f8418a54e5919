"""Opaque operators on what is per token or per sequence before a loss: layouts, rows, groups.

Checks of values live here, inside the operators, so that a traced call makes them too. Settings come as their JSON.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.engine.dispatch import implementation
from egpo_kernels.engine.operator import (
    OptionalTensors,
    Tensors,
    Tensors2,
    Tensors5,
    advantage_config,
    fake_vector,
    operator,
    policy_config,
)
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.rows import NO_COUNTS, Counts, Material, Measured, Purpose
from egpo_kernels.inputs import validation, values
from egpo_kernels.inputs.segments import Segments

How = tuple[list[int], list[int], list[float], str, bool]
"""Kinds, size, numbers, config and whether only active rows are looked at: see `token_rows`."""


def _fake_offsets(cu_seqlens: Tensor, num_rows: int) -> Tensors2:
    return torch.empty_like(cu_seqlens, dtype=torch.long), cu_seqlens.new_empty((), dtype=torch.float32)


@operator(_fake_offsets)
def sequence_offsets(cu_seqlens: Tensor, num_rows: int) -> Tensors2:
    """Offsets ``[S + 1]`` int64 that never leave ``[0, num_rows]``, and 1.0 or, where they had to be mended, NaN."""
    values.check_cu_seqlens(cu_seqlens, num_rows)
    return _mended(cu_seqlens, num_rows)


@operator(_fake_offsets)
def support_offsets(offsets: Tensor, num_ids: int) -> Tensors2:
    """As `sequence_offsets`, of the offsets ``[N + 1]`` of what a sampler kept."""
    values.check_support_offsets(offsets, num_ids)
    mended, sound = _mended(offsets, num_ids)
    # Ids before the first row's are that row's: none lies outside all rows but behind the last.
    return torch.nn.functional.pad(mended[1:], (1, 0)), sound


def _mended(given: Tensor, most: int) -> Tensors2:
    given = given.long()
    offsets = given.clamp(0, most).cummax(0).values
    sound = (offsets == given).all() & (given[0] == 0)
    one = torch.ones((), dtype=torch.float32, device=given.device)
    return offsets, torch.where(sound, one, torch.nan)


@operator(lambda ids, *others: ids.new_empty(len(metrics.SUPPORT.keys), dtype=others[-2]))
def support_metrics(
    ids: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    """The vector of `egpo_kernels.formulas.metrics.SUPPORT` over rows of ``mask [N]``."""
    return implementation(backend).support_metrics(ids, offsets, tokens.long(), mask, dtype)


@operator(lambda by_sequence, *_: by_sequence.new_empty((), dtype=torch.float32))
def read_either_way(by_sequence: Tensor, by_token: Tensor, inside: Tensor, name: str) -> Tensor:
    """1.0 where ``name``, with as many tokens as sequences, says the same of rows ``inside`` either way, else NaN."""
    same = (by_sequence == by_token) | (by_sequence.isnan() & by_token.isnan()) | ~inside
    values.check_either_way(name, same)
    return torch.where(same.all(), 1.0, torch.nan)


@functools.lru_cache(maxsize=256)
def purpose_of(config: str, dtype: torch.dtype, only_active: bool) -> Purpose:
    """What rows are made for, from what operators are given; no ``config`` is ""."""
    return Purpose(policy_config(config) if config else None, dtype, only_active)


def material_of(
    given: OptionalTensors,
    kinds: list[int],
    size: list[int],
    numbers: list[float],
    config: str,
    only_active: bool,
    dtype: torch.dtype,
) -> Material:
    """What rows are made of, from the arguments of an operator, see `token_rows`."""
    *fields, offsets, poison, num_tokens, num_sequences = given
    counts = NO_COUNTS
    if num_tokens is not None or num_sequences is not None or not all(map(math.isnan, numbers)):
        tokens, sequences = (None if math.isnan(number) else number for number in numbers)
        counts = Counts(
            tokens if num_tokens is None else num_tokens, sequences if num_sequences is None else num_sequences
        )
    segments, purpose = Segments(size[0], size[1], offsets), purpose_of(config, dtype, only_active)
    return Material(fields, kinds, segments, poison, counts, purpose)


def _fake_rows(given: OptionalTensors, kinds: list[int], size: list[int], _: list[float], *others: Any) -> Tensors:
    config, only_active, dtype, _ = others
    fields, offsets = given[: len(kinds)], given[len(kinds)]
    like = next(tensor for tensor in fields if tensor is not None)
    made = purpose_of(config, dtype, only_active).made(fields, kinds, offsets is not None)
    dtypes = (torch.bool, torch.long, *[dtype] * 6)
    return [like.new_empty(size[0], dtype=each) for each, fresh in zip(dtypes, made, strict=True) if fresh]


@operator(_fake_rows)
def token_rows(
    given: OptionalTensors,
    kinds: list[int],
    size: list[int],
    numbers: list[float],
    config: str,
    only_active: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensors:
    """Those of the rows that must be made, see `egpo_kernels.formulas.rows.Purpose`.

    ``given`` is in the order of `Rows`, as ``kinds`` is, then come the sequences' offsets, what is NaN where they are
    not sound, and the global counts of tokens and sequences, which may be among ``numbers`` instead (NaN: they are
    not). ``size`` are the numbers of rows and sequences.
    """
    material = material_of(given, kinds, size, numbers, config, only_active, dtype)
    made = material.purpose.made(material.given, kinds, material.segments.offsets is not None)
    rows = zip(implementation(backend).token_rows(material), material.given, made, strict=True)
    return [_apart(row, tensor) for row, tensor, fresh in rows if fresh]


def _apart(row: Tensor | None, tensor: Tensor | None) -> Tensor:
    """A row that is no view of what was given, which no operator may return."""
    assert row is not None
    shared = tensor is not None and row.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    return row.clone() if shared else row


def _fake_advantages(rewards: Tensor, *others: Any) -> Tensors5:
    advantages, weights, base, uncertainty = (torch.empty_like(rewards) for _ in range(4))
    return advantages, weights, base, uncertainty, fake_vector(rewards, metrics.GROUP, others[-2])


@operator(_fake_advantages)
def group_advantages(
    rewards: Tensor,
    fields: OptionalTensors,
    members: int,
    num_rows: int,
    negated: bool,
    tolerance: float,
    config: str,
    group_size: int | None,
    reported: bool,
    backend: str,
) -> Tensors5:
    """Advantages, weights, base, uncertainty ``[S]``, and the metrics vector where it is ``reported``.

    ``fields``: ids (None for groups of so many ``members`` in a row), correct, then the tensors of
    `egpo_kernels.formulas.rows.Measured`, and the offsets of sequences. ``tolerance``: see `collapse_tolerance`.
    """
    ids, correct, values, mask, tokens, entropy_mask, offsets = fields
    if ids is not None:
        validation.check_complete(ids, group_size)
    return implementation(backend).group_advantages(
        ids,
        members,
        rewards,
        correct,
        Measured(values, mask, tokens, entropy_mask, negated),
        Segments(num_rows, rewards.shape[0], offsets),
        tolerance,
        advantage_config(config),
        group_size,
        reported,
    )
