"""A launch from memory goes to the very kernel that Triton would find by looking at every argument."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.counts.budgets import KERNELS
from benchmarks.machine import ROOT
from egpo_kernels.triton import launcher

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

# Places in the keys of host functions: the device, how tensors lie, and what a loss was chosen to be.
PARTS = {
    "_launched": (0, 2, 3, 4), "logits_gradient": (0, 2, 4), "_one_pass": (0, 1, 2, 3, 4),
    "_prepare": (0, 2, 3, 4, 5), "rescale_": (0, 1, 2), "token_rows": (0, 1, 2, 3, 4, 5, 6),
    "shard_statistics": (0, 2), "_launch_statistics": (0, 2, 3), "merged_shards": (0, 2, 4),
    "_sequence_counts": (0, 1, 2, 3), "sequence_uncertainty": (0, 2, 4), "group_advantages": (0, 2, 3),
}  # fmt: skip


def answered(expression):
    """What an expression of `tests.support` is, in a process where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    modules = "from tests.support.launches import *; from tests.support.launch_memory import *"
    text = f"import json; {modules}; print(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_launch_from_memory_is_the_one_that_triton_would_make():
    launched = answered("check_calls()")
    assert {kernel for kernel in launched if launched.count(kernel) >= 30} == set(KERNELS)


def test_a_key_that_misses_the_device_or_how_tensors_lie_is_noticed():
    assert answered(f"unnoticed({PARTS})") == []


def test_coefficients_and_lengths_are_in_no_key():
    """They may be others at every step: each would launch the slow way, and stay in memory."""
    first, *others = answered("keys_of_calls()")
    assert first > 3 and set(others) == {first}


def test_a_launch_from_memory_tells_hooks():
    without, hooked, after = answered("hooks_of_launches()")
    assert len(hooked) == len(without) == len(after) == 3 and all(hooked) and not any(without + after)


def test_amds_compiler_and_the_key_ask_for_the_same_of_a_tensors_memory(monkeypatch):
    backend = pytest.importorskip("triton.backends.amd.compiler").HIPBackend
    monkeypatch.setattr(launcher, "ON_AMD", True)
    # Memory that nobody touches is not there.
    whole = torch.empty(2**31, dtype=torch.uint8, device="cpu")
    tensors = (whole[:64], torch.empty(64, dtype=torch.uint8, device="cpu"))
    keys, compiled = ({function(it) for it in tensors} for function in (key_of, backend.get_tensor_specialization))
    assert len(keys) == len(compiled) == 2


def key_of(tensor):
    """How it lies."""
    return launcher.lie((tensor,))
