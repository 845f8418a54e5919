"""Rows of kept tokens: their softmax and its gradient, and products with no more of an output layer than they need."""

from collections.abc import Sequence

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.kept import Entries, Grouped, kept_metrics
from egpo_kernels.inputs.segments import segment_sum
from egpo_kernels.portable.softmax import Sums, heats, read_off, slopes

CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 4 << 20, 256 << 20
"""Of gathered rows at a time."""


def kept_statistics(
    values: Tensor, entries: Entries, rows: Rows, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-prob, entropy, maximum, sum of exponentials ``[N]`` of the ``values [E]`` of kept tokens; for rows without a
    record they may be anything.
    """
    heat, place = heats(rows, temperature), entries.row_places()
    z = torch.where(entries.alive, values, -torch.inf)
    maximum = torch.full_like(entries.mask, -torch.inf, dtype=z.dtype).scatter_reduce(0, place, z, "amax")
    x, power = _exponentials(z, place, maximum, heat)
    sums = Sums(maximum, segment_sum(power, entries.offsets), None)
    if want_entropy:
        # 0 * -inf would be NaN where a probability is 0.
        weighted = torch.where(power == 0, 0.0, x * power)
        sums = sums._replace(sum_x=segment_sum(weighted, entries.offsets))
    log_probs, entropy = read_off(_first(values, entries), heat, sums)
    return torch.where(entries.broken, torch.nan, log_probs), entropy, maximum, sums.sum_exp


def kept_gradient(
    values: Tensor,
    entries: Entries,
    rows: Rows,
    statistics: Sequence[Tensor | None],
    upstream: list[Tensor | None],
    temperature: float,
) -> Tensor:
    """Gradient by ``values [E]`` from ``statistics`` (maximum, sum of exponentials, entropy) and ``upstream`` (dL/dl,
    dL/dEnt), ``[N]`` each; exactly 0 for what is not alive.
    """
    (grad_log_probs, grad_entropy), (maximum, sum_exp, entropy) = upstream, statistics
    assert grad_log_probs is not None and maximum is not None and sum_exp is not None
    heat, place = heats(rows, temperature), entries.row_places()
    own = _first(values, entries)
    slope = slopes(own, sum_exp, entropy, entries.mask & ~entries.broken, heat, grad_log_probs, grad_entropy)
    x, power = _exponentials(torch.where(entries.alive, values, -torch.inf), place, maximum, heat)
    gradient = power * slope.level[place]
    if slope.tilt is not None:
        gradient += torch.where(power == 0, 0.0, x * power) * slope.tilt[place]
    first = entries.offsets[:-1]
    gradient = gradient.index_copy(0, first, gradient[first] + slope.own)
    return torch.where(entries.alive & slope.live[place], gradient, 0.0)


def kept_logits(logits: Tensor, entries: Entries) -> Tensor:
    """Logits ``[E]`` of kept tokens in the compute dtype; any where an id is none, whose row is broken."""
    places = _places(logits, entries.row_places(), entries.columns(logits.shape[-1]))
    return logits[places].to(compute_dtype(logits.dtype))


def put_kept_(gradient: Tensor, entries: Entries, values: Tensor) -> None:
    """Write the gradient ``[E]`` of kept tokens to its places in ``gradient [B, T, V]``."""
    places = _places(gradient, entries.row_places(), entries.columns(gradient.shape[-1]))
    # Nothing is there yet; what is not alive adds nothing, wherever that is.
    values = torch.where(entries.alive, values, 0.0).to(gradient.dtype)
    gradient.index_put_(places, values, accumulate=True)


def _places(logits: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    length = max(logits.shape[1], 1)
    return rows // length, rows % length, columns


def support_metrics(ids: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The vector of `egpo_kernels.formulas.metrics.SUPPORT` over rows of ``mask [N]``."""
    return metrics.finish(kept_metrics(ids, offsets, tokens, mask, dtype), metrics.SUPPORT)


def _first(values: Tensor, entries: Entries) -> Tensor:
    """Those ``[N]`` of the rows' own tokens."""
    return values[entries.offsets[:-1]]


def _exponentials(z: Tensor, place: Tensor, maximum: Tensor, heat: Tensor | float) -> tuple[Tensor, Tensor]:
    """``x = (z - max z) / temperature`` of entries, and ``e^x``."""
    x = (z - maximum[place]) / (heat[place] if isinstance(heat, Tensor) else heat)
    return x, x.exp()


def gathered_products(left: Tensor, right: Tensor, entries: Entries) -> Tensor:
    """Products ``[E]`` of entries' rows of ``left [N, H]`` and their tokens' rows of ``right [V, H]``, in the compute
    dtype; on a CPU 0 for what is not alive.
    """
    columns, place = entries.columns(right.shape[0]), entries.row_places()
    dtype, looked_at = compute_dtype(right.dtype), entries.alive.nonzero()[:, 0] if left.is_cpu else None
    if looked_at is not None:
        columns, place = columns[looked_at], place[looked_at]
    made = left.new_empty(columns.shape[0], dtype=dtype)
    size = _chunk_rows(right, dtype)
    for part, row, column in zip(made.split(size), place.split(size), columns.split(size), strict=True):
        torch.sum(left[row].to(dtype).mul_(right[column]), -1, out=part)
    return made if looked_at is None else made.new_zeros(entries.alive.shape).index_copy_(0, looked_at, made)


def add_gathered(values: Tensor, source: Tensor, index: Tensor, grouped: Grouped, out: Tensor) -> None:
    """Add to each row of ``out [G, H]`` that has entries the rows ``index [E]`` of ``source``, times ``values [E]``.

    A group's entries are added up in their order.
    """
    values, index, total = values[grouped.order].to(source.dtype), index[grouped.order], out.shape[0]
    if not out.is_cpu:
        # Of a last bag a GPU's kernel takes everything that is left: one more has what is in no group.
        bags = torch.nn.functional.pad(grouped.offsets, (0, 1), value=index.shape[0])
        out += _bags(index, source, bags, values)[:-1]
        return
    size = _chunk_rows(source, source.dtype)
    bounds = [*grouped.offsets[::size].tolist(), int(grouped.offsets[-1])]
    for number, first in enumerate(range(0, total, size)):
        inside = slice(bounds[number], bounds[number + 1])
        if inside.start == inside.stop:
            continue
        offsets = grouped.offsets[first : first + size + 1] - grouped.offsets[first]
        out[first : first + size] += _bags(index[inside], source, offsets, values[inside])


def _bags(index: Tensor, source: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(
        index, source, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def _chunk_rows(matrix: Tensor, dtype: torch.dtype) -> int:
    most = CPU_CHUNK_BYTES if matrix.is_cpu else DEVICE_CHUNK_BYTES
    return max(1, most // max(1, matrix.shape[1] * dtype.itemsize))
