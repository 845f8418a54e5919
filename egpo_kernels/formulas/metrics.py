"""What is reported: raw slots summed (or maximised) over a batch, and the named 0-d tensors made of them.

Every backend fills the raw slots of a table below, in this order: sums first, then maxima. A minimum travels as the
maximum of the negated values, so that any two raw vectors merge slot by slot.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from reprlib import repr as shown
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.settings import Metrics
from egpo_kernels.inputs.segments import accumulation_dtype
from egpo_kernels.inputs.validation import check_dense, check_tensor

NOTHING = float("-inf")


class Metric(NamedTuple):
    """A reported number: ``sum`` / ``max`` of a slot, ``mean`` over a count, ``min`` of a negated slot, or ``gap``.

    ``slot`` names the raw slot; for a gap, the mean subtracted from. ``over`` names the slot of its count; for a
    gap, the mean that is subtracted.
    """

    key: str
    kind: str
    slot: str
    over: str


class Table(NamedTuple):
    """The raw slots of one vector and the metrics made of them."""

    sums: tuple[str, ...]
    maxima: tuple[str, ...]
    metrics: tuple[Metric, ...]

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the raw slots, in order."""
        return self.sums + self.maxima

    @property
    def size(self) -> int:
        """How many metrics are reported."""
        return len(self.metrics)

    @property
    def num_slots(self) -> int:
        """How many raw slots there are."""
        return len(self.sums) + len(self.maxima)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the reported metrics, in order."""
        return tuple(metric.key for metric in self.metrics)


def _metric(key: str, count: str, slot: str = "") -> Metric:
    return Metric(key, key.rsplit("/", 1)[1], slot or key, count)


def _keys(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}/{name}" for name in names)


_TOKEN_SUMS = _keys("policy", "tokens/sum", "loss/sum", "loss/surrogate/sum", "loss/kl/sum", "loss/entropy/sum")
_TOKEN_MEANS = _keys("policy", "clip_low/mean", "clip_high/mean", "ratio/mean", "approx_kl/mean", "ref_kl/mean")
_TOKEN_MEANS += _keys("policy", "entropy/mean")
_TOKEN_COUNTS = _keys("policy", "invalid_tokens/sum", "nonfinite_rows/sum", "unscored_tokens/sum")
_TOKEN_COUNTS += _keys("policy", "uncounted_tokens/sum")
_TOKEN_MAXIMA = _keys("policy", "ratio/max", "ratio/min")

TOKEN = Table(
    sums=_TOKEN_SUMS + _TOKEN_MEANS + _TOKEN_COUNTS,
    maxima=_TOKEN_MAXIMA,
    metrics=tuple(
        _metric(key, "policy/tokens/sum") for key in _TOKEN_SUMS + _TOKEN_MEANS + _TOKEN_COUNTS + _TOKEN_MAXIMA
    ),
)

SUMMARIES: tuple[str, ...] = ("uncertainty", "uncertainty/correct", "uncertainty/incorrect")
SUMMARIES += ("weight", "weight/correct", "weight/incorrect", "advantage")
_SHARES = ("egpo/weight/at_lower/mean", "egpo/weight/at_one/mean", "egpo/weight/at_upper/mean")
_GROUP_COUNTS = tuple(
    f"egpo/{name}/sum"
    for name in (
        "empty_sequences",
        "invalid_rewards",
        "incomplete_groups",
        "groups",
        "groups/single",
        "groups/unusable",
        "groups/all_wrong",
        "groups/all_correct",
        "groups/no_correct",
        "groups/mixed",
    )
)

GROUP = Table(
    sums=tuple(f"egpo/{name}/{part}/sum" for name in SUMMARIES for part in ("count", "total"))
    + _SHARES
    + _GROUP_COUNTS,
    maxima=tuple(f"egpo/{name}/{part}" for name in SUMMARIES for part in ("max", "min")),
    metrics=(
        _metric("egpo/sequences/sum", "", "egpo/weight/count/sum"),
        _metric("egpo/correct/sum", "", "egpo/weight/correct/count/sum"),
        _metric("egpo/incorrect/sum", "", "egpo/weight/incorrect/count/sum"),
        *(_metric(f"egpo/{name}/count/sum", "") for name in SUMMARIES),
        *(_metric(f"egpo/{name}/mean", f"egpo/{name}/count/sum", f"egpo/{name}/total/sum") for name in SUMMARIES),
        *(_metric(f"egpo/{name}/{part}", f"egpo/{name}/count/sum") for part in ("min", "max") for name in SUMMARIES),
        Metric("egpo/uncertainty/gap/mean", "gap", "egpo/uncertainty/incorrect/mean", "egpo/uncertainty/correct/mean"),
        _metric("egpo/advantage/sum", "", "egpo/advantage/total/sum"),
        *(_metric(key, "egpo/weight/count/sum") for key in _SHARES),
        *(_metric(key, "") for key in _GROUP_COUNTS),
    ),
)

# The key under which the count of a mean, minimum or maximum is itself reported.
_COUNT_KEYS = {m.key: m.over for t in (TOKEN, GROUP) for m in t.metrics if m.kind in ("mean", "min", "max")}
_GAPS = {m.key: m for t in (TOKEN, GROUP) for m in t.metrics if m.kind == "gap"}
_KNOWN = {metric.key: metric for table in (TOKEN, GROUP) for metric in table.metrics}


def summary(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return count, sum, maximum and maximum of the negated ``values`` over ``where``, 0-d each."""
    if values.shape[0] == 0:
        nothing = values.new_full((), NOTHING)
        return values.new_zeros(()), values.new_zeros(()), nothing, nothing
    chosen = torch.where(where, values, 0.0)
    high = torch.where(where, values, NOTHING).amax()
    low = torch.where(where, -values, NOTHING).amax()
    return where.sum().to(values.dtype), total(chosen), high, low


def total(values: Tensor) -> Tensor:
    """Sum of all ``values``, accumulated in float64 where the device has it."""
    return values.sum(dtype=accumulation_dtype(values.device)).to(values.dtype)


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


def finish(raw: Tensor, table: Table) -> Tensor:
    """Turn a raw vector into the reported one; a mean, minimum or maximum over nothing is NaN."""
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


def named(vector: Tensor, table: Table, without: Sequence[str] = ()) -> Metrics:
    """Split a reported vector into its 0-d entries, leaving out keys that start with one of ``without``."""
    entries = zip(table.keys, vector.detach().unbind(), strict=True)
    return {key: value for key, value in entries if not key.startswith(tuple(without))}


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


def merged(first: Metrics, second: Metrics) -> Metrics:
    return {**first, **second}
