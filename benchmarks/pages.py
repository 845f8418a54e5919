"""Draws the figures of README.md and docs/ from `benchmarks/results`: python -m benchmarks.pages

A section stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``, on whichever page; nothing in it is
typed by hand. Pictures go to `docs/benchmarks` and `docs/pictures`.
"""

import json
import re
from pathlib import Path

from benchmarks import front, host_table, ranks
from benchmarks.counts import table
from benchmarks.machine import ROOT, headline
from benchmarks.pictures import draw
from benchmarks.report import Report, notes, tables
from benchmarks.workloads import HIDDEN, WORKLOADS

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet: no GPU has run this code. `make gpu` writes what this section is drawn from.\n"


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
            name = path.parent.name
            parts.append(f"{headline(report['machine'])}\n\n{notes(report | {'results': own})}\n")
            parts.append(f"All sizes: `{path.with_suffix('.md').relative_to(results.parent.parent)}`.\n\n")
            parts += [_workload(report, name, workload) for workload in dict.fromkeys(one["workload"] for one in own)]
    return "".join(parts) or NOT_MEASURED


def _workload(report: Report, name: str, workload: str) -> str:
    """Heading, tables and pictures of one workload; `pictures` draws what is shown here."""
    title = WORKLOADS[workload].title
    own = report | {"results": [one for one in report["results"] if one["workload"] == workload]}
    shown = [(workload, f"{title}: time, rate and memory")]
    if WORKLOADS[workload].given != HIDDEN:
        shown.append((f"{workload}-scaling", f"{title}: how time scales"))
    images = "".join(f"![{text}](benchmarks/{name}/{file}.png)\n\n" for file, text in shown)
    return f"### {title[0].upper()}{title[1:]}\n\n{tables(own, leading=True)}{images}"


def on_a_cpu(results: Path) -> list[Report]:
    """What the README shows: its sentences say that no GPU was measured."""
    return [report for _, report in reports(results) if report["machine"]["device"] == "cpu"]


def drawn(text: str, results: Path = RESULTS) -> str:
    """``text`` with every section of figures drawn anew."""
    figures = {
        "summary": lambda: front.table(on_a_cpu(results), json.loads((results / "host" / "host.json").read_text())),
        "host": lambda: host_table.markdown(json.loads((results / "host" / "host.json").read_text())),
        "cpu": lambda: measured(results, on_cpu=True, hidden=False),
        "linear": lambda: measured(results, on_cpu=True, hidden=True),
        "gpu": lambda: measured(results, on_cpu=False),
        "counts": lambda: table.markdown(json.loads((results / "counts" / "counts.json").read_text())),
    }
    return SECTION.sub(lambda found: f"{found[1]}{figures[found[2]]()}{found[3]}", text)


def pictures(docs: Path, results: Path = RESULTS) -> list[Path]:
    """Every picture that a page shows, of ``results`` or of ranks, drawn below ``docs``."""
    made = front.draw(on_a_cpu(results), docs / "pictures") + ranks.draw(docs / "pictures")
    for path, report in reports(results):
        made += draw(report, docs / "benchmarks" / path.parent.name)
    return made


if __name__ == "__main__":
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        page.write_text(drawn(page.read_text()))
    pictures(DOCS)
