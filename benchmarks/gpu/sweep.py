"""Which launch constants are fastest: each candidate held against float64, then timed beside a copy of the same bytes.

python -m benchmarks.gpu.sweep cuda sweep.jsonl trial-0.jsonl trial-1.jsonl

Candidates are compiled and checked by `trial`, which shares Triton's cache with this process; here those that are right
are timed in interleaved rounds, the best of them in place and with fewer rows too.
"""

import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import lines
from benchmarks.gpu.candidates import KERNELS, Candidate, Problem, candidates, problem_of, using
from benchmarks.gpu.trial import VOCAB
from benchmarks.timing import timed_once
from egpo_kernels.config.results import Rows

ROWS = {"cuda": (8192, 2048), "cpu": (8, 4)}
ROUNDS = {"cuda": 9, "cpu": 1}
AHEAD = 1.5e-3
"""Seconds that the GPU sleeps while the host queues what is timed."""
BEST = 8
COPY = "copy"


def make_problem(device: str, rows: int) -> Problem:
    """An on-policy batch: every row has a gradient, so that every row costs all its passes."""
    generator, vocab = torch.Generator(device).manual_seed(0), VOCAB[device]
    logits = torch.empty(1, rows, vocab, dtype=torch.bfloat16, device=device)
    for part in logits[0].split(512):
        part.copy_(3 * torch.randn(part.shape, generator=generator, device=device))
    tokens = torch.randint(vocab, (rows,), generator=generator, device=device)
    one = torch.ones(rows, device=device)
    return problem_of(logits, Rows(one.bool(), tokens, None, one, one), one)


def milliseconds(run: Callable[[], object], device: str) -> float:
    """What a call takes, on a GPU between two events with the host ahead."""
    return 1e3 * timed_once(run, device, AHEAD).device


def launcher(candidate: Candidate, problem: Problem, out: torch.Tensor) -> Callable[[], object]:
    """A call of a candidate."""

    def run() -> object:
        with using(candidate):
            return KERNELS[candidate.kernel].run(problem, out)

    return run


def timed(runs: dict[Any, Callable[[], object]], device: str) -> dict[Any, float]:
    """Median milliseconds of each, in rounds of another order each time; the first call of each is not counted."""
    for run in runs.values():
        run()
    shuffle, taken = random.Random(0), {name: [] for name in runs}
    for _ in range(ROUNDS[device]):
        for name in shuffle.sample(list(runs), len(runs)):
            taken[name].append(milliseconds(runs[name], device))
    return {name: statistics.median(times) for name, times in taken.items()}


def ranked(found: dict[Any, float], problem: Problem, built: dict[Candidate, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table, for each kernel the fastest first; rates are of the passes that a kernel must make."""
    copy, rows = found[COPY], []
    order = list(KERNELS)
    for candidate in sorted(built, key=lambda one: (order.index(one.kernel), found[one])):
        moved, ms = KERNELS[candidate.kernel].passes * problem.logits.nbytes, found[candidate]
        used = {name: built[candidate].get(name, "") for name in ("registers", "spills", "shared")}
        speed = {"ms": round(ms, 4), "GB/s": round(moved / ms / 1e6, 4)}
        share = f"{100 * moved / ms * copy / (2 * problem.logits.nbytes):.1f} %"
        rows.append({"kernel": candidate.kernel, **candidate.constants._asdict(), **speed, "of copy": share, **used})
    return rows


def main(device: str, path: Path, trials: list[Path]) -> None:
    """Time and rank what the trials built; each written as soon as it is known."""
    every = {(one.kernel, one.title): one for one in candidates(torch.device(device), VOCAB[device])}
    entries = [entry for log in trials for entry in lines.read(log) if "of" in entry]
    right = [entry for entry in entries if entry["kind"] == "built" and "error" not in entry]
    built = {every[entry["kernel"], entry["constants"]]: entry for entry in right}
    large, small = (make_problem(device, rows) for rows in ROWS[device])
    out, pristine = (torch.empty_like(large.logits) for _ in range(2))
    pristine.copy_(large.logits)
    runs: dict[Any, Callable[[], object]] = {one: launcher(one, large, out) for one in built}
    found = timed({COPY: lambda: out.copy_(large.logits), **runs}, device)
    rate = round(2 * large.logits.nbytes / found[COPY] / 1e6, 4)
    lines.append(path, kind="swept", tried=len(entries), candidates=len(every), **{"copy GB/s": rate})
    for row in ranked(found, large, built):
        lines.append(path, kind="ranked", **row)
    for name, kernel in KERNELS.items():
        for candidate in sorted((one for one in built if one.kernel == name), key=found.__getitem__)[:BEST]:
            row = {"kernel": name, **candidate.constants._asdict()}
            few = timed({0: launcher(candidate, small, out[:, : ROWS[device][1]])}, device)[0]
            row[f"GB/s, {ROWS[device][1]} rows"] = round(kernel.passes * small.logits.nbytes / few / 1e6, 4)
            if kernel.passes == 2:
                ms = statistics.median(in_place(candidate, large, pristine, device) for _ in range(ROUNDS[device]))
                row["GB/s, in place"] = round(2 * large.logits.nbytes / ms / 1e6, 4)
            lines.append(path, kind="best", **row)


def in_place(candidate: Candidate, problem: Problem, pristine: torch.Tensor, device: str) -> float:
    """Milliseconds of a call over logits that are whole again."""
    problem.logits.copy_(pristine)
    return milliseconds(launcher(candidate, problem, problem.logits), device)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(trial) for trial in sys.argv[3:]])
