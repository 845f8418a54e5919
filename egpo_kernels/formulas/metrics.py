"""What is reported: raw slots summed (or maximised) over a batch, and the named 0-d tensors made of them.

Every backend fills the raw slots of a table of `tables`, in its order.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from reprlib import repr as shown
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from egpo_kernels.config.results import Metrics
from egpo_kernels.formulas.arrays import at_hand
from egpo_kernels.formulas.arrays import total as total
from egpo_kernels.formulas.lazy import LazyMetrics, Part, unread
from egpo_kernels.formulas.tables import GROUP, NOTHING, TOKEN, Table
from egpo_kernels.formulas.tables import RANKS as RANKS
from egpo_kernels.formulas.tables import SUMMARIES as SUMMARIES
from egpo_kernels.formulas.tables import SUPPORT as SUPPORT
from egpo_kernels.inputs.validation import check_dense, check_tensor

TABLES = (TOKEN, GROUP, SUPPORT, RANKS)
# The key under which the count of a mean, minimum or maximum is itself reported.
_COUNT_KEYS = {m.key: m.over for t in TABLES for m in t.metrics if m.kind in ("mean", "min", "max")}
_GAPS = {m.key: m for t in TABLES for m in t.metrics if m.kind == "gap"}
_KNOWN = {metric.key: metric for table in TABLES for metric in table.metrics}


class Run(NamedTuple):
    """Metrics of one kind that follow each other, as views of a raw vector; of a gap, part and place of two means."""

    kind: str
    slots: Any
    counts: Any


@functools.cache
def runs_of(table: Table) -> tuple[Run, ...]:
    """Cut the metrics of ``table`` where their slots, or the slots of their counts, do not go on in equal steps.

    A vector is then made of slices alone: an index or a mask would have to lie on the device already, where another
    stream may find it unwritten.
    """
    runs: list[tuple[str, list[int], list[int]]] = []
    places: dict[str, tuple[int, int]] = {}
    for metric in table.metrics:
        if metric.kind == "gap":
            runs.append(("gap", list(places[metric.slot]), list(places[metric.over])))
            continue
        slot = table.slots.index(metric.slot)
        count = table.slots.index(metric.over) if metric.key in _COUNT_KEYS else 0
        kind, slots, counts = runs[-1] if runs else ("", [], [])
        if kind != metric.kind or not (_steady([*slots, slot]) and _steady([*counts, count])):
            kind, slots, counts = metric.kind, [], []
            runs.append((kind, slots, counts))
        slots.append(slot)
        counts.append(count)
        places[metric.key] = (len(runs) - 1, len(slots) - 1)
    return tuple(
        Run(kind, slots, counts) if kind == "gap" else Run(kind, _slice(slots), _slice(counts))
        for kind, slots, counts in runs
    )


def _steady(places: list[int]) -> bool:
    return len(places) < 3 or len({after - before for before, after in itertools.pairwise(places)}) == 1


def _slice(places: list[int]) -> slice:
    """These places, in equal steps; one of them where all are the same."""
    first, last = places[0], places[-1]
    return slice(first, last + 1, max(1, (last - first) // max(1, len(places) - 1)))


class Plan(NamedTuple):
    """How `finish_array` makes metrics ``[M]``: from which slots, over which counts; every array is ``[M]``.

    Each is ``value * clamp(count, low, high) / clamp(count, least, most)``: the bounds make both factors 1 for a sum,
    the second the count for a mean, and for an extreme the first 1, or 0 over nothing, which times an infinity is NaN,
    and the second its sign. ``gaps`` are the places of a gap and of its two means.
    """

    slots: Any
    counts: Any
    low: Any
    high: Any
    least: Any
    most: Any
    gaps: tuple[tuple[int, int, int], ...]


# Of each kind: low, high, least, most. A gap is written over.
_BOUNDS = {
    "sum": (1, 1, 1, 1),
    "mean": (1, 1, -math.inf, math.inf),
    "max": (0, 1, 1, 1),
    "min": (0, 1, -1, -1),
    "gap": (1, 1, 1, 1),
}


@functools.cache
def _plan(table: Table, dtype: Any) -> Plan:
    """Work out the plan of ``table`` for arrays of ``dtype``."""
    key, slot = table.keys.index, table.slots.index
    slots = np.array([0 if it.kind == "gap" else slot(it.slot) for it in table.metrics])
    counts = np.array([slot(it.over) if it.key in _COUNT_KEYS else 0 for it in table.metrics])
    low, high, least, most = np.array([_BOUNDS[it.kind] for it in table.metrics], dtype).T.copy()
    gaps = tuple((key(it.key), key(it.slot), key(it.over)) for it in table.metrics if it.kind == "gap")
    return Plan(slots, counts, low, high, least, most, gaps)


def finish_array(raw: Any, table: Table) -> Any:
    """As `finish`, from and to a numpy array; the caller ignores what numpy says of 0 / 0."""
    plan = _plan(table, raw.dtype)
    counts = raw[plan.counts]
    values = raw[plan.slots] * np.minimum(np.maximum(counts, plan.low), plan.high)
    values /= np.minimum(np.maximum(counts, plan.least), plan.most)
    for gap, minuend, subtrahend in plan.gaps:
        values[gap] = values[minuend] - values[subtrahend]
    return values


def finish(raw: Tensor, table: Table) -> Tensor:
    """Turn a raw vector into the reported one; a mean, minimum or maximum over nothing is NaN."""
    if at_hand(raw):
        with np.errstate(all="ignore"):
            return torch.from_numpy(finish_array(raw.detach().numpy(), table))
    parts: list[Tensor] = []
    for kind, slots, counts in runs_of(table):
        if kind == "gap":
            minuend, subtrahend = (parts[part][place : place + 1] for part, place in (slots, counts))
            values = minuend - subtrahend
        elif kind == "sum":
            values = raw[slots]
        elif kind == "mean":
            values = raw[slots] / raw[counts]  # over nothing 0 / 0
        else:
            extremes = raw[slots] if kind == "max" else -raw[slots]
            values = torch.where(raw[counts] > 0, extremes, torch.nan)
        parts.append(values)
    return torch.cat(parts)


@functools.lru_cache(maxsize=64)
def _kept(table: Table, without: tuple[str, ...]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Keys of ``table`` that start with none of ``without``, without values, and their places."""
    kept = {key: place for place, key in enumerate(table.keys) if not key.startswith(without)}
    return unread(kept), tuple(kept.values())


def named(vector: Tensor, table: Table, without: Sequence[str] = ()) -> Metrics:
    """Name the 0-d entries of a reported vector, leaving out keys that start with one of ``without``.

    The dict is filled when somebody looks; while torch.compile traces, at once.
    """
    vector, without = vector.detach() if vector.requires_grad else vector, tuple(without)
    if is_compiling():
        entries = zip(table.keys, vector.unbind(), strict=True)
        return {key: value for key, value in entries if not key.startswith(without)}
    keys, places = _kept(table, without)
    return LazyMetrics.of(Part(vector, keys, places))


def combine_metrics(metrics: Iterable[Metrics]) -> Metrics:
    """Merge the metrics of micro-batches exactly: sums add, means weigh by their count, minima and maxima compare.

    Args:
        metrics: Dicts as the library's functions return them; a key may be missing from some.

    Returns:
        One dict of 0-d tensors.

    Raises:
        TypeError: ``metrics`` is not an iterable of dicts of tensors.
        ValueError: A key that is none of the library's, or one whose count was taken out.
    """
    parts = _parts(metrics)
    keys = list(dict.fromkeys(key for part in parts for key in part))
    unknown = [key for key in keys if key not in _KNOWN]
    if unknown:
        raise ValueError(f"metrics has the key {shown(unknown[0])}; it must hold only keys that egpo_kernels returned")
    lost = [key for part in parts for key in part if key in _COUNT_KEYS and _COUNT_KEYS[key] not in part]
    if lost:
        raise ValueError(f"metrics has {lost[0]!r} without its count {_COUNT_KEYS[lost[0]]!r}; it must have both")
    merged = {key: _merge(key, [part for part in parts if key in part]) for key in keys if key not in _GAPS}
    for key in keys:
        if key in _GAPS:
            upper, lower = _GAPS[key].slot, _GAPS[key].over
            if upper not in merged or lower not in merged:
                raise ValueError(f"metrics has {key!r} without the means it is the gap of; it must have both")
            merged[key] = merged[upper] - merged[lower]
    return {key: merged[key] for key in keys}


def _parts(metrics: Any) -> list[Metrics]:
    """Return the dicts to merge when they hold nothing but 0-d tensors on one device."""
    wanted = "it must be a list of the dicts that egpo_kernels returned"
    if isinstance(metrics, (dict, Tensor, np.ndarray)) or not isinstance(metrics, Iterable):
        raise TypeError(f"metrics is {type(metrics).__name__}; {wanted}")
    parts = list(metrics)
    if not all(isinstance(part, dict) for part in parts):
        raise TypeError(f"metrics is {shown(metrics)}; {wanted}")
    device = None
    for key, value in (entry for part in parts for entry in part.items()):
        name = f"metrics[{shown(key)}]"
        device = device or check_dense(name, value, "floating").device
        check_tensor(name, value, "floating", {"a 0-d tensor": ()}, device)
    return parts


def _merge(key: str, parts: list[Metrics]) -> Tensor:
    values = torch.stack([part[key] for part in parts])
    if key not in _COUNT_KEYS:
        return values.sum()
    counts = torch.stack([part[_COUNT_KEYS[key]] for part in parts]).to(values.dtype)
    if _KNOWN[key].kind == "mean":
        return torch.where(counts > 0, values * counts, 0.0).sum() / counts.sum()
    sign = -1.0 if _KNOWN[key].kind == "min" else 1.0
    best = torch.where(counts > 0, sign * values, NOTHING).amax()
    return torch.where(counts.sum() > 0, sign * best, torch.nan)
