"""First questions to a machine: what it is, how fast it copies, whether values are right, what whole calls take.

python -m benchmarks.gpu.first cuda results.jsonl
"""

import sys
from pathlib import Path

import torch

from benchmarks.gpu.ask import Jobs, ask, guarded
from benchmarks.gpu.calls import ROWS, calls
from benchmarks.gpu.lines import Entry
from benchmarks.gpu.plan import find_tool
from benchmarks.gpu.values import values
from benchmarks.machine import answer
from benchmarks.timing import copy_bandwidth
from egpo_kernels.command.info import version

PACKAGES = (
    "torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "rich", "matplotlib",
    "transformers", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels",
)  # fmt: skip
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def machine(device: str) -> Entry:
    """What it is and what is installed on it."""
    found: Entry = {name: version(name) or "not installed" for name in PACKAGES}
    found |= {name: find_tool(name) or "not installed" for name in ("ncu", "compute-sanitizer")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["L2 MiB"] = properties.L2_cache_size >> 20
        found["memory GiB"] = properties.total_memory >> 30
        found[CLOCKS] = answer("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    return {"kind": "facts", **found}


def questions(device: str) -> Jobs:
    """Facts, the bandwidth that everything else is measured by, values, calls."""
    yield "machine", lambda: machine(device)
    yield "copy", lambda: {"kind": "copy", "GB/s": round(copy_bandwidth(device) / 1e9, 1)}
    yield from guarded("values", values(device))
    for rows in ROWS[device]:
        yield from guarded(f"calls on {rows} rows", calls(device, rows))


if __name__ == "__main__":
    sys.exit(ask(questions(sys.argv[1]), Path(sys.argv[2])))
