"""Launches as the host makes them on a GPU, on CPU tensors and without a GPU: all but the driver's own call.

    with stubbed() as launched:
        loss_and_gradient(logits)       # whosever: ours, Liger's, TRL's; autotuned or not

    launched                            # names of the kernels, in order

Triton binds arguments, looks its kernel up and compiles it the first time, for an H100 or H200; a kernel is launched
by appending its name. Results are what memory holds. Not in the time: Triton's C launcher, which packs the arguments,
and the driver. Where our library does otherwise with CPU tensors (it looks at values, which costs no sync there, and
keeps memory), it does as on a GPU.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.counts.measure import triton_on_cpu
from benchmarks.counts.offline import gpu_target
from egpo_kernels.engine import memory as gradients
from egpo_kernels.inputs import validation
from egpo_kernels.linear import chunks
from egpo_kernels.triton import launch

TARGET = "sm_90"
SHARED_MEMORY = 227 << 10
"""Bytes that a program may have of an H100's."""
THREADS = 1024
DEVICE = -1
"""No GPU's number: what Triton keeps by device is apart from what it keeps for a GPU that is there."""


class Driver(DriverBase):
    """Triton's driver of a GPU that is not there."""

    def __init__(self, launched: list[str]) -> None:
        self.launched, self.target = launched, gpu_target(TARGET)
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, THREADS),
            get_device_properties=lambda _: {"max_shared_mem": SHARED_MEMORY},
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no launcher is compiled")

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        """An autotuner's, to whom one configuration is as good as another; it takes the first."""
        return lambda call, quantiles, **_: [1.0] * len(quantiles)


class Launcher:
    """Called with a grid, a stream and the arguments; kept with its kernel, longer than one block's driver."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *_: Any) -> None:
        triton.runtime.driver.active.launched.append(self.name)


@contextlib.contextmanager
def stubbed() -> Iterator[list[str]]:
    """Let every kernel launched inside go the way it goes on a GPU; yields their names, a list that grows.

    Raises:
        RuntimeError: Kernels are interpreted in this process.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: launches are stubbed only in a process started without it")
    launched: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver(launched)))
        stack.enter_context(triton_on_cpu())
        for patch in _as_on_a_gpu():
            stack.enter_context(patch)
        yield launched


def _as_on_a_gpu() -> Iterator[Any]:
    """What is answered otherwise where a device is not a CPU."""
    yield mock.patch.object(launch, "architecture", functools.cache(lambda device: TARGET))
    yield mock.patch.object(gradients, "keeps_memory", lambda device: False)
    yield from _everywhere(validation.checks_values, lambda device: False)
    yield from _everywhere(chunks.active_rows, lambda mask, host_mask, num_active: None)
    with contextlib.suppress(ImportError):
        from trl.kernels import chunked_logprob

        yield mock.patch.object(chunked_logprob, "_use_triton", lambda device: True)


def _everywhere(function: Callable[..., Any], replacement: Callable[..., Any]) -> Iterator[Any]:
    """Patches of a function under its name, in every module of the library that has it."""
    name = function.__name__
    for module in list(sys.modules.values()):
        if module.__name__.startswith("egpo_kernels") and vars(module).get(name) is function:
            yield mock.patch.object(module, name, replacement)
