"""What a figure was measured on: the header of every report."""

import datetime
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from egpo_kernels.command.info import version

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"


def describe(device: str) -> dict[str, str | int]:
    """Machine, driver, versions and commit, as strings and integers."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version("triton") or "not installed",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def headline(machine: dict[str, str | int]) -> str:
    """One line for tables and pictures."""
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else f", driver {machine['driver']}"
    versions = f"Python {machine['python']}, torch {machine['torch']}, triton {machine['triton']}"
    return f"{where}{threads}; {versions}; commit {machine['commit']}; {machine['date']}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit(*paths: str) -> str:
    """The last commit (that touched ``paths``, where some are given), and whether anything of it has changed since."""
    changed = answer("git", "status", "--porcelain", "--untracked-files=no", "--", *paths) != UNKNOWN
    return answer("git", "log", "-1", "--format=%h", "--", *paths) + (" with changes" if changed else "")


def answer(*command: str) -> str:
    """First line a command prints, where there is such a command and it succeeds and says something."""
    if shutil.which(command[0]) is None:
        return UNKNOWN
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else UNKNOWN
