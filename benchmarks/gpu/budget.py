"""Seconds: what each stage may take, and how all of them fit a machine that is lent for a quarter of an hour."""

from collections.abc import Sequence
from typing import NamedTuple

LONGEST = 240
"""What one stage may take, also with what others left over."""


class Budget(NamedTuple):
    """Seconds of a stage, in earnest and in a dry run."""

    seconds: int
    dry_seconds: int


BUDGET = {
    "first": Budget(200, 80),
    "tests": Budget(220, 120),
    "bench": Budget(200, 60),
    "dram": Budget(40, 5),
    "sanitizer": Budget(50, 5),
}
"""The stages in their order: what decides most comes first."""


def limit_of(name: str, chosen: Sequence[str], spent: float, dry: bool) -> float:
    """Seconds a stage may take: its own, and what the chosen stages before it left over."""
    before = [key for key in BUDGET if key in chosen]
    promised = before[: before.index(name) + 1]
    total = sum(BUDGET[key].dry_seconds if dry else BUDGET[key].seconds for key in promised)
    return min(total - spent, LONGEST)
