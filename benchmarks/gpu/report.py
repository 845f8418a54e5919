"""A pytest plugin that writes one JSON line a test as it ends, so that a killed run has said what it knew."""

import json
from pathlib import Path
from typing import Any

import pytest

MESSAGE_LENGTH = 2000
DETAIL_LENGTH = 4000
SEVERITY = ("passed", "skipped", "failed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write."""
    parser.addoption("--report-lines", help="file to append one JSON line a test to")


def pytest_configure(config: pytest.Config) -> None:
    """Write in the process that hears of every test, not in its workers."""
    path = config.getoption("--report-lines")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(path)))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def write(self, **entry: Any) -> None:
        with self.path.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.write(selected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.write(selected=len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", seconds=0.0, **_why(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, **_why(report))


def _why(report: Any) -> dict[str, str]:
    """The error, and of a failure the end of what pytest would print, which a killed run never does."""
    if report.passed:
        return {"message": ""}
    crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
    found = {"message": str(crash or report.longreprtext)[:MESSAGE_LENGTH]}
    return {**found, "detail": report.longreprtext[-DETAIL_LENGTH:]} if report.failed else found


def summary(path: Path) -> dict[str, Any]:
    """Counts, failures with their messages, skips and the slowest tests, of a report however far it got."""
    tests: dict[str, dict[str, Any]] = {}
    selected = 0
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off in the middle
        selected = max(selected, entry.get("selected", 0))
        if "test" in entry:
            known = tests.get(entry["test"], entry)
            worst = max(known, entry, key=lambda one: SEVERITY.index(one["outcome"]))
            tests[entry["test"]] = {**worst, "seconds": max(known["seconds"], entry["seconds"])}
    found = list(tests.values())
    by_time = sorted(found, key=lambda one: -one["seconds"])
    return {
        "selected": max(selected, len(found)),
        **{outcome: sum(one["outcome"] == outcome for one in found) for outcome in SEVERITY},
        "failures": [_brief(one) for one in found if one["outcome"] == "failed"],
        "skips": [_brief(one) for one in found if one["outcome"] == "skipped"],
        "slowest": [{"test": one["test"], "seconds": round(one["seconds"], 2)} for one in by_time[:10]],
        "files": _by_file(found),
    }


def _brief(one: dict[str, Any]) -> dict[str, str]:
    return {name: one[name] for name in ("test", "message", "detail") if name in one}


def _by_file(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    for one in found:
        row = files.setdefault(one["test"].partition("::")[0], {**dict.fromkeys(SEVERITY, 0), "seconds": 0.0})
        row[one["outcome"]] += 1
        row["seconds"] = round(row["seconds"] + one["seconds"], 2)
    return dict(sorted(files.items()))
