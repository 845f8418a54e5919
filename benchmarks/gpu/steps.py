"""The steps: each runs its commands inside a time limit and returns a record; what is not there is said, not hidden."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import dram as counters
from benchmarks.gpu import report
from benchmarks.gpu.process import Finished, run

Record = dict[str, Any]
# Where CUDA and Nsight Compute put their tools when they do not put them on the path.
TOOL_FOLDERS = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/nsight-compute/*")
# What a dry run does of the tests: interpreted, they take a second or two each.
SMALL_TESTS = ("tests/gpu", "tests/test_surrogates.py", "-k", "not packed and not float16 and not whole_groups")


class Plan(NamedTuple):
    """What all steps share. A dry run is the same on a CPU, with the smallest sizes."""

    out: Path
    dry: bool

    @property
    def device(self) -> str:
        """Where the kernels run."""
        return "cpu" if self.dry else "cuda"

    @property
    def environment(self) -> dict[str, str]:
        """For every command: kernels interpreted in a dry run, else compiled; no compilers that outlive their step."""
        return {"TRITON_INTERPRET": "1" if self.dry else "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> Finished:
        """Run a command, its output kept as ``logs/name.txt``."""
        return run(command, limit, self.out / "logs" / f"{name}.txt", {**self.environment, **environment})


def find_tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit."""
    found = shutil.which(name)
    if found is None:
        places = [place for pattern in TOOL_FOLDERS for place in sorted(Path("/").glob(pattern.lstrip("/")))]
        found = next((str(place / name) for place in places if os.access(place / name, os.X_OK)), None)
    return found


def absent(tool: str, dry: bool) -> Record:
    """The record of a step whose tool is not there, or would have no GPU to look at."""
    reason = f"{tool} needs a GPU" if dry else f"{tool} is not installed here"
    return {"status": "absent", "seconds": 0.0, "reason": reason}


def tests(plan: Plan, limit: float) -> Record:
    """The tests marked `gpu`, the small ones side by side."""
    lines = plan.out / "logs" / "tests.jsonl"
    lines.parent.mkdir(parents=True, exist_ok=True)
    # Without the set options: a machine rented for its GPU may lack the plugins they are for.
    base = ["-o", "addopts=", "-W", "ignore:Unknown config option", "--strict-markers", "-q", "-p", "no:cacheprovider"]
    base.append("--continue-on-collection-errors")
    # Compiling kernels keeps a core busy each.
    workers = 2 if plan.dry else max(2, min(12, (os.cpu_count() or 2) - 2))
    spread = ["-n", str(workers), "--dist", "loadgroup"]
    chosen = ["-m", "gpu", *(SMALL_TESTS if plan.dry else ("tests",))]
    written = ["-p", "benchmarks.gpu.report", "--report-lines", str(lines)]
    command = [sys.executable, "-m", "pytest", *base, *spread, *written, *chosen]
    return {**plan.run("tests", command, limit).record(), **report.summary(lines)}


def sanitizer(plan: Plan, limit: float) -> Record:
    """Every kernel once under compute-sanitizer: accesses out of bounds, then races in shared memory."""
    deadline = time.monotonic() + limit
    tool = None if plan.dry else find_tool("compute-sanitizer")
    if tool is None:
        return absent("compute-sanitizer", plan.dry)
    script = [sys.executable, "-m", "benchmarks.gpu.every_kernel", plan.device]
    # First alone, so that the kernels are compiled and it is known that they run.
    runs = {"alone": plan.run("every_kernel", script, limit).record()}
    for name in ("memcheck", "racecheck"):
        left = deadline - time.monotonic()
        # The second takes at least as long as the first.
        if left < runs.get("memcheck", {"seconds": 1})["seconds"]:
            runs[name] = {"status": "absent", "seconds": 0.0, "reason": f"{max(left, 0):.0f} s were left for it"}
            continue
        command = [tool, "--tool", name, "--error-exitcode", "86", *script]
        # Memory that torch's allocator keeps would not be out of bounds.
        done = plan.run(name, command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        runs[name] = {**done.record(), "said": _verdict(done.log)}
    statuses = [found["status"] for found in runs.values()]
    worst = next((status for status in ("failed", "killed") if status in statuses), "passed")
    return {"status": worst, "seconds": round(limit - (deadline - time.monotonic()), 1), "runs": runs}


def _verdict(log: Path) -> list[str]:
    """The sanitizer's first findings and its summary."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.startswith("=========")]
    return [*said[1:9], *said[-1:]] if len(said) > 9 else said


def bench(plan: Plan, limit: float) -> Record:
    """The benchmarks, which write tables and pictures of their own."""
    large = ["--tokens", "2048,8192,32768", "--linear", "8192x4096x131072"]
    small = ["--dtype", "bf16", "--tokens", "64", "--vocab", "512", "--linear", "64x32x512", "--rounds", "1"]
    options = ["--device", plan.device, *(small if plan.dry else large), "--out", str(plan.out)]
    command = [sys.executable, "-m", "benchmarks", "all", *options]
    # Interpreted, so that the kernels pass through the benchmarks before they meet a GPU.
    backend = {"EGPO_KERNELS_BACKEND": "triton"} if plan.dry else {}
    done = plan.run("bench", command, limit, **backend)
    written = sorted(path.name for path in plan.out.iterdir() if path.suffix == ".png" or "benchmarks" in path.name)
    return {**done.record(), "written": written}


def dram(plan: Plan, limit: float) -> Record:
    """What each kernel over logits moves to and from memory, by the GPU's own counters."""
    tool = None if plan.dry else find_tool("ncu")
    if tool is None:
        return absent("ncu", plan.dry)
    log = plan.out / "logs" / "ncu.csv"
    done = plan.run("ncu", counters.command(tool, sys.executable, str(log)), limit)
    text = log.read_text(errors="replace") if log.is_file() else done.log.read_text(errors="replace")
    launches = counters.parse(text)
    if not launches:
        return {**done.record(), "status": "absent", "reason": f"ncu counts nothing here: {counters.complaint(text)}"}
    return {**done.record(), "pass_bytes": counters.PASS_BYTES, "kernels": counters.table(launches)}


class Step(NamedTuple):
    """A step and the seconds it may take, in earnest and in a dry run."""

    run: Callable[[Plan, float], Record]
    seconds: float
    dry_seconds: float


STEPS = {
    "tests": Step(tests, 270, 115),
    "sanitizer": Step(sanitizer, 40, 5),
    "bench": Step(bench, 170, 45),
    "dram": Step(dram, 50, 5),
}


def limit_of(name: str, chosen: list[str], spent: float, dry: bool) -> float:
    """Seconds a step may take: all that is left, but for what the chosen steps after it are promised."""
    seconds = {key: step.dry_seconds if dry else step.seconds for key, step in STEPS.items()}
    later = list(STEPS)[list(STEPS).index(name) + 1 :]
    return sum(seconds.values()) - spent - sum(seconds[key] for key in later if key in chosen)


def attempt(name: str, plan: Plan, limit: float) -> Record:
    """A step's record, also where the step itself breaks: the steps after it still run."""
    try:
        return STEPS[name].run(plan, limit)
    except Exception as error:
        return {"status": "failed", "seconds": 0.0, "reason": f"{type(error).__name__}: {error}"}


def save(found: dict[str, Any], out: Path) -> None:
    """Everything known so far, as JSON."""
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
