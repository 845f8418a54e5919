"""One run: checks each provider against float64, then lets pytest-benchmark time them in interleaved rounds."""

import contextlib
import io
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.progress import Progress

from benchmarks.errors import allowance, distance
from benchmarks.providers import OURS, Provider, own_providers
from benchmarks.rivals import rivals
from benchmarks.timing import make_ready, peak_bytes, timer
from benchmarks.workloads import DTYPES, LARGEST_LOGIT, LOGITS, WORKLOADS, Batch, Case, Outputs, sampled_rows

Facts = dict[tuple[Case, str], dict[str, Any]]


class Entry(NamedTuple):
    """One call to be timed, or, with a reason, one that cannot be."""

    case: Case
    provider: Provider
    round: int
    ends_round: bool


class Session:
    """A pytest plugin: makes a test of every entry, keeps one case's inputs at a time, collects what is not a time."""

    def __init__(self, cases: list[Case], who: "Who", rounds: int, keep: Callable[[Facts], None]) -> None:
        self.facts: Facts = {}
        self.keep = keep
        self.entries = list(self._entries(cases, who, rounds))
        self.runs: dict[str, Any] = {}
        self.case: Case | None = None
        self.progress = Progress(transient=True)

    def _entries(self, cases: list[Case], who: "Who", rounds: int) -> Iterator[Entry]:
        shuffle = random.Random(0)
        for case in cases:
            providers = []
            for provider in selected(case.workload, who):
                reason = provider.unavailable(case.device)
                self.facts[case, provider.name] = {"family": provider.family, "refused": reason}
                if reason is None:
                    providers.append(provider)
            for number in range(rounds):
                # In another order each round: a provider is faster after one that left memory of the right kind.
                order = shuffle.sample(providers, len(providers))
                for provider in order:
                    yield Entry(case, provider, number, provider is order[-1])

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Every entry becomes a test of `benchmarks/rounds.py`."""
        names = [f"{'-'.join(map(str, one.case))}-{one.provider.name}-{one.round}" for one in self.entries]
        metafunc.parametrize("entry", self.entries, ids=names)

    def pytest_runtest_logfinish(self) -> None:
        """Move the bar."""
        self.progress.advance(self.progress.task_ids[0])

    @pytest.fixture
    def session(self) -> "Session":
        """This object, for the test."""
        return self

    def enter(self, case: Case) -> None:
        """Make the inputs of ``case`` and check its providers, unless it is the current one."""
        if case == self.case:
            return
        self.batch = self.spare = None
        self.case, workload = case, WORKLOADS[case.workload]
        self.progress.update(self.progress.task_ids[0], description=" ".join(map(str, case)))
        torch.compiler.reset()
        if case.device == "cuda":
            torch.cuda.empty_cache()
        self.batch = workload.make(case)
        providers = {one.provider.name: one.provider for one in self.entries if one.case == case}
        if any(provider.overwrites for provider in providers.values()):
            self.spare = self.batch.logits.detach().clone()
        truth = workload.truth(self.batch)
        for name, provider in providers.items():
            self.runs[name] = provider.prepare() if provider.prepare else provider.run
            self.facts[case, name] |= self._check(provider, truth)
        self.keep(self.facts)

    def _check(self, provider: Provider, truth: Outputs) -> dict[str, Any]:
        """A provider's error at the size that is timed, or why it refused."""
        self._ready()
        try:
            found = self.runs[provider.name](self.batch)
            return compared(found, truth, provider.outputs, self.case)
        except Exception as error:
            if provider.family == OURS:
                raise
            return {"refused": reason(error)}
        finally:
            if provider.overwrites:
                self._restore(self.batch)

    def time(self, benchmark: Any, entry: Entry) -> None:
        """One timed call; the check was the first. What is known is kept after each round."""
        self.enter(entry.case)
        try:
            self._time(benchmark, entry)
        finally:
            if entry.ends_round:
                self.keep(self.facts)

    def _time(self, benchmark: Any, entry: Entry) -> None:
        facts = self.facts[entry.case, entry.provider.name]
        if facts["refused"]:
            pytest.skip(facts["refused"])
        restore = self._restore if entry.provider.overwrites else None
        run = self.runs[entry.provider.name]
        try:
            benchmark.pedantic(run, (self.batch,), setup=self._ready, teardown=restore)
        except Exception as error:
            if entry.provider.family == OURS:
                raise
            facts["refused"] = reason(error)
        else:
            facts.setdefault("seconds", []).extend(benchmark.stats.stats.data)

    def _ready(self) -> None:
        make_ready(self.batch, self.case.device)

    def _restore(self, batch: Batch) -> None:
        batch.logits.detach().copy_(self.spare)


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
    session = Session(cases, who, rounds, keep)
    if session.entries:
        with session.progress:
            session.progress.add_task("", total=len(session.entries))
            _pytest(session, cases[0].device)
            add_peaks(session)
    return session.facts


def _pytest(session: Session, device: str) -> None:
    clock = timer(device)
    arguments = [
        str(Path(__file__).with_name("rounds.py")), "-c", os.devnull, "--rootdir", str(Path(__file__).parent), "-q",
        "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist", "--benchmark-only", "--benchmark-quiet",
        "--benchmark-disable-gc", "--no-header", "-x", "--benchmark-timer", f"{clock.__module__}.{clock.__name__}",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main(arguments, plugins=[session])
    if code != 0:
        raise RuntimeError(f"pytest-benchmark ended with {code}:\n{printed.getvalue()}")


def add_peaks(session: Session) -> None:
    """Peak memory of each provider, for the first case (the largest) of each workload and dtype."""
    session.progress.update(session.progress.task_ids[0], description="peak memory")
    session.batch = session.spare = session.case = None
    first = {(case.workload, case.dtype): case for case, _ in reversed(session.facts)}
    for (case, name), facts in session.facts.items():
        if case in first.values() and facts["refused"] is None:
            facts["peak_bytes"] = _apart(case, name) if case.device == "cpu" else _peak_of(case, name)


def _peak_of(case: Case, name: str) -> int | None:
    return peak_bytes(case, next(one for one in selected(case.workload, Who(["all"])) if one.name == name))


def _apart(case: Case, name: str) -> int | None:
    # A server that has imported torch and run nothing: what it forks starts at once and with nothing resident. Custom
    # operators import its compiler when first called.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.session", "torch._dynamo"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak_of, case, name).result()
