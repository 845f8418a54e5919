"""What a result was measured on."""

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"


def describe(device: str) -> dict[str, str | int]:
    """Device, driver, versions, commit and date, as plain values for a report; ``device`` is ``cpu`` or ``cuda``."""
    on_gpu = torch.device(device).type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "driver": answer(*query) if on_gpu else "none",
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "commit": answer("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """The CPU's name as the kernel knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str:
    """Installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def answer(*command: str) -> str:
    """First line a command prints, where there is such a command and it succeeds."""
    if shutil.which(command[0]) is None:
        return UNKNOWN
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else UNKNOWN
