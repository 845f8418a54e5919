"""What the lines of a run of tests come to, however far it got."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import lines

SEVERITY = ("passed", "skipped", "failed")


def summary(paths: Iterable[Path]) -> dict[str, Any]:
    """Counts, failures with their messages, skips, warnings, what was still running, and the slowest tests."""
    tests: dict[str, lines.Entry] = {}
    started: dict[str, None] = {}
    warnings: dict[tuple[str, ...], lines.Entry] = {}
    selected = 0
    for path in paths:
        chosen = 0
        for entry in lines.read(path):
            chosen = max(chosen, entry.get("selected", 0))
            if "of" in entry:
                _add(tests, entry)
            elif "started" in entry:
                started[entry["started"]] = None
            elif "warning" in entry:
                warnings.setdefault((entry["warning"], entry["place"], entry["message"]), entry)
        selected += chosen
    found = list(tests.values())
    by_time = sorted(found, key=lambda one: -one["seconds"])
    return {
        "selected": max(selected, len(found)),
        **{outcome: sum(one["outcome"] == outcome for one in found) for outcome in SEVERITY},
        "failures": [_brief(one) for one in found if one["outcome"] == "failed"],
        "unfinished": [test for test in started if test not in tests],
        "skips": [_brief(one) for one in found if one["outcome"] == "skipped"],
        "warnings": list(warnings.values()),
        "slowest": [{"test": one["test"], "seconds": round(one["seconds"], 2)} for one in by_time[:10]],
        "files": _by_file(found),
    }


def _add(tests: dict[str, lines.Entry], entry: lines.Entry) -> None:
    """Set-up, call and teardown are one test, as bad as the worst and as long as the longest of them."""
    known = tests.get(entry["of"], entry)
    worst = max(known, entry, key=lambda one: SEVERITY.index(one["outcome"]))
    tests[entry["of"]] = {"test": entry["of"], **worst, "seconds": max(known["seconds"], entry["seconds"])}


def _brief(one: lines.Entry) -> dict[str, str]:
    return {name: one[name] for name in ("test", "message", "detail") if name in one}


def _by_file(found: list[lines.Entry]) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    for one in found:
        row = files.setdefault(one["test"].partition("::")[0], {**dict.fromkeys(SEVERITY, 0), "seconds": 0.0})
        row[one["outcome"]] += 1
        row["seconds"] = round(row["seconds"] + one["seconds"], 2)
    return dict(sorted(files.items()))
