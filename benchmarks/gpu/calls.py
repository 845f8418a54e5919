"""Whole calls, forward and backward: time on the device, time on the host, and how many launches share it."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import egpo_kernels as ek
from benchmarks.batches import SEQUENCES, Batch, Case
from benchmarks.providers import ours_log_probs, ours_logits
from benchmarks.timing import Times, make_ready, timed_once
from benchmarks.workloads import WORKLOADS

ROWS = {"cuda": (8192, 2048), "cpu": (16,)}
VOCAB = {"cuda": 151936, "cpu": 1030}
ROUNDS = {"cuda": 20, "cpu": 2}
AHEAD = 3
"""How many times what a call takes the host the GPU is kept busy first."""
SMALL = 0.1
"""A launch is small that takes less than this share of the longest."""


class Call(NamedTuple):
    """What a user would write, and the passes over the logits that any implementation of it must make."""

    name: str
    passes: int
    run: Callable[[Batch], Any]
    overwrites: bool = False


def _of_groups(batch: Batch) -> None:
    groups = torch.arange(SEQUENCES, device=batch.mask.device) // 4
    rewards = (batch.advantages > 0).float()
    given = {"mask": batch.mask, "old_log_probs": batch.old_log_probs, "backend": "triton"}
    ek.egpo_loss(batch.logits, batch.tokens, groups, rewards, **given).loss.backward()


_loss = partial(ours_logits, backend="triton")
CALLS = (
    Call("one pass", 2, _loss()),
    Call("one pass, in place", 2, _loss(inplace_grad=True), overwrites=True),
    Call("one pass, no metrics", 2, _loss(metrics="none")),
    Call("sequence ratio", 2, _loss(config=ek.PolicyLossConfig(ratio="sequence"))),
    Call("egpo_loss", 2, _of_groups),
    Call("log-probs and entropy", 1, ours_log_probs(entropy=True, backend="triton")),
)


def calls(device: str, rows: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """For each call a job for its times, then one for its launches."""
    batch = WORKLOADS["logits"].make(Case("logits", device, "bf16", rows, VOCAB[device]))
    pristine = batch.logits.detach().clone()
    for call in CALLS:
        yield call.name, partial(timed, call, batch, pristine, device)
        yield f"launches of {call.name}", partial(counted, call, batch, device)
        batch.logits.detach().copy_(pristine)


def once(call: Call, batch: Batch, pristine: torch.Tensor, device: str, sleep: float) -> Times:
    """Time a call on whole logits, with an empty cache, while the GPU sleeps for so many seconds first."""
    if call.overwrites:
        batch.logits.detach().copy_(pristine)
    make_ready(batch, device)
    return timed_once(partial(call.run, batch), device, sleep)


def timed(call: Call, batch: Batch, pristine: torch.Tensor, device: str) -> dict[str, Any]:
    """Medians; ``first s`` has the compilers in it, ``host ahead`` is in how many rounds the GPU never waited."""
    start = time.perf_counter()
    once(call, batch, pristine, device, 0)
    compiled = time.perf_counter() - start
    sleep = AHEAD * max(once(call, batch, pristine, device, 0).host for _ in range(2))
    times = [once(call, batch, pristine, device, sleep) for _ in range(ROUNDS[device])]
    seconds = statistics.median(one.device for one in times)
    return {
        "kind": "call",
        "call": call.name,
        "rows": batch.mask.numel(),
        "ms": round(1e3 * seconds, 3),
        "passes": call.passes,
        "GB/s": round(call.passes * batch.logits.nbytes / seconds / 1e9, 4),
        "host us": round(1e6 * statistics.median(one.host for one in times), 1),
        "host ahead": f"{sum(one.ahead for one in times)} of {len(times)}",
        "first s": round(compiled, 2),
    }


def counted(call: Call, batch: Batch, device: str) -> dict[str, Any]:
    """How many launches a call is, and what the small ones among them take."""
    seen = launches(call, batch, device)
    longest = max((one["us"] / one["launches"] for one in seen), default=0.0)
    small = [one for one in seen if one["us"] / one["launches"] < SMALL * longest]
    return {
        "kind": "launches",
        "call": call.name,
        "rows": batch.mask.numel(),
        "launches": sum(one["launches"] for one in seen),
        "small": sum(one["launches"] for one in small),
        "small us": round(sum(one["us"] for one in small), 1),
        "each": [f"{one['kernel']}: {one['launches']} x, {one['us']:.1f} us" for one in seen],
    }


def launches(call: Call, batch: Batch, device: str) -> list[dict[str, Any]]:
    """What one call launches, by kernel, those that take most first; nothing on a CPU, which launches nothing."""
    for leaf in batch.leaves.values():
        leaf.grad = None
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as seen:
        call.run(batch)
        if device == "cuda":
            torch.cuda.synchronize()
    found = [one for one in seen.key_averages() if one.device_type == DeviceType.CUDA]
    rows = [{"kernel": one.key[:80], "launches": one.count, "us": one.device_time_total} for one in found]
    return sorted(rows, key=lambda one: -one["us"])
