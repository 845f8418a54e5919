"""The records as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

MAX_FAILURES = 60


def markdown(found: dict[str, Any]) -> str:
    """The machine, the steps, and what each found."""
    machine, steps = found["machine"], found["steps"]
    parts = [f"# {machine['device']}", table(("", ""), machine.items()), "## Steps"]
    rows = [(name, it["status"], it["seconds"], it.get("reason", "")) for name, it in steps.items()]
    parts.append(table(("step", "status", "seconds", ""), rows))
    sections = {"tests": tests, "sanitizer": sanitizer, "bench": bench, "dram": dram}
    for name, record in steps.items():
        parts += sections[name](record)
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; what would break it is made harmless."""
    lines = [[cell(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(head), ["---"] * len(head), *lines])


def cell(value: Any) -> str:
    """One value on one line."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 300 else text[:299] + "…"


def tests(record: dict[str, Any]) -> list[str]:
    """Counts by file, failures, what was slowest."""
    if "files" not in record:
        return []
    counts = f"{record['selected']} selected: {record['passed']} passed, {record['failed']} failed, "
    parts = ["## Tests", counts + f"{record['skipped']} skipped."]
    rows = [
        (file, *(row[key] for key in ("passed", "failed", "skipped", "seconds")))
        for file, row in record["files"].items()
    ]
    parts.append(table(("file", "passed", "failed", "skipped", "seconds"), rows))
    for name in ("failures", "skips"):
        if record[name]:
            rows = [(it["test"], it["message"]) for it in record[name][:MAX_FAILURES]]
            parts += [f"{name.capitalize()} ({len(record[name])}):", table(("test", "message"), rows)]
    slowest = [(it["test"], it["seconds"]) for it in record["slowest"]]
    return [*parts, "Slowest:", table(("test", "seconds"), slowest)] if slowest else parts


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
    return ["## DRAM", unit, table(list(kernels[0]), [list(row.values()) for row in kernels])]
