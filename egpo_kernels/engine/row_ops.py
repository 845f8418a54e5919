"""Opaque operators on what is per token or per sequence before a loss: layouts, rows, groups.

Checks of values live here, inside the operators, so that a traced call makes them too. Settings come as their JSON.
"""

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
from egpo_kernels.formulas.rows import Counts, Measured, Wanted
from egpo_kernels.inputs import validation
from egpo_kernels.inputs.segments import Segments


def _fake_offsets(cu_seqlens: Tensor, num_rows: int) -> Tensors2:
    return torch.empty_like(cu_seqlens, dtype=torch.long), cu_seqlens.new_empty((), dtype=torch.float32)


@operator(_fake_offsets)
def sequence_offsets(cu_seqlens: Tensor, num_rows: int) -> Tensors2:
    """Offsets ``[S + 1]`` int64 that never leave ``[0, num_rows]``, and 1.0 or, where they had to be mended, NaN."""
    validation.check_cu_seqlens(cu_seqlens, num_rows)
    given = cu_seqlens.long()
    offsets = given.clamp(0, num_rows).cummax(0).values
    sound = (offsets == given).all() & (given[0] == 0)
    one = torch.ones((), dtype=torch.float32, device=cu_seqlens.device)
    return offsets, torch.where(sound, one, torch.nan)


@operator(lambda by_sequence, *_: by_sequence.new_empty((), dtype=torch.float32))
def read_either_way(by_sequence: Tensor, by_token: Tensor, inside: Tensor, name: str) -> Tensor:
    """1.0 where ``name``, with as many tokens as sequences, says the same of rows ``inside`` either way, else NaN."""
    same = (by_sequence == by_token) | (by_sequence.isnan() & by_token.isnan()) | ~inside
    validation.check_either_way(name, same)
    return torch.where(same.all(), 1.0, torch.nan)


def _fake_rows(given: OptionalTensors, kinds: list[int], offsets: OptionalTensors, *others: Any) -> Tensors:
    (num_rows, _), _, _, config, dtype, only_active, _ = others
    like = next(tensor for tensor in given if tensor is not None)
    wanted = Wanted(policy_config(config) if config else None, dtype, only_active)
    made = wanted.made(tuple(given), kinds, offsets[0] is not None)
    dtypes = (torch.bool, torch.long, *[dtype] * 6)
    return [like.new_empty(num_rows, dtype=each) for each, fresh in zip(dtypes, made, strict=True) if fresh]


@operator(_fake_rows)
def token_rows(
    given: OptionalTensors,
    kinds: list[int],
    offsets: OptionalTensors,
    size: list[int],
    counts: OptionalTensors,
    numbers: list[float],
    config: str,
    dtype: torch.dtype,
    only_active: bool,
    backend: str,
) -> Tensors:
    """Those of the rows that must be made, see `egpo_kernels.formulas.rows.Wanted`.

    ``given`` and ``kinds`` are in the order of `Rows`; ``offsets`` are those of sequences and what is NaN where they
    are not sound, ``size`` the numbers of rows and sequences, ``counts`` and ``numbers`` the global counts as tensors
    or numbers (NaN: as neither).
    """
    wanted = Wanted(policy_config(config) if config else None, dtype, only_active)
    made = wanted.made(tuple(given), kinds, offsets[0] is not None)
    known = [None if math.isnan(number) else number for number in numbers]
    whole = Counts(*(number if tensor is None else tensor for tensor, number in zip(counts, known, strict=True)))
    device = next(tensor for tensor in given if tensor is not None).device
    rows = implementation(backend).token_rows(
        tuple(given), kinds, Segments(size[0], size[1], offsets[0]), offsets[1], whole, wanted, device
    )
    return [_apart(row, tensor) for row, tensor, fresh in zip(rows, given, made, strict=True) if fresh]


def _apart(row: Tensor, tensor: Tensor | None) -> Tensor:
    """A row that is no view of what was given, which no operator may return."""
    return (
        row.clone() if tensor is not None and row.untyped_storage()._cdata == tensor.untyped_storage()._cdata else row
    )


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
