"""The records as Markdown.

python -m benchmarks.gpu.tables benchmarks/results/some-device    # gpu.md again, of stages copied there from elsewhere
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import gather
from benchmarks.tables import records, table

MAX_ROWS = 60


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The machine of the last stage, all stages, and what each found."""
    machine = list(found.values())[-1]["machine"]
    parts = [f"# {machine['device']}", table(("", ""), machine.items()), "## Stages"]
    whole = {name: {**it, "of": it["limit"], **it["machine"]} for name, it in found.items()}
    parts.append(runs("stage", whole, "of", "commit", "date"))
    sections = {"first": first, "tests": tests, "sanitizer": sanitizer, "bench": bench, "dram": dram}
    for name, record in found.items():
        parts += sections[name](record)
    return "\n\n".join(parts) + "\n"


def runs(what: str, found: dict[str, dict[str, Any]], *more: str) -> str:
    """How stages, or parts of one, ended, and why."""
    head = ("status", "seconds", *more)
    rows = [(name, *(it[key] for key in head), it.get("reason", "")) for name, it in found.items()]
    return table((what, *head, ""), rows)


def of_kind(record: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """What the first stage's commands said of one kind, without saying so again."""
    chosen = [entry for entry in record.get("said", []) if entry["kind"] == kind]
    left_out = {"kind"} if kind == "trouble" else {"kind", "of"}
    return [{name: value for name, value in entry.items() if name not in left_out} for entry in chosen]


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
    parts.append(runs("part", record["runs"]))
    parts.append(records([{"file": file, **row} for file, row in record["files"].items()]))
    columns = {"failures": ("test", "message"), "skips": ("test", "message")}
    columns["warnings"] = ("warning", "message", "place", "first")
    found = record | {"unfinished": [{"test": test} for test in record["unfinished"]]}
    for name in ("failures", "skips", "warnings", "unfinished", "slowest"):
        if entries := found[name]:
            head = columns.get(name, entries[0])
            rows = [[entry[key] for key in head] for entry in entries[:MAX_ROWS]]
            parts += [f"{name.capitalize()} ({len(entries)}):", table(list(head), rows)]
    return parts


def sanitizer(record: dict[str, Any]) -> list[str]:
    """What each tool said."""
    if "runs" not in record:
        return []
    said = {name: {"reason": "; ".join(it.get("said", [])), **it} for name, it in record["runs"].items()}
    return ["## compute-sanitizer", runs("tool", said)]


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
