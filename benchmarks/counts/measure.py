"""Counts the cases in this process, a JSON line for each: interpreted, their traffic; compiled, their machine code.

TRITON_INTERPRET=1 python -m benchmarks.counts.measure traffic egpo_kernels liger
python -m benchmarks.counts.measure sm_90 egpo_kernels
"""

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.batches import Batch
from benchmarks.counts.cases import OURS, PACKAGES, RIVALS, TOKENS, Case, make_batch
from benchmarks.counts.launches import VOCAB
from benchmarks.counts.offline import Compiler
from benchmarks.counts.traffic import Launch, count_traffic
from egpo_kernels.command.info import version
from egpo_kernels.engine import dispatch
from egpo_kernels.engine import memory as gradients

# More than one block of everybody's, and not a multiple of ours.
SMALL_VOCAB = 20000
ITEMSIZE = 2
SMALL_PASS = TOKENS * SMALL_VOCAB * ITEMSIZE


def traffic_of(case: Case) -> dict[str, Any]:
    """Launches, bytes of logits, of their gradient and of everything else, and memory as large as the logits."""
    batch = make_batch(case, SMALL_VOCAB)
    gc.collect()
    memory = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    # As on a GPU: on a CPU the library keeps the gradient's memory between calls, out of the profiler's sight.
    with memory, count_traffic() as traffic, mock.patch.object(gradients, "new_gradient", torch.empty_like):
        case.run(batch)
    gradient = batch.logits.grad
    parts = {"logits": traffic.of(batch.logits)}
    if gradient is not None and gradient.data_ptr() != batch.logits.data_ptr():
        parts["gradient"] = traffic.of(gradient)
    moved = {name: part._asdict() for name, part in parts.items()}
    # Launches do not add up as bytes do: one may move several of the three.
    moved["other"] = {
        name: whole - sum(part[name] for part in moved.values()) for name, whole in traffic.total._asdict().items()
    }
    for part in moved.values():
        del part["launches"]
    return {
        "launches": [launch.kernel for launch in traffic.launches],
        "over_logits": [moves_logits(launch, batch) for launch in traffic.launches],
        "bytes": moved,
        "extra_bytes": peak_allocated(memory, SMALL_PASS // 2),
    }


def moves_logits(launch: Launch, batch: Batch) -> bool:
    """Whether a launch loads or stores the logits or their gradient; one may be given them and leave at once."""
    return any(launch.of(tensor).launches for tensor in (batch.logits, batch.logits.grad) if tensor is not None)


def peak_allocated(memory: torch.profiler.profile, piece: int = 0) -> int:
    """Most bytes alive at a time of what was allocated meanwhile in pieces of so many bytes or more."""
    events = [event for event in memory.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if abs(event.nbytes()) >= piece:
            alive = max(alive + event.nbytes(), 0)
            peak = max(peak, alive)
    return peak


def code_of(case: Case, compiler: Compiler) -> dict[str, Any]:
    """The kernels a case launches at the full vocabulary, in order."""
    compiler.launched.clear()
    with compiler.catching(), triton_on_cpu():
        case.run(make_batch(case, VOCAB))
    return {"kernels": list(compiler.launched)}


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Let this library hand CPU tensors to kernels that are only compiled."""
    with mock.patch.object(dispatch, "TRITON_DEVICES", ("cpu",)):
        yield


def counted(case: Case, compiler: Compiler | None) -> dict[str, Any]:
    """The figures of a case, or why there are none; only other libraries may fail."""
    package = PACKAGES.get(case.library)
    if package and version(package) is None:
        return {"missing": "not installed"}
    try:
        return traffic_of(case) if compiler is None else code_of(case, compiler)
    except Exception as error:
        if package is None:
            raise
        return {"missing": f"{type(error).__name__}: {error}"}


def main(what: str, *libraries: str) -> None:
    """Count ``what``, "traffic" or a target, of the cases of some libraries."""
    compiler = None if what == "traffic" else Compiler(what)
    for case in (*OURS, *RIVALS):
        if case.library in libraries:
            line = {"name": case.name, "library": case.library, "listed": case.listed, **counted(case, compiler)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
