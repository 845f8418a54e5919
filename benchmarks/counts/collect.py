"""All counts of all cases, gathered from a process for the traffic and one for each target, two at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.counts.cases import TOKENS
from benchmarks.counts.h200 import BANDWIDTH, CLOCK, PROCESSORS, ceilings
from benchmarks.counts.launches import VOCAB
from benchmarks.counts.measure import ITEMSIZE, SMALL_PASS, SMALL_VOCAB
from benchmarks.machine import ROOT, commit
from egpo_kernels.command.info import version

LIBRARIES = ("egpo_kernels", "liger", "trl")
MAIN_TARGET = "sm_90"
SOURCES = ("egpo_kernels", "benchmarks/counts", "benchmarks/providers.py", "benchmarks/rivals.py")


def together() -> ThreadPoolExecutor:
    """Runs two processes at a time: they want a core and about a gigabyte each."""
    return ThreadPoolExecutor(max_workers=2)


def collect(targets: Sequence[str], libraries: Sequence[str], pool: ThreadPoolExecutor) -> dict[str, Any]:
    """Count everything; what cannot be counted says why under ``missing``."""
    traffic, *code = pool.map(lambda what: printed("measure", what, *libraries), ("traffic", *targets))
    cases = [merged(rows[0], dict(zip(targets, rows[1:], strict=True))) for rows in zip(traffic, *code, strict=True)]
    return {
        "versions": {name: version(name) or "not installed" for name in ("torch", "triton", "liger-kernel", "trl")},
        "commit": commit(*SOURCES),
        "shape": {"tokens": TOKENS, "traffic_vocab": SMALL_VOCAB, "code_vocab": VOCAB, "itemsize": ITEMSIZE},
        "h200": {"processors": PROCESSORS, "clock": CLOCK, "bandwidth": BANDWIDTH},
        "targets": list(targets),
        "cases": cases,
    }


def printed(module: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a module of this package prints; it interprets kernels to count traffic, else compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if "traffic" in arguments:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.counts.{module}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"benchmarks.counts.{module} {' '.join(arguments)} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def merged(traffic: dict[str, Any], code: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One case: its traffic in passes over the logits, its kernels by target, and what an element costs."""
    reasons = [part["missing"] for part in (traffic, *code.values()) if "missing" in part]
    identity = {name: traffic[name] for name in ("name", "library", "listed")}
    if reasons:
        return identity | {"missing": reasons[0]}
    case = {**traffic, "passes": passes(traffic), "targets": {target: part["kernels"] for target, part in code.items()}}
    for target, kernels in case["targets"].items():
        if [kernel["kernel"] for kernel in kernels] != traffic["launches"]:
            return identity | {"missing": f"compiled for {target} it launches other kernels than interpreted"}
    return case | per_element(case)


def passes(traffic: dict[str, Any]) -> dict[str, float]:
    """Bytes of logits and gradient as passes over the logits, their own token's element left to the third decimal."""
    parts = [part for name, part in traffic["bytes"].items() if name != "other"]
    moved = {
        "read": sum(part["loaded_once"] for part in parts),
        "read_as_issued": sum(part["loaded"] for part in parts),
        "written": sum(part["stored_once"] for part in parts),
        "written_as_issued": sum(part["stored"] for part in parts),
        "extra": traffic["extra_bytes"],
    }
    return {name: round(count / SMALL_PASS, 3) for name, count in moved.items()}


def per_element(case: dict[str, Any]) -> dict[str, Any]:
    """Sweeps over the logits on the main target, in order, and the ceilings they set together."""
    kernels = case["targets"].get(MAIN_TARGET)
    if not kernels or not any(case["over_logits"]):
        return {}
    sweeps = [
        sweep
        for kernel, counts in zip(kernels, case["over_logits"], strict=True)
        if counts
        for sweep in kernel["sweeps"]
    ]
    instructions, special = (sum(sweep[name] for sweep in sweeps) for name in ("instructions", "special"))
    moved = ITEMSIZE * (case["passes"]["read"] + case["passes"]["written"])
    found = ceilings(instructions, special, moved)._asdict()
    return {"sweeps": sweeps, "ceilings": {name: round(value, 2) for name, value in found.items()}}
