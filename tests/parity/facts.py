"""What a trainer's setting is called here and whether the numbers are the same: tests run it, a page shows it."""

import re
from typing import Any, NamedTuple

import egpo_kernels


class Option(NamedTuple):
    """A setting of a trainer and what stands for it here, both in Markdown."""

    theirs: str
    ours: str


class Same(NamedTuple):
    """Two lists of keyword arguments, in Python, that give the same numbers; ``only`` names the losses it goes with."""

    theirs: str
    ours: str
    only: tuple[str, ...] = ()


class Difference(NamedTuple):
    """Where the numbers are not the same, why, and what makes them the same if something does."""

    theirs: str
    ours: str
    why: str


class Facts(NamedTuple):
    """What is known about one trainer. The test that shows a difference has its key for a name, after ``test_``;
    ``absent`` are losses and advantages that we do not offer at all.
    """

    trainer: str
    options: tuple[Option, ...]
    losses: tuple[Same, ...]
    modifiers: tuple[Same, ...]
    advantages: tuple[Same, ...]
    helpers: tuple[Same, ...]
    differences: dict[str, Difference]
    absent: tuple[str, ...] = ()


def arguments(text: str, names: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that ``text`` writes down, with the library's public names and ``names`` at hand."""
    return eval(f"dict({text})", vars(egpo_kernels) | {"__builtins__": {"dict": dict, "len": len, "min": min}}, names)


def named(facts: Facts) -> set[str]:
    """Every word that stands alone in code among the trainer's own options."""
    return {word for option in facts.options for word in re.findall(r"`(\w+)`", option.theirs)}


def combinations(facts: Facts) -> list[tuple[Same, Same]]:
    """Every loss alone, and with every modifier that goes with it."""
    alone = Same("", "")
    return [
        (loss, modifier)
        for loss in facts.losses
        for modifier in (alone, *facts.modifiers)
        if not modifier.only or any(f'"{name}"' in loss.theirs for name in modifier.only)
    ]
