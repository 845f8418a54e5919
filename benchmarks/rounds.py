"""What pytest-benchmark runs: one call, once; `session.Session` makes a test of it for every provider and round."""

from typing import Any

from benchmarks.session import Entry, Session


def test_round(benchmark: Any, session: Session, entry: Entry) -> None:
    """Time one call."""
    session.time(benchmark, entry)
