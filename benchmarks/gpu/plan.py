"""What all stages share: where results go, how commands are run, which tools are there."""

import importlib.util
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import lines
from benchmarks.gpu.process import Record, run

# Where CUDA and Nsight Compute put their tools when they do not put them on the path.
TOOL_FOLDERS = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/nsight-compute/*")


class Plan(NamedTuple):
    """A dry run is the same on a CPU, with the smallest sizes."""

    out: Path
    dry: bool

    @property
    def device(self) -> str:
        """Where the kernels run."""
        return "cpu" if self.dry else "cuda"

    @property
    def environment(self) -> dict[str, str]:
        """For every command: kernels interpreted in a dry run, else compiled; no compilers that outlive their stage."""
        return {"TRITON_INTERPRET": "1" if self.dry else "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> Record:
        """Run a command, its output kept as ``logs/name.txt``."""
        return run(command, limit, self.log(f"{name}.txt"), {**self.environment, **environment})

    def run_on(self, name: str, command: list[str], limit: float) -> Record:
        """As `run`, again and again where the process ended early: it goes on behind what ended it, as
        ``logs/name.jsonl`` tells.
        """
        start, number, known = time.monotonic(), 0, 0
        while True:
            done = self.run(f"{name}-{number}" if number else name, command, limit - (time.monotonic() - start))
            found = lines.read(self.log(f"{name}.jsonl"))
            # What made no headway will not the next time.
            if done["status"] != "failed" or any("finished" in entry for entry in found) or len(found) == known:
                return done | {"seconds": round(time.monotonic() - start, 1), "restarts": number}
            known, number = len(found), number + 1

    def log(self, name: str) -> Path:
        """A file in ``logs``, whose folder is there."""
        folder = self.out / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name


def find_tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit."""
    found = shutil.which(name)
    if found is None:
        places = [place for pattern in TOOL_FOLDERS for place in sorted(Path("/").glob(pattern.lstrip("/")))]
        found = next((str(place / name) for place in places if os.access(place / name, os.X_OK)), None)
    return found


def installed(module: str) -> bool:
    """Whether Python finds a module, without importing it."""
    return importlib.util.find_spec(module) is not None


def absent(reason: str) -> Record:
    """The record of a stage, or a part of one, that had nothing to run with."""
    return {"status": "absent", "seconds": 0.0, "reason": reason}


def no_tool(tool: str, dry: bool) -> Record:
    """As `absent`, of a tool that is not there, or would have no GPU to look at."""
    return absent(f"{tool} needs a GPU" if dry else f"{tool} is not installed here")


def combined(runs: dict[str, Record], start: float, wrong: str = "", **more: Any) -> Record:
    """The record of a stage of several parts: their worst status, or failed where something is ``wrong``, and why."""
    reasons = [f"{name}: {run['reason']}" for name, run in runs.items() if "reason" in run]
    reasons += [wrong] if wrong else []
    status = "failed" if wrong else worst([run["status"] for run in runs.values()])
    record = {"status": status, "seconds": round(time.monotonic() - start, 1), "runs": runs, **more}
    return {**record, "reason": "; ".join(reasons)} if reasons else record


def worst(statuses: Sequence[str]) -> str:
    """What several statuses come to."""
    return next((status for status in ("failed", "killed", "passed") if status in statuses), "absent")
