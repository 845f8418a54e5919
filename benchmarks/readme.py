"""Draws the README's figures from `benchmarks/results`: python -m benchmarks.readme

A section stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; nothing in it is typed by hand.
"""

import json
import re
from pathlib import Path

from benchmarks.counts import table
from benchmarks.machine import ROOT
from benchmarks.report import Report, markdown
from benchmarks.workloads import HIDDEN, WORKLOADS

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet: no GPU has run this code. `make gpu` writes what this section is drawn from.\n"
PICTURED = ("logits", "linear", "linear-frozen")


def reports(results: Path) -> list[tuple[Path, Report]]:
    """Every benchmark report under ``results``, dry runs aside."""
    found = [path for path in sorted(results.glob("*/benchmarks.json")) if not path.parent.name.endswith("-dry-run")]
    return [(path, json.loads(path.read_text())) for path in found]


def measured(results: Path, on_cpu: bool, hidden: bool | None = None) -> str:
    """The batches that lead each report from a CPU, or from GPUs: all, those from hidden states, or all others."""
    parts = []
    for path, report in reports(results):
        own = [one for one in report["results"] if hidden in (None, WORKLOADS[one["workload"]].given == HIDDEN)]
        if own and (report["machine"]["device"] == "cpu") == on_cpu:
            folder = path.parent.relative_to(results.parent.parent)
            parts.append(markdown(report | {"results": own}, heading="", leading=True))
            parts.append(f"All workloads, sizes and pictures: [{folder}]({folder}).\n\n")
            pictured = dict.fromkeys(one["workload"] for one in own if one["workload"] in PICTURED)
            parts += [f"![{path.parent.name}]({folder}/{name}.png)\n" for name in pictured]
    return "".join(parts) or NOT_MEASURED


def drawn(text: str, results: Path = RESULTS) -> str:
    """``text`` with every section of figures drawn anew."""
    figures = {
        "cpu": lambda: measured(results, on_cpu=True, hidden=False),
        "linear": lambda: measured(results, on_cpu=True, hidden=True),
        "gpu": lambda: measured(results, on_cpu=False),
        "counts": lambda: table.markdown(json.loads((results / "counts" / "counts.json").read_text())),
    }
    return SECTION.sub(lambda found: f"{found[1]}{figures[found[2]]()}{found[3]}", text)


if __name__ == "__main__":
    README.write_text(drawn(README.read_text()))
