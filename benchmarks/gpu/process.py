"""A command under a time limit: what it printed is kept, and nothing of it lives on."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

Record = dict[str, Any]
SITE = ROOT / ".site"
"""Packages that `wheels` installed for these commands."""


def run(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> Record:
    """Run ``command`` at the repository's root; kill it and all its children after ``limit`` seconds.

    Returns its ``status``, "passed", "failed" or "killed", ``seconds``, and unless it passed the ``reason``.
    """
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    seconds = round(time.monotonic() - start, 1)
    if code is None:
        return {"status": "killed", "seconds": seconds, "reason": f"killed after its {limit:.0f} s"}
    if code:
        return {"status": "failed", "seconds": seconds, "reason": f"exit status {code}: {last_line(log)}"}
    return {"status": "passed", "seconds": seconds}


def last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
