"""Which backend answers a call."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

from egpo_kernels.inputs.validation import check_choice, environment, kind_of
from egpo_kernels.parallel.shard import shard_of
from egpo_kernels.parallel.sharded import Sharded

BACKENDS = ("auto", "triton", "portable", "reference")
TRITON_DEVICES = ("cuda", "xpu")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(backend: str, device: torch.device) -> str:
    """Return ``triton``, ``portable`` or ``reference``; an explicit choice is kept or refused, never replaced.

    ``auto`` takes ``EGPO_KERNELS_BACKEND`` when that is set, else triton on the devices it serves where it is
    installed, else portable.

    Raises:
        ValueError: An unknown backend, or triton on tensors it cannot run on.
        RuntimeError: Triton is asked for and not installed.
    """
    backend = check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        named = _named()
        if named is None:
            return "triton" if TRITON_INSTALLED and kind_of(device) in TRITON_DEVICES else "portable"
        backend = named
    if backend == "triton":
        if not TRITON_INSTALLED:
            raise RuntimeError("backend is 'triton' and triton is not installed; install egpo-kernels[triton]")
        if kind_of(device) not in TRITON_DEVICES and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend is 'triton' and the tensors are on {device}; they must be on a GPU, or TRITON_INTERPRET=1 "
                "set before triton is imported (slow: it interprets the kernels), or backend='portable'"
            )
    return backend


def auto_backend(device: torch.device) -> tuple[str, str]:
    """What ``auto`` takes on ``device``, and why.

    Raises:
        ValueError: ``EGPO_KERNELS_BACKEND`` is no backend.
    """
    backend = choose_backend("auto", device)
    if _named() is not None:
        return backend, "EGPO_KERNELS_BACKEND says so"
    if kind_of(device) not in TRITON_DEVICES:
        return backend, f"triton's kernels run on {' and '.join(TRITON_DEVICES)} devices"
    if not TRITON_INSTALLED:
        return backend, "triton is not installed; install egpo-kernels[triton]"
    return backend, "triton is installed, and its kernels run on this device"


def _named() -> str | None:
    """The backend that ``EGPO_KERNELS_BACKEND`` names."""
    named = environment("EGPO_KERNELS_BACKEND")
    return named if named and check_choice("EGPO_KERNELS_BACKEND", named, BACKENDS) != "auto" else None


@functools.cache
def implementation(backend: str) -> ModuleType:
    """Return the package that implements ``portable`` or ``triton``, imported on first use."""
    return importlib.import_module(f"egpo_kernels.{backend}")


def package_of(backend: str, shard: str) -> Any:
    """A backend's package, over one rank's columns where there is a ``shard``: `egpo_kernels.parallel.shard.Shard`'s
    text, "" without.
    """
    found = shard_of(shard)
    return implementation(backend) if found is None else Sharded(implementation(backend), found)
