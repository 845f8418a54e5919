"""The stages: each runs its commands inside a time limit and returns a record; what is not there is said."""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import dram as counters
from benchmarks.gpu import lines
from benchmarks.gpu.plan import Plan, absent, combined, find_tool, installed, no_tool
from benchmarks.gpu.process import Record
from benchmarks.gpu.tests import tests

SHARE = {"first": 0.5, "trial": 0.7, "sweep": 1.0}
"""Of the time that is left to the first stage, what each of its parts may take."""
TRIAL_BYTES = 6 << 30
"""Of the GPU's memory, what a process that checks candidates may come to hold in float64."""


def first(plan: Plan, limit: float) -> Record:
    """What the machine is, whether values are right, what whole calls take; then the kernels' launch constants."""
    start, shares = time.monotonic(), trial_processes(plan.device)
    names = ["first", *(f"trial-{share}" for share in range(shares)), "sweep"]
    logs = {name: plan.log(f"{name}.jsonl") for name in names}
    for log in logs.values():
        log.unlink(missing_ok=True)

    def run(name: str) -> Record:
        module, _, share = name.partition("-")
        more = {"first": [], "trial": [share, str(shares)], "sweep": [str(logs[trial]) for trial in trials]}[module]
        script = [sys.executable, "-m", f"benchmarks.gpu.{module}", plan.device, str(logs[name]), *more]
        left = SHARE[module] * (limit - (time.monotonic() - start))
        return plan.run(name, script, left) if module == "sweep" else plan.run_on(name, script, left)

    trials = names[1:-1]
    runs = {"first": run("first")}
    with ThreadPoolExecutor(shares) as pool:
        runs |= zip(trials, pool.map(run, trials), strict=True)
    runs["sweep"] = run("sweep")
    said = [entry for log in logs.values() for entry in lines.read(log) if "kind" in entry]
    wrong = [entry for entry in said if not entry.get("right", True)]
    # Candidates that are not checked in time are given up.
    for name in trials:
        runs[name]["status"] = runs[name]["status"].replace("killed", "passed")
    return combined(runs, start, f"{len(wrong)} results are wrong" if wrong else "", said=said)


def trial_processes(device: str) -> int:
    """How many processes check candidates side by side."""
    if device == "cpu":
        return 1
    room = torch.cuda.get_device_properties(device).total_memory // TRIAL_BYTES
    return max(1, min(12, (os.cpu_count() or 2) - 2, room))


def bench(plan: Plan, limit: float) -> Record:
    """The benchmarks, which write tables and pictures of their own, as they come."""
    lacking = [name for name in ("matplotlib", "rich") if not installed(name)]
    if lacking:
        return absent(f"{', '.join(lacking)} not installed here: `make wheels` fetches what can be taken along")
    large = ["all", "--tokens", "2048,8192", "--vocab", "151936", "--linear", "8192x4096x131072"]
    small = ["logits", "--dtype", "bf16", "--tokens", "64", "--vocab", "512", "--rounds", "1"]
    # What is asked for most comes first; what compiles for seconds a case, last of all.
    last = ["torch.compile"] if plan.dry else ["cut-cross-entropy", "quack", "torch.compile"]
    who = ["--rivals", "eager,torch.compile" if plan.dry else "all", "--last", ",".join(last)]
    options = ["--device", plan.device, *who, "--out", str(plan.out)]
    command = [sys.executable, "-m", "benchmarks", *(small if plan.dry else large), *options]
    # Interpreted, so that the kernels pass through the benchmarks before they meet a GPU; nothing compiled for a CPU.
    dry = {"EGPO_KERNELS_BACKEND": "triton", "TORCH_COMPILE_DISABLE": "1"} if plan.dry else {}
    done = plan.run("bench", command, limit, **dry)
    written = sorted(path.name for path in plan.out.iterdir() if path.suffix == ".png" or "benchmarks" in path.name)
    return {**done, "written": written}


def dram(plan: Plan, limit: float) -> Record:
    """What each kernel over logits moves to and from memory, by the GPU's own counters."""
    tool = None if plan.dry else find_tool("ncu")
    if tool is None:
        return no_tool("ncu", plan.dry)
    log = plan.log("ncu.csv")
    done = plan.run("ncu", counters.command(tool, sys.executable, str(log)), limit)
    text = log.read_text(errors="replace") if log.is_file() else plan.log("ncu.txt").read_text(errors="replace")
    launches = counters.parse(text)
    if not launches:
        return {**done, "status": "absent", "reason": f"ncu counts nothing here: {counters.complaint(text)}"}
    return {**done, "pass_bytes": counters.PASS_BYTES, "kernels": counters.table(launches)}


def sanitizer(plan: Plan, limit: float) -> Record:
    """Every kernel once under compute-sanitizer: accesses out of bounds; races and barriers where time is left."""
    deadline = time.monotonic() + limit
    tool = None if plan.dry else find_tool("compute-sanitizer")
    if tool is None:
        return no_tool("compute-sanitizer", plan.dry)
    script = [sys.executable, "-m", "benchmarks.gpu.every_kernel", plan.device]
    # First alone, so that the kernels are compiled and it is known that they run.
    runs = {"alone": plan.run("every_kernel", script, limit)}
    for name in ("memcheck", "racecheck", "synccheck"):
        left = deadline - time.monotonic()
        # The others take at least as long as the first.
        if left < runs.get("memcheck", {"seconds": 1})["seconds"]:
            runs[name] = absent(f"{max(left, 0):.0f} s were left for it")
            continue
        command = [tool, "--tool", name, "--error-exitcode", "86", *script]
        # Memory that torch's allocator keeps would not be out of bounds.
        done = plan.run(name, command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        runs[name] = {**done, "said": _verdict(plan.log(f"{name}.txt"))}
    return combined(runs, deadline - limit)


def _verdict(log: Path) -> list[str]:
    """The sanitizer's first findings and its summary."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.startswith("=========")]
    return [*said[1:9], *said[-1:]] if len(said) > 9 else said


Stage = Callable[[Plan, float], Record]
STAGES: dict[str, Stage] = {"first": first, "tests": tests, "bench": bench, "dram": dram, "sanitizer": sanitizer}


def attempt(name: str, plan: Plan, limit: float) -> Record:
    """A stage's record, also where the stage itself breaks: those after it still run."""
    try:
        return STAGES[name](plan, limit)
    except Exception as error:
        return {"status": "failed", "seconds": 0.0, "reason": f"{type(error).__name__}: {error}"}


def save(name: str, record: dict[str, Any], out: Path) -> None:
    """A stage's record in a file of its own, so that stages run in several calls lie side by side."""
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def gather(out: Path) -> dict[str, dict[str, Any]]:
    """The records of all stages that a folder holds, in their order."""
    return {name: json.loads(path.read_text()) for name in STAGES if (path := out / f"{name}.json").is_file()}
