"""What launches leave in memory, and whom they tell of themselves, where kernels are not interpreted."""

from typing import Any
from unittest import mock

import torch
import triton

import egpo_kernels as ek
from benchmarks.counts.stubbed import Launcher, stubbed
from egpo_kernels.triton import launcher


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


def keys_of_calls() -> list[int]:
    """How many keys there are after each of some calls that differ in coefficients, numbers and lengths alone."""
    found = []
    with stubbed():
        launcher._known.clear()
        for number in range(1, 5):
            config = ek.PolicyLossConfig(kl_coef=0.1 * number, entropy_coef=0.01 * number, clip_high=0.2 + 0.1 * number)
            rows, length = 2 * number, 3 + number
            logits = torch.zeros(rows, length, 128, requires_grad=True)
            tokens, given = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length)
            loss = ek.logits_policy_loss(
                logits, tokens, given[:, 0], old_log_probs=given, ref_log_probs=given, config=config,
                temperature=0.5 * number, grad_scale=0.3 * number, num_tokens=7 * number, backend="triton",
            ).loss  # fmt: skip
            loss.backward()
            ek.group_advantages(number, given[:, 0].contiguous(), given, backend="triton")
            found.append(len(launcher._known))
    return found
