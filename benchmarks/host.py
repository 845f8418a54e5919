"""What a call costs the host, ours and others', without a GPU: python -m benchmarks host

Thread CPU time of a call, forward and backward, with launches stubbed, and how many kernels it launches: those that it
brings and torch's own. Writes host.json and host.md to --out.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.batches import GROUP, SEQUENCES, Batch
from benchmarks.counts.cases import PACKAGES
from benchmarks.counts.operations import operations
from benchmarks.counts.stubbed import stubbed
from benchmarks.host_calls import DTYPE, HIDDEN_SIZE, LENGTH, VOCAB, calls, make_batch
from benchmarks.host_table import markdown
from benchmarks.machine import describe
from benchmarks.providers import OURS, Provider
from benchmarks.session import reason
from benchmarks.timing import make_ready
from egpo_kernels.command.info import version

ROUNDS, WARM_UP = 300, 3


class Contender:
    """A provider on its call's inputs."""

    def __init__(self, call: str, provider: Provider, batch: Batch) -> None:
        self.call, self.provider, self.batch = call, provider, batch
        # It need not be a GPU: launches are stubbed.
        self.refused = provider.unavailable("cuda")
        self.seconds: list[float] = []
        self.launches: list[str] = []
        self.operations: list[str] = []

    def prepare(self, launched: list[str]) -> None:
        """Compile what it launches, and count its launches; only others may refuse."""
        if self.refused is not None:
            return
        try:
            for _ in range(WARM_UP):
                self.seconds_of_one()
            launched.clear()
            make_ready(self.batch, "cpu")
            self.operations = operations(lambda: self.provider.run(self.batch))
            self.launches = list(launched)
        except Exception as error:
            if self.provider.family == OURS:
                raise
            self.refused = reason(error)

    def seconds_of_one(self) -> float:
        """CPU time of this thread for one call; torch runs the backward pass of CPU tensors in it too."""
        make_ready(self.batch, "cpu")
        start = time.thread_time()
        self.provider.run(self.batch)
        return time.thread_time() - start

    def record(self) -> dict[str, Any]:
        """What is written of it."""
        found = {
            "call": self.call, "provider": self.provider.name, "family": self.provider.family, "refused": self.refused
        }  # fmt: skip
        if self.refused is not None:
            return found
        low, median, high = np.quantile(self.seconds, (0.25, 0.5, 0.75)).tolist()
        seconds = {"median": median, "lower_quartile": low, "upper_quartile": high, "rounds": len(self.seconds)}
        return found | {"seconds": seconds, "launches": self.launches, "operations": self.operations}


def measure(rounds: int) -> list[dict[str, Any]]:
    """Every contender of every call, timed in interleaved rounds with one thread and without garbage collection."""
    made = {call.workload: make_batch(call.workload) for call in calls()}
    contenders = [Contender(call.name, one, made[call.workload]) for call in calls() for one in call.providers]
    threads, shuffle = torch.get_num_threads(), random.Random(0)
    torch.set_num_threads(1)
    try:
        with stubbed() as launched:
            for one in contenders:
                one.prepare(launched)
            running = [one for one in contenders if one.refused is None]
            gc.disable()
            gc.freeze()  # a collection between rounds looks only at what calls left
            for _ in range(rounds):
                for one in shuffle.sample(running, len(running)):
                    one.seconds.append(one.seconds_of_one())
                launched.clear()
                gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
        torch.set_num_threads(threads)
    return [one.record() for one in contenders]


def make_report(rounds: int) -> dict[str, Any]:
    """What is written as JSON."""
    shape = {
        "sequences": SEQUENCES, "length": LENGTH, "vocab": VOCAB, "hidden": HIDDEN_SIZE, "dtype": DTYPE,
        "responses": 2 * GROUP,
    }  # fmt: skip
    versions = {package: version(package) or "not installed" for package in PACKAGES.values()}
    machine = describe("cpu") | {"threads": 1}
    return {"machine": machine, "rivals": versions, "shape": shape, "rounds": rounds, "results": measure(rounds)}


def main(given: Sequence[str]) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed calls of each (default {ROUNDS})")
    parser.add_argument("--out", type=Path, default=Path("benchmark-out"), help="folder (default benchmark-out)")
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    report = make_report(options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "host.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "host.md").write_text(markdown(report))
    print(markdown(report), end="")
