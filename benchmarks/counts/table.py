"""The counts as a Markdown table."""

from collections.abc import Callable
from typing import Any

from benchmarks.counts.collect import MAIN_TARGET

NAMES = {"egpo_kernels": "egpo_kernels", "liger": "Liger", "trl": "TRL"}
COLUMNS = (
    "", "launches (over logits)", "e read", "as issued", "e written", "extra e", "registers", "spills", "load width",
    "instructions", "barriers, shuffles", "KiB in flight", "MUFU", "issue ceiling", "MUFU ceiling", "memory ceiling",
)  # fmt: skip
NONE = "-"
NOTES = """\
`e` is one pass over the logits `[N, V]`. Triton launches, in brackets those that touch the logits or their gradient;
torch's own operations over tokens are not in them, here or there: `python -m benchmarks host` counts those. Read: what
a perfect cache leaves for memory within a launch, then as issued; extra: memory as large as the logits that is
allocated beside them. Counted at [{tokens} x {traffic_vocab}] under the interpreter.

Machine code for a vocabulary of {code_vocab}, bfloat16, temperature 1, for {target}: registers of a thread, bytes of a
load, instructions and special-function operations (MUFU) per element, a number for each sweep over the logits: of the
loop's body, so that the last, partial block of a row and what is done once a row come on top, for everybody. Every
path of a loop counts: most of the rescaling sweep is a masked path that only the end of a row takes. Barriers and
shuffles are those of an iteration. In flight: bytes asked for ahead of their use on a multiprocessor full of programs,
all the time; in brackets those of one iteration, where nothing is on its way while it is computed. Spills: bytes of
stack, the most of any kernel for {targets}.

The last three columns are ceilings of an H200, in elements a clock and multiprocessor: from instructions issued, from
special-function operations, from memory traffic; the lowest is bold. They take {processors} multiprocessors,
{gigahertz:.2f} GHz and {terabytes:.1f} TB/s.
"""


def markdown(counts: dict[str, Any]) -> str:
    """A header with versions, a row for each listed case, and what the columns mean."""
    versions = ", ".join(f"{name} {version}" for name, version in counts["versions"].items())
    h200 = counts["h200"]
    notes = NOTES.format(
        **counts["shape"], target=MAIN_TARGET, targets=", ".join(counts["targets"]), processors=h200["processors"],
        gigahertz=h200["clock"] / 1e9, terabytes=h200["bandwidth"] / 1e12,
    )  # fmt: skip
    lines = [
        f"Counted, not timed: commit {counts['commit']}; {versions}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
        *(row(case) for case in counts["cases"] if case["listed"]),
        "",
        notes,
    ]
    return "\n".join(lines)


def row(case: dict[str, Any]) -> str:
    """One case; dashes where it touches no logits."""
    name = f"{NAMES[case['library']]}: {case['name']}"
    if "missing" in case:
        cells = [case["missing"]]
    else:
        over = case["over_logits"]
        cells = [f"{len(over)} ({sum(over)})", *traffic_cells(case), *code_cells(case), *sweep_cells(case)]
    return "| " + " | ".join([name, *cells, *[NONE] * (len(COLUMNS) - 1 - len(cells))]) + " |"


def traffic_cells(case: dict[str, Any]) -> list[str]:
    """Passes over the logits."""
    names = ("read", "read_as_issued", "written", "extra")
    return [f"{case['passes'][name]:.2f}" if any(case["over_logits"]) else NONE for name in names]


def code_cells(case: dict[str, Any]) -> list[str]:
    """Registers of the kernels over logits, or of all where there are none; spills of all."""
    kernels, over = case["targets"].get(MAIN_TARGET, []), case["over_logits"]
    chosen = [kernel for kernel, counts in zip(kernels, over, strict=False) if counts or not any(over)]
    every = [kernel for kernels in case["targets"].values() for kernel in kernels]
    return [
        str(max((kernel["registers"] for kernel in chosen), default=NONE)),
        str(max((kernel["stack"] for kernel in every), default=NONE)),
    ]


def sweep_cells(case: dict[str, Any]) -> list[str]:
    """Load width, instructions and special-function operations of the sweeps, and the ceilings."""
    if "sweeps" not in case:
        return []
    sweeps, ceilings = case["sweeps"], case["ceilings"]

    def each(text: Callable[[dict[str, Any]], str]) -> str:
        return " + ".join(map(text, sweeps))

    return [
        str(min(sweep["load_width"] for sweep in sweeps)),
        each(lambda one: f"{one['instructions']:.1f}"),
        # Of an iteration.
        each(lambda one: ", ".join(f"{one[name] * one['elements']:.0f}" for name in ("barriers", "shuffles"))),
        # KiB, in brackets where only between computing.
        each(lambda one: f"{one['in_flight'] / 1024:.0f}" if one["ahead"] else f"({one['in_flight'] / 1024:.0f})"),
        each(lambda one: f"{one['special']:.1f}"),
        *(f"**{value:.1f}**" if value == min(ceilings.values()) else f"{value:.1f}" for value in ceilings.values()),
    ]
