"""A command under a time limit: what it printed is kept, and nothing of it lives on."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import ROOT

SITE = ROOT / ".site"
"""Packages that `wheels` installed for these commands."""


class Finished(NamedTuple):
    """How a command ended: ``code`` is None where it was killed for taking longer than ``limit`` seconds."""

    code: int | None
    seconds: float
    limit: float
    log: Path

    @property
    def status(self) -> str:
        """``passed``, ``failed`` or ``killed``."""
        return "killed" if self.code is None else "failed" if self.code else "passed"

    def record(self) -> dict[str, object]:
        """What every step's record starts with."""
        found: dict[str, object] = {"status": self.status, "seconds": round(self.seconds, 1)}
        if self.code is None:
            found["reason"] = f"killed after its {self.limit:.0f} s"
        elif self.code:
            found["reason"] = f"exit status {self.code}: {last_line(self.log)}"
        return found


def run(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> Finished:
    """Run ``command`` at the repository's root; kill it and all its children after ``limit`` seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), *([str(SITE)] if SITE.is_dir() else [])]
    start = time.monotonic()
    with log.open("wb") as output:
        # A process group of its own, so that one signal reaches test workers and compilers too.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_group(child.pid)
            child.wait()
    return Finished(code, time.monotonic() - start, limit, log)


def kill_group(group: int) -> None:
    """Kill what is left of a process group, if anything is."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
