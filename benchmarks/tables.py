"""Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 300


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; what would break a row is made harmless."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def records(entries: Sequence[dict[str, Any]]) -> str:
    """A table of entries, whose keys are its columns."""
    head = list(dict.fromkeys(name for entry in entries for name in entry))
    return table(head, [[entry.get(name, "") for name in head] for entry in entries])


def cell(value: Any) -> str:
    """One value on one line."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
