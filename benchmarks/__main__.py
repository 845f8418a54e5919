"""Time and peak memory of `logits_policy_loss` on this CPU, against what users write by hand, in the same run.

    python -m benchmarks                                # [512 x 151936] in float32 and bfloat16
    python -m benchmarks --tokens 128 --vocab 32000     # smaller

Times are medians of rounds in which each provider runs once, in another order each round. Memory is the peak resident
size of a process of its own, beyond the logits.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from egpo_kernels import logits_policy_loss, token_log_probs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 1 << 20


def eager(logits: Tensor, tokens: Tensor, advantages: Tensor, old_log_probs: Tensor) -> None:
    """log_softmax, gather and the clipped loss as users write them; float32 where autocast would make it so."""
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None]).mean()
    loss.backward()


def native(logits: Tensor, tokens: Tensor, advantages: Tensor, old_log_probs: Tensor) -> None:
    """As `eager`, with log_softmax in the dtype of the logits: less accurate, less memory."""
    log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].float()
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None]).mean()
    loss.backward()


def ours(logits: Tensor, tokens: Tensor, advantages: Tensor, old_log_probs: Tensor) -> None:
    """The call, with all its metrics."""
    logits_policy_loss(logits, tokens, advantages, old_log_probs=old_log_probs).loss.backward()


def ours_bare(logits: Tensor, tokens: Tensor, advantages: Tensor, old_log_probs: Tensor) -> None:
    """The call without metrics, as `eager` has none."""
    logits_policy_loss(logits, tokens, advantages, old_log_probs=old_log_probs, metrics="none").loss.backward()


def ours_inplace(logits: Tensor, tokens: Tensor, advantages: Tensor, old_log_probs: Tensor) -> None:
    """The call, the gradient written over the logits."""
    logits_policy_loss(logits, tokens, advantages, old_log_probs=old_log_probs, inplace_grad=True).loss.backward()


def eager_with_entropy(logits: Tensor, tokens: Tensor, advantages: Tensor, old_log_probs: Tensor) -> None:
    """As `eager`, and the mean entropy that trainers log."""
    eager(logits, tokens, advantages, old_log_probs)
    with torch.no_grad():
        log_probs = logits.float().log_softmax(-1)
        (log_probs.exp() * log_probs).sum(-1).mean()


Provider = Callable[[Tensor, Tensor, Tensor, Tensor], None]
PROVIDERS: dict[str, Provider] = {
    "eager": eager,
    "eager, log_softmax in dtype": native,
    "eager, with entropy": eager_with_entropy,
    "egpo_kernels": ours,
    'egpo_kernels, metrics="none"': ours_bare,
    "egpo_kernels, inplace_grad": ours_inplace,
}


def inputs(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of 8 sequences, tokens drawn from them, advantages, and old log-probs a little off."""
    generator = torch.Generator().manual_seed(0)
    sequences = 8
    logits = torch.empty(sequences, tokens // sequences, vocab, dtype=dtype)
    for row in logits:
        row.copy_(3 * torch.randn(row.shape, generator=generator))
    chosen = torch.randint(0, vocab, logits.shape[:2], generator=generator)
    advantages = torch.randn(sequences, generator=generator)
    now = token_log_probs(logits, chosen).log_probs
    old = now + 0.2 * torch.randn(now.shape, generator=generator)
    return logits.requires_grad_(), chosen, advantages, old


def times(tokens: int, vocab: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward, each provider once a round; the first round is not counted."""
    logits, *rest = inputs(tokens, vocab, dtype)
    spare, shuffle = logits.detach().clone(), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for _ in range(rounds + 1):
        # In another order each round: a provider is faster after one that left memory of the right kind.
        for name, provider in shuffle.sample(list(PROVIDERS.items()), len(PROVIDERS)):
            logits.grad = None
            start = time.perf_counter()
            provider(logits, *rest)
            seconds[name].append(time.perf_counter() - start)
            if "inplace" in name:
                logits.grad = None
                with torch.no_grad():
                    logits.copy_(spare)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def peak_bytes(tokens: int, vocab: int, dtype: str, provider: str) -> int:
    """Peak resident bytes a provider adds to the logits, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "--tokens", str(tokens), "--vocab", str(vocab)]
    done = subprocess.run([*command, "--peak", dtype, provider], check=True, capture_output=True, text=True)
    return int(done.stdout)


def print_peak(tokens: int, vocab: int, dtype: str, provider: str) -> None:
    """What the process of `peak_bytes` does: warm up on a few rows, then measure the whole."""
    arguments = inputs(tokens, vocab, DTYPES[dtype])
    PROVIDERS[provider](*inputs(8, 64, DTYPES[dtype]))
    gc.collect()
    # Writing 5 here sets the peak back to what is resident now (Linux, proc_pid_clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    PROVIDERS[provider](*arguments)
    print(resident_bytes("VmHWM") - before)


def resident_bytes(field: str) -> int:
    """Resident size of this process: now (VmRSS) or at its largest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main() -> None:
    """Measure and print; ``--out`` also writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="rows of logits, a multiple of 8 (default 512)")
    parser.add_argument("--vocab", type=int, default=151936, help="vocabulary (default 151936)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--out", help="file to write the results to, as JSON")
    parser.add_argument("--peak", nargs=2, metavar=("DTYPE", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens < 8 or options.tokens % 8 or options.vocab < 2 or options.rounds < 1:
        parser.error("--tokens must be a positive multiple of 8, --vocab at least 2, --rounds at least 1")
    if options.peak:
        print_peak(options.tokens, options.vocab, *options.peak)
        return
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"[{options.tokens} x {options.vocab}], forward + backward, {machine}")
    results = {}
    for name, dtype in DTYPES.items():
        logits_bytes = options.tokens * options.vocab * dtype.itemsize
        measured = times(options.tokens, options.vocab, dtype, options.rounds)
        print(f"\n{name}: logits {logits_bytes / MIB:.0f} MiB")
        for provider, seconds in measured.items():
            peak = peak_bytes(options.tokens, options.vocab, name, provider)
            beyond = peak - (0 if "inplace" in provider else logits_bytes)
            results[f"{name} {provider}"] = {"seconds": seconds, "peak_bytes": peak}
            ratio, share = measured["eager"] / seconds, 100 * beyond / logits_bytes
            print(f"  {provider:32} {seconds:7.3f} s {ratio:6.2f}x eager   peak {peak / MIB:4.0f} MiB", end="")
            print(f", beyond logits and gradient {share:5.1f} % of the logits")
    if options.out:
        report = {"machine": machine, "tokens": options.tokens, "vocab": options.vocab, "results": results}
        Path(options.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
