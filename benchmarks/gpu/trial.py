"""A share of the sweep's candidates in a process of its own: compiled, launched, held against float64.

python -m benchmarks.gpu.trial cuda trial.jsonl 3 12    # each twelfth candidate from the fourth on

A candidate may end the process (an access out of bounds does): started again, it goes on behind that one.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import egpo_kernels as ek
from benchmarks.errors import allowance, distance
from benchmarks.gpu.ask import Jobs, ask, context_is_lost
from benchmarks.gpu.candidates import CONFIG, KERNELS, Candidate, Outputs, Problem, candidates, problem_of, using
from benchmarks.gpu.lines import Entry
from egpo_kernels.config.results import Rows
from egpo_kernels.triton import launcher
from egpo_kernels.triton.launch import processors

VOCAB = {"cuda": 151936, "cpu": 1032}
EXACT_ROWS = 32
"""Rows that are float64 at a time."""


def make_problem(device: str, count: int, vocab: int) -> Problem:
    """Rows that are masked, clipped, partly -inf, whose token is -inf, and one that is nothing but -inf."""
    generator = torch.Generator(device).manual_seed(7)
    logits = (3 * torch.randn(1, count, vocab, generator=generator, device=device)).to(torch.bfloat16)
    row = torch.arange(count, device=device)
    tokens = (row * 7919 + 1) % vocab
    logits[0, row % 7 == 3, : vocab // 3] = -torch.inf
    logits[0, 5] = -torch.inf
    lost = row % 11 == 4
    logits[0, row[lost], tokens[lost]] = -torch.inf
    mask = row % 5 != 2
    log_probs = ek.token_log_probs(logits, tokens[None], backend="portable").log_probs[0]
    # Half a nat is beyond either bound.
    old = log_probs.nan_to_num(neginf=-9.0) + 0.5 * (row % 3 - 1)
    advantages = torch.where(row % 2 == 0, 1.3, -0.7)
    upstream = torch.randn(count, generator=generator, device=device)
    rows = Rows(mask, tokens, None, advantages, torch.ones(count, device=device), old)
    return problem_of(logits, rows, upstream)


def exact(problem: Problem) -> Outputs:
    """All outputs of all kernels in float64, by the reference, some rows at a time."""
    parts: list[list[Tensor]] = []
    fields = (problem.logits[0], problem.rows.tokens, problem.rows.mask, problem.rows.advantages)
    fields += (problem.rows.old_log_probs, problem.upstream)
    for part in zip(*(field.split(EXACT_ROWS) for field in fields), strict=True):
        logits, tokens, mask, advantages, old, upstream = (field[None] for field in part)
        leaf, other = (logits.double().requires_grad_() for _ in range(2))
        given = {"old_log_probs": old.double(), "config": CONFIG, "backend": "reference"}
        ek.logits_policy_loss(leaf, tokens, advantages.double(), mask, **given).loss.backward()
        found = ek.token_log_probs(other, tokens, mask=mask, return_entropy=True, backend="reference")
        found.log_probs.backward(upstream.double())
        whole = (found.log_probs.detach(), found.entropy.detach(), leaf.grad, other.grad)
        parts.append([field[0] for field in whole])
    names = ("log_probs", "entropy", "loss gradient", "gradient")
    return dict(zip(names, (torch.cat(field) for field in zip(*parts, strict=True)), strict=True))


def complaint(found: Outputs, truth: Outputs, mask: Tensor) -> str | None:
    """What is wrong with outputs, None where nothing is."""
    for name, value in found.items():
        wanted = truth[name]
        special = ~wanted.isfinite()
        if not torch.equal(value[special].double().nan_to_num(1.0), wanted[special].nan_to_num(1.0)):
            return f"{name}: not -inf or NaN where the reference is"
        if (value[~mask] != 0).any():
            return f"{name}: not 0 outside the mask"
        error = distance(torch.where(special, 0, value), torch.where(special, 0.0, wanted)).item()
        if not error <= allowance(value.dtype):
            return f"{name}: off by {error:.1e} of the largest value, more than {allowance(value.dtype):.1e}"
    return None


def tried(candidate: Candidate, problem: Problem, truth: Outputs) -> str | None:
    """Run a candidate out of place and in place: what is wrong, None where nothing is."""
    kernel = KERNELS[candidate.kernel]
    out = torch.full_like(problem.logits, 7.0)
    with using(candidate):
        found = kernel.run(problem, out)
        wrong = complaint(found, truth, problem.rows.mask)
        if wrong is None and kernel.passes == 2:
            held = problem._replace(logits=problem.logits.clone())
            kernel.run(held, held.logits)
            wrong = None if torch.equal(held.logits, out) else "in place: other bits than out of place"
    return wrong


@contextmanager
def compiled() -> Iterator[dict[str, Any]]:
    """What the last kernel launched inside occupies; nothing where kernels are interpreted."""
    usage: dict[str, Any] = {}
    run = JITFunction.run

    def watched(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(function, *args, **kwargs)
        # Not worth a candidate, should a version of Triton call them something else.
        usage.update(registers=getattr(kernel, "n_regs", None), spills=getattr(kernel, "n_spills", None))
        usage.update(shared=getattr(kernel.metadata, "shared", None))
        return kernel

    # What is remembered is not launched by Triton.
    with mock.patch.dict(launcher._known, clear=True), mock.patch.object(JITFunction, "run", watched):
        yield usage


def result(candidate: Candidate, problem: Problem, truth: Outputs) -> Entry:
    """What came of a candidate; what cannot be launched is not wrong."""
    start, error = time.monotonic(), {}
    with compiled() as usage:
        try:
            if wrong := tried(candidate, problem, truth):
                error = {"right": False, "error": wrong}
        except Exception as raised:
            if context_is_lost(raised):
                raise
            error = {"error": f"{type(raised).__name__}: {raised}"[:500]}
    known = {"kind": "built", "kernel": candidate.kernel, "constants": candidate.title, "right": True, **usage, **error}
    return {**known, "seconds": round(time.monotonic() - start, 2)}


def trials(device: str, share: int, shares: int) -> Jobs:
    """A job for each candidate of the share."""
    problem = make_problem(device, 3 * processors(torch.device(device)) + 17 if device == "cuda" else 13, VOCAB[device])
    truth = exact(problem)
    for candidate in candidates(torch.device(device), VOCAB[device])[share::shares]:
        yield candidate.title, partial(result, candidate, problem, truth)


if __name__ == "__main__":
    sys.exit(ask(trials(sys.argv[1], int(sys.argv[3]), int(sys.argv[4])), Path(sys.argv[2])))
