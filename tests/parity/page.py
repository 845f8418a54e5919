"""Draws the tables of `docs/trainers.md` from the facts that the tests run: python -m tests.parity.page

A section stands between ``<!-- options: NAME -->`` or ``<!-- parity: NAME -->`` and ``<!-- end -->``.
"""

import re
from pathlib import Path

from tests.parity.facts import Facts, Same
from tests.parity.facts_liger import LIGER
from tests.parity.facts_trl import TRL
from tests.parity.facts_verl import VERL

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
SECTION = re.compile(r"(<!-- (\w+): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TRAINERS = {"trl": TRL, "verl": VERL, "liger": LIGER}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * len(head), *rows))


def code(text: str) -> str:
    """Arguments as code, a bar being the end of a cell."""
    return f"`{text}`".replace("|", "\\|")


def options(facts: Facts) -> str:
    """Which of our settings stands for which of theirs."""
    return table((facts.trainer, "here"), [tuple(option) for option in facts.options])


def parity(facts: Facts) -> str:
    """What gives the same numbers, and what does not and why."""

    def with_losses(row: Same) -> str:
        return f"yes, with {', '.join(map(code, row.only)) or 'each loss above'}"

    rows = [(code(row.theirs), code(row.ours), "yes") for row in facts.losses]
    rows += [(code(row.theirs), code(row.ours), with_losses(row)) for row in facts.modifiers]
    rows += [(code(row.theirs), code(row.ours), "yes") for row in (*facts.advantages, *facts.helpers)]
    rows += [(one.theirs, one.ours, f"**no**: {one.why}") for one in facts.differences.values()]
    absent = f"\nNot offered here: {', '.join(map(code, facts.absent))}.\n" if facts.absent else ""
    return table((facts.trainer, "here", "same numbers?"), rows) + absent


def drawn(text: str) -> str:
    """``text`` with every section drawn anew."""
    draw = {"options": options, "parity": parity}
    return SECTION.sub(lambda found: f"{found[1]}{draw[found[2]](TRAINERS[found[3]])}{found[4]}", text)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
