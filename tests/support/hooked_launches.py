"""Whom launches tell of themselves, in a process where kernels are not interpreted."""

from typing import Any
from unittest import mock

import torch
import triton

import egpo_kernels as ek
from benchmarks.counts.stubbed import Launcher, stubbed


def hooks_of_launches() -> list[list[bool]]:
    """Of calls without a hook, with one and without it again: whether each launch from memory came with it."""
    seen: list[bool] = []

    def launched(self: Launcher, *given: Any) -> None:
        seen.append(given[7] is not None and hook in given[7].calls and given[6].get()["name"] == self.name)

    def hook(metadata: Any) -> None:
        raise AssertionError("launches are stubbed")

    log_probs, found = torch.zeros(2, 4), []
    hooks = triton.knobs.runtime.launch_enter_hook
    with stubbed():
        for change in (None, None, hooks.add, hooks.remove):
            if change is not None:
                change(hook)
            with mock.patch.object(Launcher, "__call__", launched):
                ek.policy_loss(log_probs, None, torch.ones(2), backend="triton")
            found.append(list(seen))
            seen.clear()
    return found[1:]
