"""DRAM traffic of the kernels over logits, as Nsight Compute counts it, in passes over the logits."""

import csv
from collections import defaultdict
from typing import Any

from benchmarks.gpu.logits_kernels import CASES

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
SHAPE = (8192, 151936)
PASS_BYTES = SHAPE[0] * SHAPE[1] * 2
"""One pass over the logits in bfloat16: what a kernel's traffic is divided by."""


def command(ncu: str, python: str, log: str) -> list[str]:
    """Run the kernels under ``ncu``, at the clock they really run at, and write CSV to ``log``."""
    names = "|".join(sorted({case.kernel for case in CASES}))
    options = ("--clock-control", "none", "--print-units", "base", "--csv", "--log-file", log)
    chosen = ("--metrics", ",".join(METRICS), "--kernel-name", f"regex:^({names})$")
    arguments = ("-m", "benchmarks.gpu.logits_kernels", "cuda", *map(str, SHAPE))
    return [ncu, *options, *chosen, python, *arguments]


def parse(text: str) -> list[dict[str, Any]]:
    """Launches in order, each with its kernel and its metrics, from what ``ncu --csv`` printed."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[int, dict[str, Any]] = defaultdict(dict)
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        launch = launches[int(row["ID"])]
        # Without its template and arguments, should there be any.
        launch["kernel"] = row["Kernel Name"].partition("(")[0]
        launch[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return [launches[number] for number in sorted(launches)]


def complaint(text: str) -> str:
    """Why nothing was counted: the first line in which ncu speaks of an error, else its last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("==ERROR==")]
    return (errors or lines[-1:] or ["it printed nothing"])[0]


def table(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Passes over the logits each launch read and wrote, beside those it should."""
    kernels = [launch["kernel"] for launch in launches]
    if kernels != [case.kernel for case in CASES]:
        raise ValueError(f"ncu saw {kernels}; it must see {[case.kernel for case in CASES]}")
    rows = []
    for case, launch in zip(CASES, launches, strict=True):
        read, write, nanoseconds = (launch[name] for name in METRICS)
        rows.append(
            {
                "kernel": case.kernel,
                "what": case.what,
                "read": round(read / PASS_BYTES, 3),
                "write": round(write / PASS_BYTES, 3),
                "should read": case.reads,
                "should write": case.writes,
                "ms": round(nanoseconds / 1e6, 3),
                "TB/s": round((read + write) / nanoseconds / 1e3, 3),
            }
        )
    return rows
