"""Kernels are interpreted on CPU tensors; TRITON_INTERPRET=0 runs them compiled, on a machine with a GPU."""

import gc
import os

import pytest

# Before anything imports triton: @triton.jit looks at it when it decorates.
os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

from tests.support.interpreter import round_bfloat16_to_nearest
from tests.support.interpreter_speed import hurry

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    round_bfloat16_to_nearest()
    hurry()


# Here and not in pyproject.toml, so that a run without that file knows them.
MARKERS = (
    "gpu: has a meaning on a GPU too (set by itself on what walks over backends); elsewhere it runs interpreted",
    "cpu: walks over backends, but only a CPU can run it",
    "memory: takes tens of gigabytes of a GPU, which it therefore has alone",
    "timeout: a limit of pytest-timeout, for machines that lack it",
)


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known."""
    for line in MARKERS:
        config.addinivalue_line("markers", line)


# Handed out in order, so that what takes minutes does not begin last.
FIRST = ("tests/gpu/", "tests/api/test_properties.py")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever walks over backends has a GPU's word to say too, unless it is marked as a CPU's."""
    for item in items:
        walks = "backend" in getattr(getattr(item, "callspec", None), "params", {})
        if walks and item.get_closest_marker("cpu") is None:
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: [not item.nodeid.startswith(start) for start in FIRST])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a file leaves behind stays; a `gc.collect`, of which trainers do many, need not go through it."""
    if nextitem is None or nextitem.path != item.path:
        freeze()


def pytest_collection_finish() -> None:
    """The same of all that was imported and collected."""
    freeze()


def freeze() -> None:
    gc.collect()
    # A GPU's memory is not for what a failure's frames hold in a cycle.
    if INTERPRETED:
        gc.freeze()


@pytest.fixture
def values_are_checked(monkeypatch):
    """Values are looked at on a GPU too, where that costs a sync; on a CPU they always are."""
    monkeypatch.setenv("EGPO_KERNELS_DEBUG", "1")
