"""From times and facts to one JSON, one table: ratios, rates and memory are worked out here and nowhere else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.batches import DTYPES, Case
from benchmarks.machine import headline
from benchmarks.providers import GEMMS
from benchmarks.rivals import PACKAGES
from benchmarks.tables import table
from benchmarks.workloads import HIDDEN, ROLLOUTS, SAMPLED, WORKLOADS, size
from egpo_kernels.command.info import version

Report = dict[str, Any]
COLUMNS = ["provider", "median (quartiles)", "eager / this", "bandwidth (of copy)", "peak memory", "error"]
RATES = {"bytes": COLUMNS[3], "FLOPs": "time / bare GEMMs (rate)"}
BASELINE = "eager"


def make_report(
    machine: dict[str, Any], copy: float, facts: dict[tuple[Case, str], dict[str, Any]], last: Sequence[str] = ()
) -> Report:
    """What is written as JSON: one record for each case and provider that was timed or refused, so far."""
    results = [
        _record(case, name, found, facts, copy)
        for (case, name), found in facts.items()
        if found["refused"] is not None or found.get("seconds")
    ]
    versions = {package: version(package) or "not installed" for package in PACKAGES}
    return {"machine": machine, "rivals": versions, "copy_bandwidth": copy, "last": list(last), "results": results}


def _record(case: Case, name: str, found: dict[str, Any], facts: dict[Any, Any], copy: float) -> dict[str, Any]:
    workload = WORKLOADS[case.workload]
    record = case._asdict() | {"provider": name, "family": found["family"], "refused": found["refused"]}
    if found["refused"] is not None:
        return record
    low, seconds, high = np.quantile(found["seconds"], (0.25, 0.5, 0.75)).tolist()
    record |= {
        "seconds": {"median": seconds, "lower_quartile": low, "upper_quartile": high, "rounds": len(found["seconds"])},
        "error": found["error"],
        "wrong": found["wrong"],
        "peak_bytes": found.get("peak_bytes"),
        "logits_bytes": None if workload.given == ROLLOUTS else case.tokens * case.vocab * DTYPES[case.dtype].itemsize,
    }
    eager, gemms = (_median(facts.get((case, bar), {})) for bar in (BASELINE, GEMMS))
    if eager is not None:
        record["times_eager"] = eager / seconds
    cost = workload.cost(case)
    if _unit(case) == "bytes":
        rates = {"bandwidth": cost / seconds, "of_copy_bandwidth": cost / seconds / copy}
        return record | {"bytes": {"moved": cost, "formula": workload.formula}} | rates
    rates = {"flops_per_second": cost / seconds, "over_gemms": None if gemms is None else seconds / gemms}
    return record | {"flops": {"needed": cost, "formula": workload.formula}} | rates


def _median(found: dict[str, Any]) -> float | None:
    return float(np.median(found["seconds"])) if found.get("seconds") else None


def _unit(case: Case) -> str:
    return "FLOPs" if WORKLOADS[case.workload].given == HIDDEN else "bytes"


def cases_of(report: Report, leading: bool = False) -> list[Case]:
    """The cases of a report, or the largest batch of each workload and dtype."""
    found = list(dict.fromkeys(case_of(one) for one in report["results"]))
    if leading:
        first = {(case.workload, case.dtype): case for case in reversed(found)}
        found = list(reversed(first.values()))
    return found


def case_of(one: dict[str, Any]) -> Case:
    """What a record is about; older ones say nothing of hidden states."""
    return Case(**{field: one[field] for field in Case._fields if field in one})


def _cells(one: dict[str, Any]) -> list[str]:
    if one["refused"] is not None:
        return [one["provider"], one["refused"], *[""] * (len(COLUMNS) - 2)]
    median, low, high = (duration(one["seconds"][name]) for name in ("median", "lower_quartile", "upper_quartile"))
    return [
        one["provider"],
        f"{median} ({low} to {high})",
        f"{one['times_eager']:.2f}" if "times_eager" in one else "",
        _rate(one),
        "" if one["peak_bytes"] is None else _memory(one),
        "not compared" if one["error"] is None else f"{one['error']:.1e}" + (" FAR OFF" if one["wrong"] else ""),
    ]


def _rate(one: dict[str, Any]) -> str:
    if "bandwidth" in one:
        return f"{one['bandwidth'] / 1e9:.3g} GB/s ({one['of_copy_bandwidth']:.0%})"
    over = "" if one["over_gemms"] is None else f"{one['over_gemms']:.2f} "
    factor, unit = (1e12, "TFLOP/s") if one["flops_per_second"] >= 1e12 else (1e9, "GFLOP/s")
    return f"{over}({one['flops_per_second'] / factor:.3g} {unit})"


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
LINEAR_NOTES = """\
*Bare GEMMs* are the products that any implementation needs (in each heading), of whole matrices and into memory that is
there already, without a loss: *time / bare GEMMs* is what a loss costs, 1 being nothing; rates count those products'
FLOPs alone. Errors are those of loss and whole gradients; where logits are 16-bit, rounding them explains more.
"""


def notes(report: Report) -> str:
    """How to read the table."""
    counts = {one["seconds"]["rounds"] for one in report["results"] if one["refused"] is None} or {0}
    rounds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    linear = LINEAR_NOTES if any(_unit(case) == "FLOPs" for case in cases_of(report)) else ""
    versions = ", ".join(f"{package} {found}" for package, found in report["rivals"].items())
    # Older reports do not say.
    names = [name for name in report.get("last", ()) if any(one["family"] == name for one in report["results"])]
    last = f"Measured after all others, in rounds of their own: {', '.join(names)}.\n" if names else ""
    return (
        f"Rivals: {versions}.\n\n"
        + NOTES.format(rounds=rounds, copy=report["copy_bandwidth"] / 1e9, sampled=SAMPLED)
        + linear
        + last
    )


def markdown(report: Report) -> str:
    """The whole report."""
    return f"# Benchmarks\n\n{headline(report['machine'])}\n\n{notes(report)}\n{tables(report)}"


def tables(report: Report, leading: bool = False) -> str:
    """Heading and table of each case, or of those that a reader wants first."""
    parts = []
    for case in cases_of(report, leading):
        workload, unit = WORKLOADS[case.workload], _unit(case)
        heading = f"{case.workload}: {workload.title}, {size(case)}; {unit}: {workload.formula}"
        head = [RATES[unit] if name == RATES["bytes"] else name for name in COLUMNS]
        rows = [_cells(one) for one in report["results"] if case_of(one) == case]
        parts.append(f"**{heading}**\n\n{table(head, rows)}\n\n")
    return "".join(parts)


def show(report: Report) -> None:
    """The same in the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(Markdown(markdown(report)))
