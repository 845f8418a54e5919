"""CUDA graphs where there is no GPU: operations are recorded as a graph records kernels, and run again on the same
memory. What a call computes in Python is done once, as in a capture.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.device import ON_GPU


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Do all of it again; results go where the first ones lie."""
        with torch.no_grad():
            for function, arguments, options, results in self.calls:
                again = function(*arguments, **options)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    # Views, and what was written in place, are where they were.
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    """Keep what is called, with its results."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, results))
        return results


class Stream:
    """In place of `torch.cuda.Stream`: a CPU has one."""

    def wait_stream(self, other: "Stream") -> None:
        """Nothing is behind."""


@contextlib.contextmanager
def on_stream(_: Stream) -> Iterator[None]:
    """In place of `torch.cuda.stream`."""
    yield


def without_a_gpu(monkeypatch: Any) -> None:
    """Let code that captures CUDA graphs run on a CPU; on a GPU leave it as it is."""
    if ON_GPU:
        return
    stand_ins = {"CUDAGraph": Graph, "graph": Recorder, "Stream": Stream, "stream": on_stream, "current_stream": Stream}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
