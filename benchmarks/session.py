"""One run: checks each provider against float64, then times all of them in interleaved rounds."""

import gc
import multiprocessing
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from rich.progress import Progress

from benchmarks.batches import DTYPES, LARGEST_LOGIT, Case, Outputs
from benchmarks.errors import allowance, distance
from benchmarks.providers import OURS, Provider, own_providers
from benchmarks.rivals import rivals
from benchmarks.timing import make_ready, peak_bytes, timer
from benchmarks.workloads import LOGITS, WORKLOADS, sampled_rows

Facts = dict[tuple[Case, str], dict[str, Any]]


class Bench:
    """One case: its inputs, whole again after each call, and the providers that have not refused."""

    def __init__(self, case: Case, providers: list[Provider], facts: Facts) -> None:
        torch.compiler.reset()
        if case.device == "cuda":
            torch.cuda.empty_cache()
        self.case, self.facts, self.clock = case, facts, timer(case.device)
        for one in providers:
            facts[case, one.name] = {"family": one.family, "refused": one.unavailable(case.device)}
        self.batch = WORKLOADS[case.workload].make(case)
        overwritten = any(one.overwrites for one in self.willing(providers))
        self.pristine = self.batch.logits.detach().clone() if overwritten else None
        self.runs = {one.name: one.prepare() if one.prepare else one.run for one in self.willing(providers)}
        truth = WORKLOADS[case.workload].truth(self.batch)
        for one in self.willing(providers):
            self.call(one, truth)

    def willing(self, providers: list[Provider]) -> list[Provider]:
        """Those among them that have not refused."""
        return [one for one in providers if self.facts[self.case, one.name]["refused"] is None]

    def call(self, provider: Provider, truth: Outputs | None = None) -> None:
        """Call it once: note its error where the ``truth`` is given, else its time, or why it refused."""
        facts = self.facts[self.case, provider.name]
        gc.disable()
        try:
            make_ready(self.batch, self.case.device)
            start = self.clock()
            found = self.runs[provider.name](self.batch)
            seconds = self.clock() - start
            if truth is None:
                facts.setdefault("seconds", []).append(seconds)
            else:
                facts |= compared(found, truth, provider.outputs, self.case)
        except Exception as error:
            if provider.family == OURS:
                raise
            facts["refused"] = reason(error)
        finally:
            gc.enable()
            if provider.overwrites:
                self.batch.logits.detach().copy_(self.pristine)


class Who(NamedTuple):
    """Whom to measure: ours and the ``chosen`` families (``all`` is every one), but not those that come ``last``, or
    only those.
    """

    chosen: Sequence[str]
    last: Sequence[str] = ()
    late: bool = False


def selected(workload: str, who: Who) -> list[Provider]:
    """The providers of a workload that are measured now."""
    everyone = own_providers(workload) + rivals(workload)
    found = [one for one in everyone if one.family in (OURS, *who.chosen) or "all" in who.chosen]
    return [one for one in found if (one.family in who.last) == who.late]


def compared(found: Outputs, truth: Outputs, outputs: tuple[str, ...] | None, case: Case) -> dict[str, Any]:
    """The largest difference to float64 over the largest value, the worst output counting, and whether it is too much:
    more than rounding to the output's dtype, summing in float32 and rounding logits explain, where those are made. No
    error where nothing compares.
    """
    errors, excess, given = [], [], WORKLOADS[case.workload].given == LOGITS
    rounded_logits = LARGEST_LOGIT * torch.finfo(DTYPES[case.dtype]).eps if case.hidden else 0
    for name in truth if outputs is None else outputs:
        mine, exact = found[name].detach(), truth[name]
        mine = sampled_rows(mine) if given and name == "gradient" else mine
        if mine.shape != exact.shape:
            raise ValueError(f"{name} is {list(mine.shape)}; it must be {list(exact.shape)}")
        errors.append(distance(mine, exact))
        excess.append(errors[-1] - allowance(mine.dtype) - rounded_logits)
    if not errors:
        return {"error": None, "wrong": False}
    # A tensor's maximum is NaN where one is; Python's may not be.
    return {"error": torch.stack(errors).max().item(), "wrong": not torch.stack(excess).max().item() <= 0}


def reason(error: Exception) -> str:
    """The first line of what a provider said when it refused."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}".rstrip(": ")


def run(cases: list[Case], who: Who, rounds: int, keep: Callable[[Facts], None] = lambda facts: None) -> Facts:
    """Times, errors, peaks and refusals of every provider of every case; ``keep`` is told after each round."""
    facts: Facts = {}
    shuffle = random.Random(0)
    with Progress(transient=True) as progress:
        for case in cases:
            task = progress.add_task(" ".join(map(str, case)), total=rounds)
            providers = selected(case.workload, who)
            bench = Bench(case, providers, facts)
            keep(facts)
            for _ in range(rounds):
                try:
                    # In another order each time: a provider is faster after one that left memory of the right kind.
                    willing = bench.willing(providers)
                    for one in shuffle.sample(willing, len(willing)):
                        bench.call(one)
                finally:
                    keep(facts)
                progress.advance(task)
            # Inputs of one case at a time.
            del bench
        progress.add_task("peak memory", total=None)
        add_peaks(facts)
    return facts


def add_peaks(facts: Facts) -> None:
    """Peak memory of each provider, for the first case (the largest) of each workload and dtype."""
    first = {(case.workload, case.dtype): case for case, _ in reversed(facts)}
    for (case, name), found in facts.items():
        if case in first.values() and found["refused"] is None:
            found["peak_bytes"] = _apart(case, name) if case.device == "cpu" else _peak_of(case, name)


def _peak_of(case: Case, name: str) -> int | None:
    return peak_bytes(case, next(one for one in selected(case.workload, Who(["all"])) if one.name == name))


def _apart(case: Case, name: str) -> int | None:
    # A server that has imported torch and run nothing: what it forks starts at once and with nothing resident. Custom
    # operators import its compiler when first called.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.session", "torch._dynamo"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak_of, case, name).result()
