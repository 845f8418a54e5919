"""Which tests a GPU has a word to say to, in which order, and how they run on a machine that others set up."""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.plan import Plan, absent, combined, installed
from benchmarks.gpu.process import Record
from benchmarks.gpu.summary import summary
from benchmarks.machine import ROOT

TIMEOUT = 100
"""Seconds a test may take where pytest-timeout is there."""


class Part(NamedTuple):
    """Tests that run together: those of ``paths`` that carry the ``marks``."""

    name: str
    paths: tuple[str, ...]
    marks: str
    until: float
    """The share of the stage's time at which they are stopped; what they leave passes to those after them."""
    dry: tuple[str, ...]
    """What a dry run takes instead of ``paths``, to show the way: interpreted, a test takes a second or two."""
    ignored: tuple[str, ...] = ()
    alone: bool = False
    """One test after the other, each with the whole GPU."""


# What refuses bad input does so on the host, trainers and rivals are compared on a CPU: no GPU adds to either.
HOST = ("tests/inputs/test_bad_input*", "tests/integrations", "tests/parity")
COMPILE = "tests/engine/test_compile.py"
FEW = "(one_pass and float32 and not in_place) or (500 and float32) or (triton and padded and (known or near))"
PARTS = (
    Part("memory", ("tests/gpu",), "gpu and memory", 0.35, ("tests/gpu", "-k", "rescaled and not place"), alone=True),
    Part("gpu", ("tests/gpu",), "gpu and not memory", 0.65, ("tests/gpu", "-k", FEW)),
    Part("backends", ("tests",), "gpu", 0.85, ("tests/formulas/test_surrogates.py",), ("tests/gpu", COMPILE, *HOST)),
    # Traced for seconds each: apart, so that workers share them evenly.
    Part("compile", (COMPILE,), "gpu", 1.0, (COMPILE, "-k", "in_place and portable and one_pass")),
)


def tests(plan: Plan, limit: float) -> Record:
    """The tests marked `gpu`, part by part."""
    if not installed("pytest"):
        return absent("pytest is not installed here")
    start, runs = time.monotonic(), {}
    for part in PARTS:
        _results(plan, part).unlink(missing_ok=True)
    for part in PARTS:
        left = part.until * limit - (time.monotonic() - start)
        runs[part.name] = run_part(plan, part, left) if left > 1 else absent("no time was left for it")
    found = summary(_results(plan, part) for part in PARTS)
    return combined(runs, start, f"{found['failed']} tests failed" if found["failed"] else "", **found)


def run_part(plan: Plan, part: Part, limit: float) -> Record:
    """Run a part; workers are replaced one by one, a process without them goes on behind the test that ended it."""
    name, arguments = f"tests-{part.name}", command(plan, part)
    return plan.run(name, arguments, limit) if _spread(part) else plan.run_on(name, arguments, limit)


def command(plan: Plan, part: Part) -> list[str]:
    """Pytest without the repository's options: the machine's pytest may be older and lack the plugins they are for."""
    base = ["-c", os.devnull, "--rootdir", str(ROOT), "-q", "--strict-markers", "-p", "no:cacheprovider"]
    base += ["-o", "xfail_strict=true", "--continue-on-collection-errors"]
    base += ["-p", "benchmarks.gpu.report", "--report-lines", str(_results(plan, part))]
    if installed("pytest_timeout"):
        # By its thread, which ends the process: a kernel that hangs hears no signal.
        base += ["--timeout", str(TIMEOUT), "--timeout-method", "thread"]
    if _spread(part):
        # Compiling kernels keeps a core busy each. "load" hands a lost worker's tests on, but for the one that lost it.
        workers = 2 if plan.dry else max(2, min(12, (os.cpu_count() or 2) - 2))
        base += ["-n", str(workers), "--dist", "load", "--max-worker-restart", "1000"]
    ignored = [f"--ignore-glob={ROOT / path}" for path in part.ignored]
    return [sys.executable, "-m", "pytest", *base, "-m", part.marks, *ignored, *(part.dry if plan.dry else part.paths)]


def _spread(part: Part) -> bool:
    """Whether workers share a part; without pytest-xdist one process runs it."""
    return installed("xdist") and not part.alone


def _results(plan: Plan, part: Part) -> Path:
    return plan.log(f"tests-{part.name}.jsonl")
