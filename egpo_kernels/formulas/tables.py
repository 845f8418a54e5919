"""The raw slots of the metrics vectors, in the order that every backend fills them, and the metrics made of them.

Sums come first, then maxima. A minimum travels as the maximum of the negated values, so that any two raw vectors merge
slot by slot.
"""

import dataclasses
from typing import NamedTuple

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


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The raw slots of one vector and the metrics made of them; equal to itself alone, so that it is a cheap key.

    ``slots`` and ``keys`` are their names, in order.
    """

    sums: tuple[str, ...]
    maxima: tuple[str, ...]
    metrics: tuple[Metric, ...]
    slots: tuple[str, ...] = dataclasses.field(init=False)
    keys: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        # Not cached properties, which take a lock on Python 3.11, and Dynamo traces none.
        object.__setattr__(self, "slots", self.sums + self.maxima)
        object.__setattr__(self, "keys", tuple(metric.key for metric in self.metrics))


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

_SUPPORT_ROWS, _SUPPORT_KEPT = "support/rows/sum", "support/kept/total/sum"
_SUPPORT_COUNTS = _keys("support", "singletons/sum", "missing_tokens/sum")

SUPPORT = Table(
    sums=(_SUPPORT_ROWS, _SUPPORT_KEPT, *_SUPPORT_COUNTS),
    maxima=("support/kept/max",),
    metrics=(
        _metric(_SUPPORT_ROWS, ""),
        _metric("support/kept/mean", _SUPPORT_ROWS, _SUPPORT_KEPT),
        _metric("support/kept/max", _SUPPORT_ROWS),
        *(_metric(key, "") for key in _SUPPORT_COUNTS),
    ),
)

RANKS = Table(
    sums=("vocab_group/mismatched_ranks/sum",), maxima=(), metrics=(_metric("vocab_group/mismatched_ranks/sum", ""),)
)
