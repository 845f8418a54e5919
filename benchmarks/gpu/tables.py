"""The records as Markdown.

python -m benchmarks.gpu.tables benchmarks/results/some-device    # gpu.md again, of stages copied there from elsewhere
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import gather
from benchmarks.tables import records, table

MAX_ROWS = 60


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The machine of the last stage, all stages, and what each found."""
    machine = list(found.values())[-1]["machine"]
    parts = [f"# {machine['device']}", table(("", ""), machine.items()), "## Stages"]
    rows = []
    for name, it in found.items():
        when = (it["machine"]["commit"], it["machine"]["date"])
        rows.append((name, it["status"], it["seconds"], it["limit"], *when, it.get("reason", "")))
    parts.append(table(("stage", "status", "seconds", "of", "commit", "date", ""), rows))
    sections = {"first": first, "tests": tests, "sanitizer": sanitizer, "bench": bench, "dram": dram}
    for name, record in found.items():
        parts += sections[name](record)
    return "\n\n".join(parts) + "\n"


def of_kind(record: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """What the first stage's commands said of one kind, without saying so again."""
    chosen = [entry for entry in record.get("said", []) if entry["kind"] == kind]
    return [{name: value for name, value in entry.items() if name != "kind"} for entry in chosen]


HEADINGS = {
    "facts": "The machine:",
    "copy": "A plain copy, read and written bytes counted:",
    "trouble": "What could not be answered:",
    "value": "Against float64, the worst number of each, and what the accuracy rule allows there:",
    "call": "Whole calls; passes are what any implementation must move, launches those of one call:",
    "launches": "Launches of one call; small are those that take less than a tenth of the longest:",
    "built": "Launch constants that no kernel could have, or that gave wrong values:",
    "swept": "Launch constants that were tried:",
    "ranked": "Of each kernel the fastest first; rates are of the passes it must make:",
    "best": "The fastest elsewhere:",
}


def first(record: dict[str, Any]) -> list[str]:
    """The machine, values, calls, and the sweep's ranking."""
    parts = ["## First"]
    for kind, heading in HEADINGS.items():
        entries = of_kind(record, kind)
        if kind == "facts":
            entries = [{"": name, "is": value} for entry in entries for name, value in entry.items()]
        if kind == "launches":
            # What each kernel takes fills a page: it is in first.json.
            entries = [{name: value for name, value in entry.items() if name != "each"} for entry in entries]
        if kind == "call" and (copied := of_kind(record, "copy")):
            entries = [{**entry, "of copy": f"{entry['GB/s'] / copied[0]['GB/s']:.1%}"} for entry in entries]
        if kind == "built":
            entries = [entry for entry in entries if "error" in entry]
        if entries:
            parts += [heading, records(entries)]
    return parts


def tests(record: dict[str, Any]) -> list[str]:
    """Counts by file, failures, warnings, what was slowest."""
    if "files" not in record:
        return []
    counts = f"{record['selected']} selected: {record['passed']} passed, {record['failed']} failed, "
    parts = ["## Tests", counts + f"{record['skipped']} skipped, {len(record['unfinished'])} unfinished."]
    rows = [(name, it["status"], it["seconds"], it.get("reason", "")) for name, it in record["runs"].items()]
    parts.append(table(("part", "status", "seconds", ""), rows))
    columns = ("passed", "failed", "skipped", "seconds")
    rows = [(file, *(row[key] for key in columns)) for file, row in record["files"].items()]
    parts.append(table(("file", *columns), rows))
    for name in ("failures", "skips"):
        rows = [(it["test"], it["message"]) for it in record[name]]
        parts += listed(name, ("test", "message"), rows)
    rows = [(it["warning"], it["message"], it["place"], it["first"]) for it in record["warnings"]]
    parts += listed("warnings", ("", "message", "place", "first in"), rows)
    parts += listed("unfinished", ("test",), [(test,) for test in record["unfinished"]])
    slowest = [(it["test"], it["seconds"]) for it in record["slowest"]]
    return [*parts, "Slowest:", table(("test", "seconds"), slowest)] if slowest else parts


def listed(name: str, head: Sequence[str], rows: list[tuple[Any, ...]]) -> list[str]:
    """A heading with their number, and the first of them; nothing where there are none."""
    return [f"{name.capitalize()} ({len(rows)}):", table(head, rows[:MAX_ROWS])] if rows else []


def sanitizer(record: dict[str, Any]) -> list[str]:
    """What each tool said."""
    if "runs" not in record:
        return []
    runs = record["runs"].items()
    rows = [(name, it["status"], it["seconds"], it.get("reason") or "; ".join(it.get("said", []))) for name, it in runs]
    return ["## compute-sanitizer", table(("tool", "status", "seconds", "said"), rows)]


def bench(record: dict[str, Any]) -> list[str]:
    """Where its own tables and pictures are."""
    names = record.get("written", [])
    links = [f"![{name}]({name})" if name.endswith(".png") else f"[{name}]({name})" for name in names]
    return ["## Benchmarks", *links] if links else []


def dram(record: dict[str, Any]) -> list[str]:
    """Passes over the logits, counted and expected."""
    kernels = record.get("kernels")
    if not kernels:
        return []
    unit = f"DRAM traffic in passes over the logits ({record['pass_bytes']} bytes):"
    return ["## DRAM", unit, records(kernels)]


if __name__ == "__main__":
    results = Path(sys.argv[1])
    (results / "gpu.md").write_text(markdown(gather(results)))
