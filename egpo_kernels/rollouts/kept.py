"""What a sampler kept, from the ways that engines record it, or from logits where none did."""

from collections.abc import Iterable, Iterator, Sequence
from reprlib import repr as shown
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.fields import check_number, check_positive, entries
from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.inputs.segments import accumulation_dtype
from egpo_kernels.inputs.validation import check_dense, check_tensor, check_whole

CHUNK_BYTES = 64 << 20
"""Of sorted logits at a time."""


def pack_support(ids: Tensor, fill: int = -1) -> SamplingSupport:
    """Kept tokens in rows of one width, as some engines and trainers pad them (SkyRL: the sampled token, then top-k).

    Args:
        ids: ``[S, T, K]`` or ``[N, K]``, integer: the kept ids of each row in any order, filled up. What is there twice
            is kept once.
        fill: What rows are filled up with. A row of nothing else has no record: it keeps the whole vocabulary.

    Returns:
        A `SamplingSupport` for rows of ``[S, T]`` or ``[N]``, on the device of ids; nothing waits for it.

    Raises:
        ValueError: A wrong shape.
        TypeError: A wrong type or dtype.
    """
    check_dense("ids", ids, "integer")
    if ids.dim() not in (2, 3):
        raise ValueError(f"ids has shape {list(ids.shape)}; it must be [S, T, K] or [N, K], each row filled up")
    filled = check_whole("fill", fill, -(2**63))
    if filled is None:
        raise TypeError("fill is None; it must be an int")
    rows = ids.long().flatten(0, -2).sort(-1).values
    kept = rows != filled
    kept[:, 1:] &= rows[:, 1:] != rows[:, :-1]
    # Without a look at how many are kept: those that are come first, and what is behind them is in no row.
    ends = kept.flatten().cumsum(0)
    place = torch.where(kept.flatten(), ends - 1, rows.numel())
    packed = rows.new_zeros(rows.numel() + 1).scatter_(0, place, rows.flatten())[:-1]
    offsets = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
    return SamplingSupport(packed[: int(offsets[-1])] if packed.is_cpu else packed, offsets)


def support_from_lists(
    token_ids: Sequence[Any],
    offsets: Sequence[Any] | None = None,
    *,
    starts: int | Sequence[int] | Tensor = 0,
    length: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> SamplingSupport:
    """Records of responses, as engines return them, for the rows of a batch.

    Args:
        token_ids: Of each sequence the kept ids of its generated tokens: one after the other, with ``offsets``; or,
            without, one list a token (SGLang). None: the engine recorded nothing of the sequence.
        offsets: Of each sequence where its tokens' ids begin and end: token j kept
            ``token_ids[i][offsets[i][j] : offsets[i][j + 1]]`` (vLLM, slime).
        starts: Of each sequence, or of all, the row that scores its first generated token: 0 where rows are responses
            alone; the prompt's length less 1 where rows are whole sequences against `next_token_targets`.
        length: T of a padded batch ``[S, T]``; N of a packed one, or None if it ends where its last sequence does.
        cu_seqlens: ``[S + 1]`` integer of a packed batch.

    Returns:
        A `SamplingSupport` on the CPU, for the rows of ``[S, T]`` or ``[N]``. Those before a response and behind what
        was recorded have no record.

    Raises:
        ValueError: A record longer than its sequence's rows, offsets that fall or leave their ids, other numbers of
            sequences, neither ``length`` nor ``cu_seqlens``.
        TypeError: A wrong type.
    """
    records = [_record(number, *both) for number, both in enumerate(_pairs(token_ids, offsets))]
    first, last, total = _rows(len(records), length, cu_seqlens)
    begin = first + _starts(starts, len(records))
    tokens = np.array([len(counts) for _, counts in records], np.int64)
    late = (tokens > 0) & ((begin < first) | (begin + tokens > last))
    if late.any():
        number = int(late.nonzero()[0][0])
        raise ValueError(
            f"token_ids[{number}] has a record of {tokens[number]} tokens from row {begin[number] - first[number]} on, "
            f"and its sequence has {last[number] - first[number]} rows; they must fit: cut what the batch cuts"
        )
    counts = np.zeros(total, np.int64)
    # Row of each recorded token: those of a sequence follow one another.
    place = np.arange(tokens.sum()) + np.repeat(begin - (tokens.cumsum() - tokens), tokens)
    counts[place] = np.concatenate([counts[:0], *(own for _, own in records)])
    ids = np.concatenate([np.zeros(0, np.int64), *(own for own, _ in records)])
    return SamplingSupport(torch.from_numpy(ids), torch.from_numpy(np.concatenate([[0], counts.cumsum()])))


def top_p_support(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    temperature: float | Tensor = 1.0,
) -> SamplingSupport:
    """What a sampler would keep of these logits, for engines that record nothing.

    The trainer's logits are not the sampler's to the last bit: at the edge of a set they keep others now and then. The
    filters are applied in this order, each to what the one before left, as SGLang does: ``top_k`` largest (and what
    equals the last of them), the fewest that hold ``top_p`` of the probability, what has at least ``min_p`` times the
    largest probability (arXiv 2407.01082).

    Args:
        logits: ``[S, T, V]`` or ``[N, V]``, floating, undivided by the temperature.
        top_k: At least 1, or None.
        top_p: In (0, 1], or None.
        min_p: In [0, 1], or None.
        temperature: Above 0; a float, or a tensor ``[S]`` (padded), ``[S, T]`` or ``[N]``.

    Returns:
        A `SamplingSupport` on the device of logits; it waits for it, to know how many are kept. A row that keeps all
        has no record, which means the same.

    Raises:
        ValueError: A wrong shape or value, or no filter at all.
        TypeError: A wrong type or dtype.
    """
    check_dense("logits", logits, "floating")
    if logits.dim() not in (2, 3) or logits.shape[-1] < 1:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [S, T, V] or [N, V]")
    if top_k is None and top_p is None and min_p is None:
        raise ValueError("top_k, top_p and min_p are None; one of them must say what is kept")
    top_k = check_whole("top_k", top_k, 1)
    top_p = check_number("top_p", top_p, low=0.0, high=1.0, open_low=True, optional=True)
    min_p = check_number("min_p", min_p, low=0.0, high=1.0, optional=True)
    dtype, shape = compute_dtype(logits.dtype), logits.shape[:-1]
    if isinstance(temperature, Tensor):
        shapes = {"one for each token": tuple(shape), "[S]": tuple(shape[:1])}
        heat = check_tensor("temperature", temperature, "floating", shapes, logits.device).to(dtype)
        if not (heat > 0).all():
            raise ValueError(
                "temperature holds a number that is not above 0; every one must be: give masked positions a 1"
            )
        heat = (heat if heat.shape == shape else heat[:, None].expand(shape)).reshape(-1, 1)
    else:
        heat = torch.full((1, 1), check_positive("temperature", temperature), dtype=dtype, device=logits.device).expand(
            shape.numel(), 1
        )
    rows = logits.detach().reshape(-1, logits.shape[-1])
    size = max(1, CHUNK_BYTES // (4 * dtype.itemsize * rows.shape[1]))
    parts = [
        _filtered(part.to(dtype) / hot, top_k, top_p, min_p)
        for part, hot in zip(rows.split(size), heat.split(size), strict=True)
    ]
    ids = torch.cat([rows.new_zeros(0, dtype=torch.long), *(ids for ids, _ in parts)])
    counts = torch.cat([rows.new_zeros(0, dtype=torch.long), *(counts for _, counts in parts)])
    return SamplingSupport(ids, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def _filtered(z: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> tuple[Tensor, Tensor]:
    """Kept ids of ``z [R, V]``, row after row, and how many of each row, 0 where all are."""
    ranked = z.sort(dim=-1, descending=True, stable=True)
    values, vocab = ranked.values, z.shape[1]
    kept = values > -torch.inf
    if top_k is not None and top_k < vocab:
        kept &= values >= values[:, top_k - 1 : top_k]
    if top_p is not None and top_p < 1:  # of 1 a rounded sum would leave something out
        share = torch.where(kept, values, -torch.inf).softmax(-1, dtype=accumulation_dtype(z.device))
        # What the larger ones hold, without itself: the largest stays whatever top_p is.
        kept &= share.cumsum(-1) - share < top_p
    if min_p is not None:
        kept &= (values - values[:, :1]).exp() >= min_p
    kept[:, 0] = True
    counts = kept.sum(-1)
    some = counts < vocab
    return ranked.indices[kept & some[:, None]], torch.where(some, counts, 0)


def _pairs(token_ids: Any, offsets: Any) -> Iterator[tuple[Any, Any]]:
    for name, value in (("token_ids", token_ids), ("offsets", offsets)):
        if (value is not None or name == "token_ids") and not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} is {type(value).__name__}; it must be a list with an entry for each sequence")
    if offsets is not None and len(offsets) != len(token_ids):
        raise ValueError(f"offsets has {len(offsets)} entries; it must have {len(token_ids)}, as token_ids has")
    return zip(token_ids, [None] * len(token_ids) if offsets is None else offsets, strict=True)


def _record(number: int, ids: Any, offsets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Kept ids of a sequence, and how many of each of its tokens."""
    if ids is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if offsets is None:
        lists = [_whole_numbers(f"token_ids[{number}]", kept) for kept in _listed(number, ids)]
        return np.concatenate([np.zeros(0, np.int64), *lists]), np.array([len(kept) for kept in lists], np.int64)
    ids, bounds = _whole_numbers(f"token_ids[{number}]", ids), _whole_numbers(f"offsets[{number}]", offsets)
    if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != len(ids) or (np.diff(bounds) < 0).any():
        raise ValueError(
            f"offsets[{number}] is {shown(bounds.tolist())} over {len(ids)} ids; it must start at 0, never decrease, "
            "and end at their number"
        )
    return ids, np.diff(bounds)


def _listed(number: int, ids: Any) -> Iterable[Any]:
    if not isinstance(ids, (list, tuple)):
        raise TypeError(
            f"token_ids[{number}] is {type(ids).__name__} without offsets; it must be a list of the kept ids of "
            "each token"
        )
    return [() if kept is None else kept for kept in ids]


def _whole_numbers(name: str, values: Any) -> np.ndarray:
    values = values.cpu().numpy() if isinstance(values, Tensor) else values
    try:
        found = np.asarray(values if isinstance(values, (list, tuple, np.ndarray)) else entries(values))
    except ValueError:  # lists of several lengths
        found = np.asarray(None)
    if found.ndim != 1 or not (found.size == 0 or (found.dtype.kind in "iu" and np.can_cast(found.dtype, np.int64))):
        raise TypeError(f"{name} is {shown(values)}; it must be a list of integers that int64 holds")
    return found.astype(np.int64)


def _rows(count: int, length: Any, cu_seqlens: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """First row of each sequence, the first behind it, and the number of all."""
    width = check_whole("length", length, 0)
    if cu_seqlens is None:
        if width is None:
            raise ValueError("length and cu_seqlens are None; one of them must say where sequences lie")
        first = width * np.arange(count, dtype=np.int64)
        return first, first + width, width * count
    bounds = check_dense("cu_seqlens", cu_seqlens, "integer").cpu().numpy().astype(np.int64)
    if bounds.shape != (count + 1,) or bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise ValueError(
            f"cu_seqlens is {shown(bounds.tolist())}; it must be [S + 1] = [{count + 1}], start at 0 and never decrease"
        )
    total = int(bounds[-1])
    if width is not None and width < total:
        raise ValueError(f"length is {width} with cu_seqlens that end at {total}; it must be at least as many, or None")
    return bounds[:-1], bounds[1:], total if width is None else width


def _starts(starts: Any, count: int) -> np.ndarray:
    if isinstance(starts, (int, np.integer)) and not isinstance(starts, bool):
        return np.full(count, starts, np.int64)
    found = _whole_numbers("starts", starts)
    if len(found) != count:
        raise ValueError(
            f"starts has {len(found)} entries; it must be an int, or have one for each of {count} sequences"
        )
    return found
