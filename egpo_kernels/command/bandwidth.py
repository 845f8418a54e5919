"""What the kernels over logits move in a second, beside a plain copy on the same device in the same run."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

import egpo_kernels as ek

VOCAB = 151936
ROWS = {"cpu": 256, "gpu": 4096}
"""78 MB of logits, and 1.2 GB: neither fits a cache."""
SECONDS = 0.5
"""How long each call is timed for, at the least."""


class Rate(NamedTuple):
    """Bytes that a call must move, over the median of its times; and as a share of the copy's."""

    what: str
    on: str
    bytes_per_second: float
    of_copy: float


def rates(device: torch.device, backend: str) -> Iterator[Rate]:
    """The copy first; then log-probs (one read of the logits) and the one-pass loss (one read, one write)."""
    rows = ROWS["cpu" if device.type == "cpu" else "gpu"]
    logits = torch.randn(1, rows, VOCAB, dtype=torch.bfloat16, device=device)
    tokens = torch.arange(rows, device=device)[None]
    advantages = torch.linspace(-1, 1, rows, device=device)[None]
    on = f"[{rows}, {VOCAB}] bfloat16"
    speed = _speed(2 * logits.nbytes, partial(torch.empty_like(logits).copy_, logits))
    yield Rate("plain copy", on, speed, 1.0)

    def log_probs() -> Any:
        return ek.token_log_probs(logits, tokens, return_entropy=True, backend=backend)

    def loss() -> Any:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(ek.logits_policy_loss(leaf, tokens, advantages, backend=backend).loss, leaf)

    for what, passes, call in (("token_log_probs, entropy", 1, log_probs), ("logits_policy_loss, one pass", 2, loss)):
        own = _speed(passes * logits.nbytes, call)
        yield Rate(what, on, own, own / speed)


def _speed(nbytes: int, call: Callable[[], Any]) -> float:
    # Here: a torch with CUDA on a machine without logs a warning when it is imported.
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return nbytes / timer.blocked_autorange(min_run_time=SECONDS).median
