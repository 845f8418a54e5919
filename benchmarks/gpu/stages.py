"""The stages: each runs its commands inside a time limit and returns a record; what is not there is said."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import dram as counters
from benchmarks.gpu import lines
from benchmarks.gpu.plan import Plan, Record, absent, find_tool, installed, no_tool, worst
from benchmarks.gpu.tests import tests

SWEEP_SHARE = 0.5
"""Of the first stage's time, what the sweep has for certain."""


def first(plan: Plan, limit: float) -> Record:
    """What the machine is, whether values are right, what whole calls take; then the kernels' launch constants."""
    deadline = time.monotonic() + limit
    runs, said = {}, []
    for name, share in (("first", 1 - SWEEP_SHARE), ("sweep", 1.0)):
        path = plan.log(f"{name}.jsonl")
        path.unlink(missing_ok=True)
        left = deadline - limit * (1 - share) - time.monotonic()
        script = [sys.executable, "-m", f"benchmarks.gpu.{name}", plan.device, str(path)]
        # The sweep divides its time by itself.
        script += [f"{left:.0f}"] if name == "sweep" else []
        runs[name] = plan.run(name, script, left).record()
        said += lines.read(path)
    wrong = [entry for entry in said if not entry.get("right", True)]
    status = "failed" if wrong else worst([run["status"] for run in runs.values()])
    reasons = [f"{name}: {run['reason']}" for name, run in runs.items() if "reason" in run]
    reasons += [f"{len(wrong)} results are wrong"] if wrong else []
    record = {"status": status, "seconds": round(limit - (deadline - time.monotonic()), 1), "runs": runs}
    return {**record, "said": said, **({"reason": "; ".join(reasons)} if reasons else {})}


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
    return {**done.record(), "written": written}


def dram(plan: Plan, limit: float) -> Record:
    """What each kernel over logits moves to and from memory, by the GPU's own counters."""
    tool = None if plan.dry else find_tool("ncu")
    if tool is None:
        return no_tool("ncu", plan.dry)
    log = plan.log("ncu.csv")
    done = plan.run("ncu", counters.command(tool, sys.executable, str(log)), limit)
    text = log.read_text(errors="replace") if log.is_file() else done.log.read_text(errors="replace")
    launches = counters.parse(text)
    if not launches:
        return {**done.record(), "status": "absent", "reason": f"ncu counts nothing here: {counters.complaint(text)}"}
    return {**done.record(), "pass_bytes": counters.PASS_BYTES, "kernels": counters.table(launches)}


def sanitizer(plan: Plan, limit: float) -> Record:
    """Every kernel once under compute-sanitizer: accesses out of bounds; races and barriers where time is left."""
    deadline = time.monotonic() + limit
    tool = None if plan.dry else find_tool("compute-sanitizer")
    if tool is None:
        return no_tool("compute-sanitizer", plan.dry)
    script = [sys.executable, "-m", "benchmarks.gpu.every_kernel", plan.device]
    # First alone, so that the kernels are compiled and it is known that they run.
    runs = {"alone": plan.run("every_kernel", script, limit).record()}
    for name in ("memcheck", "racecheck", "synccheck"):
        left = deadline - time.monotonic()
        # The others take at least as long as the first.
        if left < runs.get("memcheck", {"seconds": 1})["seconds"]:
            runs[name] = absent(f"{max(left, 0):.0f} s were left for it")
            continue
        command = [tool, "--tool", name, "--error-exitcode", "86", *script]
        # Memory that torch's allocator keeps would not be out of bounds.
        done = plan.run(name, command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        runs[name] = {**done.record(), "said": _verdict(done.log)}
    status = worst([run["status"] for run in runs.values()])
    return {"status": status, "seconds": round(limit - (deadline - time.monotonic()), 1), "runs": runs}


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
