"""Making rows, by themselves or on the way of another launch: which are made, and how the kernels are launched."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.formulas.rows import Counts, Given, Material, Purpose
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.triton.launch import processors
from egpo_kernels.triton.launcher import Launches, lie
from egpo_kernels.triton.rows import Choices, Numbers, Whole, sequence_counts_kernel, token_rows_kernel
from egpo_kernels.triton.segments import Flags
from egpo_kernels.triton.settings import RowPointers, as_arguments, blocks_of, dense, triton_dtype

BLOCK, BLOCK_COUNT, OPTIONS = 1024, 4096, {"num_warps": 8}
NOTHING, NO_WHOLE = Numbers(None, None, None, None, None, None), Whole(None, None, None, None)


def sequence_counts(flags: Flags, segments: Segments, device: torch.device) -> Tensor:
    """Counted tokens ``[S]`` int32 of each sequence."""
    return _sequence_counts(flags, NOTHING, NOTHING, segments, torch.float32, device, False)[0]


def _sequence_counts(
    flags: Flags,
    given: Numbers,
    kinds: Numbers,
    segments: Segments,
    dtype: torch.dtype,
    device: torch.device,
    active: bool,
) -> tuple[Tensor, Tensor | None]:
    count, offsets = segments.num_sequences, dense(segments.offsets)
    lengths = torch.empty(count, dtype=torch.int32, device=device)
    actives = torch.empty_like(lengths) if active else None
    if count:
        launches = Launches(device, dtype, lie((*flags, *given, offsets)), kinds, segments.length >> 31, active)
        arguments = (flags, given, kinds, offsets, lengths, actives, segments.length, triton_dtype(dtype), BLOCK)
        launches(sequence_counts_kernel, count, arguments, OPTIONS)
    return lengths, actives


class Plan(NamedTuple):
    """What is done with tensors of one description: rows to be made by their dtypes, None where what was given is one;
    whether those are token ids; what the kernel is compiled with.
    """

    made: tuple[torch.dtype | None, ...]
    ids: bool
    kinds: Numbers
    choices: Choices
    constants: tuple[Any, ...]


def _plan(given: Given, kinds: Sequence[int], packed: bool, known: bool, purpose: Purpose) -> Plan:
    fresh, dtype = purpose.made(given, kinds, packed), purpose.dtype
    dtypes = (torch.bool, torch.long, *[dtype] * len(NOTHING))
    reduction = "" if purpose.config is None else purpose.config.reduction
    return Plan(
        tuple(each if new else None for each, new in zip(dtypes, fresh, strict=True)),
        fresh[1],
        Numbers(*kinds[2:]),
        Choices(reduction, reduction in ("sum", "none"), known, purpose.drops),
        (triton_dtype(dtype), BLOCK, BLOCK_COUNT),
    )


def row_making(material: Material) -> tuple[tuple[Hashable, ...], Callable[[Launches], RowPointers]]:
    """How rows are made in the dtypes that kernels read, contiguous: by a function of launches whose key holds the one
    that comes first. It also says how the rows lie.
    """
    given, kinds, segments, poison, counts, purpose = material
    mask, tokens, *others = given = [None if tensor is None else tensor.contiguous() for tensor in given]
    like = next(tensor for tensor in given if tensor is not None)
    flags, numbers, config = Flags(mask, tokens if mask is None else None, None), Numbers(*others), purpose.config
    whole, known, norm_length = NO_WHOLE, None, 0.0
    if config is not None:
        whole, known = _whole(flags, numbers, kinds, segments, poison, counts, purpose, like.device)
        norm_length = config.norm_length or 0.0
    offsets, num_rows = dense(segments.offsets), segments.num_rows
    sizes = (num_rows, segments.num_sequences, segments.length)
    key = (
        like.device, purpose.dtype, lie((*given, offsets, *whole)), tuple(kinds), config and config.reduction,
        purpose.drops, known is not None, num_rows == 0, *[size >> 31 for size in sizes],
    )  # fmt: skip

    def made(launches: Launches) -> RowPointers:
        plan = launches.worked_out(_plan, given, kinds, offsets is not None, known is not None, purpose)
        made = [None if each is None else like.new_empty(num_rows, dtype=each) for each in plan.made]
        if num_rows:
            new_mask, new_ids, *new = made
            ids, values = tokens if plan.ids else None, as_arguments((known or 0.0, norm_length), purpose.dtype)
            rows = (flags, numbers, plan.kinds, Numbers(*new), new_mask, ids, new_ids)
            arguments = (*rows, offsets, whole, values, plan.choices, *sizes, *plan.constants)
            programs = min(blocks_of(num_rows, BLOCK), processors(like.device))
            launches(token_rows_kernel, programs, arguments, OPTIONS)
        return RowPointers(*[old if new is None else new for new, old in zip(made, given, strict=True)])

    return key, made


def token_rows(material: Material) -> Rows:
    """Rows in the dtypes that kernels read, contiguous."""
    key, made = row_making(material)
    return Rows(*made(Launches(*key)))


def _whole(
    flags: Flags,
    given: Numbers,
    kinds: Sequence[int],
    segments: Segments,
    poison: Tensor | None,
    counts: Counts,
    purpose: Purpose,
    device: torch.device,
) -> tuple[Whole, float | None]:
    """What the reduction divides by, and the global count where it is a number; counts sequences where it must."""
    config = purpose.config
    assert config is not None
    of_sequences = config.reduction.startswith("seq_mean")
    count = counts.sequences if of_sequences else counts.tokens
    lengths = actives = None
    pooled = purpose.drops and config.pools
    if pooled or (of_sequences and (count is None or config.reduction == "seq_mean_token_mean")):
        lengths, actives = _sequence_counts(flags, given, Numbers(*kinds[2:]), segments, purpose.dtype, device, pooled)
    if isinstance(count, Tensor):
        return Whole(count, lengths, actives, poison), None
    return Whole(None, lengths, actives, poison), count
