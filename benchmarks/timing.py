"""Seconds and bytes: clocks, the machine's copy bandwidth, peak memory of one call."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.batches import Batch, Case
from benchmarks.providers import Provider
from benchmarks.workloads import WORKLOADS
from egpo_kernels.engine import memory as gradients

FLUSH_BYTES = 8 << 30
"""Far more than any GPU's cache; writing it is meant to outlast the host's queueing of a call's kernels behind it."""
CYCLES = 2e9
"""Of a GPU in a second, at the most."""


class Moment:
    """A point in the GPU's queue; the difference of two waits for the later and is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def timer(device: str) -> Callable[[], Any]:
    """A clock to call before and after; the difference is in seconds."""
    return Moment if device == "cuda" else time.perf_counter


class Times(NamedTuple):
    """Seconds of one call on the device and on the host, and whether the device never waited for the host."""

    device: float
    host: float
    ahead: bool


def timed_once(run: Callable[[], object], device: str, sleep: float) -> Times:
    """Time a call; a GPU sleeps for so many seconds first, so that the host is ahead of it."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        taken = time.perf_counter() - start
        return Times(taken, taken, False)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CYCLES * sleep))
    first = Moment()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    ahead = not first.event.query()
    return Times(Moment() - first, host, ahead)


def make_ready(batch: Batch, device: str) -> None:
    """Forget the last gradient; on a GPU empty the cache, and keep it busy while the host queues what is timed."""
    for leaf in batch.leaves.values():
        leaf.grad = None
    if device == "cuda":
        size = min(FLUSH_BYTES, torch.cuda.get_device_properties(device).total_memory // 16)
        torch.empty(size, dtype=torch.uint8, device=device).zero_()


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read plus written, of the best of ten copies of a tensor far larger than any cache."""
    source = torch.ones(1 << (30 if device == "cuda" else 26), dtype=torch.float32, device=device)
    target, clock = torch.zeros_like(source), timer(device)
    taken = []
    for _ in range(10):
        start = clock()
        target.copy_(source)
        taken.append(clock() - start)
    return 2 * source.nbytes / min(taken)


def peak_bytes(case: Case, provider: Provider) -> int | None:
    """Bytes one call adds to its inputs at the most; on a CPU for a process of its own, and only where Linux tells."""
    workload, reset = WORKLOADS[case.workload], Path("/proc/self/clear_refs")
    if case.device == "cpu" and not reset.exists():
        return None
    batch = workload.make(case)
    run = provider.prepare() if provider.prepare else provider.run
    run(batch)
    make_ready(batch, case.device)
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # What a first call allocates for good is not a call's, but the gradient's memory is.
    gradients.last_gradient.clear()
    gc.collect()
    # What the C library keeps of freed scratch would not be seen to be taken again (glibc).
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    # Writing 5 here sets the peak back to what is resident now (Linux, proc_pid_clear_refs).
    reset.write_text("5")
    before = _resident_bytes("VmRSS")
    run(batch)
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
