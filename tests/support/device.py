"""Where the tests' tensors live, and what a GPU can do that a CPU cannot.

Numbers are drawn on the CPU and moved, so that a seed means the same everywhere.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# With TRITON_INTERPRET=0 kernels are compiled and everything lives on the GPU they run on.
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"


def size(small: Any, large: Any) -> Any:
    """What a test works on: `small` where kernels are interpreted, `large` where they are compiled."""
    return large if ON_GPU else small


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """On a GPU whatever waits for the device raises; on a CPU nothing can."""
    if not ON_GPU:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says, once, that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """Capture `step` in a CUDA graph; what comes back replays it and returns its results. On a CPU, `step` itself."""
    if not ON_GPU:
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def side_by_side(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results of the calls, each on a stream of its own; the first is busy when its call is made, the others are not.

    On a CPU one after the other.
    """
    if not ON_GPU:
        return [call() for call in calls]
    streams, results = [torch.cuda.Stream() for _ in calls], []
    torch.cuda.synchronize()
    for number, (stream, call) in enumerate(zip(streams, calls, strict=True)):
        with torch.cuda.stream(stream):
            if number == 0:
                torch.cuda._sleep(1_000_000_000)  # clocks, about half a second
            results.append(call())
    torch.cuda.synchronize()
    return results
