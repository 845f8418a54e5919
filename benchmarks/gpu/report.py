"""A pytest plugin for a machine that others set up: it needs no option file and no other plugin.

It writes one JSON line a test as it ends, so that a killed run has said what it knew. Where the CUDA context is lost
the process ends with the test that lost it: pytest-xdist replaces such a worker; a run without workers is started again
and goes on behind that test.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import lines
from benchmarks.gpu.ask import context_is_lost

MESSAGE_LENGTH = 2000
DETAIL_LENGTH = 4000
LOST = 86
"""Exit status of a process without a CUDA context."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write."""
    parser.addoption("--report-lines", help="file to append one JSON line a test to; without workers, to go on from")


def pytest_configure(config: pytest.Config) -> None:
    """Write in the process that hears of every test, leave in the one that runs it."""
    path = config.getoption("--report-lines")
    if path and not hasattr(config, "workerinput"):
        alone = not getattr(config.option, "numprocesses", None)
        config.pluginmanager.register(_Writer(Path(path), alone))
    config.pluginmanager.register(_Leaver())


class _Leaver:
    """Ends the process once the failure that lost the context is reported."""

    def __init__(self) -> None:
        self.lost = False

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo) -> Iterator[None]:
        yield
        self.lost |= call.excinfo is not None and context_is_lost(call.excinfo.value)

    # Around all others: the worker has sent the report, or the writer has written it.
    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self) -> Iterator[None]:
        yield
        if self.lost:
            sys.stdout.flush()
            os._exit(LOST)


class _Writer:
    def __init__(self, path: Path, alone: bool) -> None:
        self.path = path
        # Workers would not agree on what is known: each reads it when it starts.
        self.done, died = lines.known(path) if alone else (set(), [])
        self.warned: set[tuple[str, ...]] = set()
        for test in died:
            self.write(of=test, outcome="failed", seconds=0.0, message=lines.DIED)

    def write(self, **entry: Any) -> None:
        lines.append(self.path, **entry)

    @pytest.hookimpl(trylast=True)  # of those that -m chose
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self.done]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.write(selected=len(session.items) + len(self.done))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.write(selected=len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(of=report.nodeid, outcome="failed", seconds=0.0, **_why(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.write(of=report.nodeid, outcome=report.outcome, seconds=report.duration, **_why(report))

    def pytest_warning_recorded(self, warning_message: Any, nodeid: str) -> None:
        place = f"{Path(warning_message.filename).name}:{warning_message.lineno}"
        said = (warning_message.category.__name__, place, str(warning_message.message)[:MESSAGE_LENGTH])
        if said not in self.warned:
            self.warned.add(said)
            self.write(warning=said[0], place=place, message=said[2], first=nodeid)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        # All tests are deselected when the last one ended the process before.
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.done:
            session.exitstatus = pytest.ExitCode.OK
        self.write(finished=int(session.exitstatus))


def _why(report: Any) -> dict[str, str]:
    """The error, and of a failure the end of what pytest would print, which a killed run never does."""
    if report.passed:
        return {"message": ""}
    crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
    found = {"message": str(crash or report.longreprtext)[:MESSAGE_LENGTH]}
    return {**found, "detail": report.longreprtext[-DETAIL_LENGTH:]} if report.failed else found
