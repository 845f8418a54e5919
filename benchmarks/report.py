"""From times and facts to one JSON, one table: ratios, bandwidths and memory are worked out here and nowhere else."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import headline, version
from benchmarks.rivals import PACKAGES
from benchmarks.workloads import DTYPES, SAMPLED, WORKLOADS, Case, size

Report = dict[str, Any]
COLUMNS = ["provider", "median (quartiles)", "eager / this", "bandwidth (of copy)", "peak memory", "error"]
BASELINE = "eager"


def make_report(machine: dict[str, Any], copy: float, facts: dict[tuple[Case, str], dict[str, Any]]) -> Report:
    """What is written as JSON: one record for each case and provider."""
    results = [
        _record(case, name, found, facts.get((case, BASELINE), {}), copy) for (case, name), found in facts.items()
    ]
    versions = {package: version(package) or "not installed" for package in PACKAGES}
    return {"machine": machine, "rivals": versions, "copy_bandwidth": copy, "results": results}


def _record(case: Case, name: str, found: dict[str, Any], baseline: dict[str, Any], copy: float) -> dict[str, Any]:
    workload = WORKLOADS[case.workload]
    record = case._asdict() | {"provider": name, "family": found["family"], "refused": found["refused"]}
    if found["refused"] is not None:
        return record
    seconds, moved = statistics.median(found["seconds"]), workload.bytes_moved(case)
    low, high = _quartiles(found["seconds"])
    record |= {
        "seconds": {"median": seconds, "lower_quartile": low, "upper_quartile": high, "rounds": len(found["seconds"])},
        "bytes": {"moved": moved, "formula": workload.formula},
        "bandwidth": moved / seconds,
        "of_copy_bandwidth": moved / seconds / copy,
        "error": found["error"],
        "wrong": found["wrong"],
        "peak_bytes": found.get("peak_bytes"),
        "logits_bytes": case.tokens * case.vocab * DTYPES[case.dtype].itemsize if workload.of_logits else None,
    }
    if baseline.get("seconds"):
        record["times_eager"] = statistics.median(baseline["seconds"]) / seconds
    return record


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def cases_of(report: Report, leading: bool = False) -> list[Case]:
    """The cases of a report, or the largest batch of each workload and dtype."""
    found = list(dict.fromkeys(Case(*(one[field] for field in Case._fields)) for one in report["results"]))
    if leading:
        first = {(case.workload, case.dtype): case for case in reversed(found)}
        found = list(reversed(first.values()))
    return found


def section(report: Report, case: Case) -> tuple[str, list[list[str]]]:
    """A heading and the rows of one case, as text."""
    workload = WORKLOADS[case.workload]
    own = [one for one in report["results"] if all(one[field] == getattr(case, field) for field in Case._fields)]
    heading = f"{case.workload}: {workload.title}, {size(case)}; bytes: {workload.formula}"
    return heading, [_cells(one) for one in own]


def _cells(one: dict[str, Any]) -> list[str]:
    if one["refused"] is not None:
        return [one["provider"], one["refused"], *[""] * (len(COLUMNS) - 2)]
    median, low, high = (duration(one["seconds"][name]) for name in ("median", "lower_quartile", "upper_quartile"))
    return [
        one["provider"],
        f"{median} ({low} to {high})",
        f"{one['times_eager']:.2f}" if "times_eager" in one else "",
        f"{one['bandwidth'] / 1e9:.3g} GB/s ({one['of_copy_bandwidth']:.0%})",
        "" if one["peak_bytes"] is None else _memory(one),
        "not compared" if one["error"] is None else f"{one['error']:.1e}" + (" FAR OFF" if one["wrong"] else ""),
    ]


def _memory(one: dict[str, Any]) -> str:
    share = f" ({one['peak_bytes'] / one['logits_bytes']:.2f} e)" if one["logits_bytes"] else ""
    return f"{one['peak_bytes'] / 2**20:.0f} MiB{share}"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.0f} us"


NOTES = """\
Medians (and quartiles) over {rounds} interleaved rounds; ratios within this run. *Bandwidth* is the bytes that any
implementation must move (formula in each heading) over the median, and its share of this machine's plain copy,
{copy:.1f} GB/s. *Peak memory* is what one call adds to its inputs at the most; e is the size of the logits. *Error* is
the largest difference to float64 over the largest value, found before anything is timed, at the size that is timed
(of a gradient of logits, {sampled} rows); FAR OFF is more than rounding the output and summing in float32 explain.
"""


def notes(report: Report) -> str:
    """How to read the table."""
    rounds = max((one["seconds"]["rounds"] for one in report["results"] if one["refused"] is None), default=0)
    versions = ", ".join(f"{package} {found}" for package, found in report["rivals"].items())
    return f"Rivals: {versions}.\n\n" + NOTES.format(
        rounds=rounds, copy=report["copy_bandwidth"] / 1e9, sampled=SAMPLED
    )


def markdown(report: Report, heading: str = "# Benchmarks", leading: bool = False) -> str:
    """The whole report, or the cases a reader wants first."""
    parts = [f"{heading}\n\n" if heading else "", f"{headline(report['machine'])}\n\n{notes(report)}\n"]
    for case in cases_of(report, leading):
        title, rows = section(report, case)
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        parts.append(f"**{title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n")
    return "".join(parts)


def show(report: Report) -> None:
    """The same in the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(headline(report["machine"]), highlight=False)
    for case in cases_of(report):
        title, rows = section(report, case)
        drawn = Table(*COLUMNS, title=title, title_justify="left", title_style="bold")
        for row in rows:
            drawn.add_row(*row, style="bold" if row[0].startswith("egpo_kernels") else None)
        console.print(drawn)
    console.print(notes(report), highlight=False, markup=False)
