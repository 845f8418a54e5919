"""What the tests of the benchmarks share: a machine, small cases, times that nobody took, a provider that is wrong."""

from benchmarks.batches import Case
from benchmarks.providers import Provider, own_providers
from benchmarks.session import compared
from benchmarks.timing import make_ready
from benchmarks.workloads import HIDDEN, WORKLOADS

MACHINE = {
    "device": "cpu",
    "cpu": "abacus",
    "threads": 1,
    "python": "3",
    "torch": "2",
    "triton": "3",
    "commit": "c",
    "date": "d",
}
CASE = Case("logits", "cpu", "fp32", 64, 50)
LINEAR = ("linear", "linear-frozen")


def spoilt(spoil, workload="logits", output="gradient"):
    """A provider whose gradient is ours, spoilt."""

    def run(batch):
        found = own_providers(workload)[0].run(batch)
        return found | {output: spoil(found[output].clone(), batch)}

    return Provider("spoilt", "eager", run)


def case_of(workload, **sizes):
    """The small case, of `workload`."""
    return CASE._replace(workload=workload, hidden=16 if WORKLOADS[workload].given == HIDDEN else 0, **sizes)


def judged(case, provider):
    """What the check of a provider says of it."""
    workload = WORKLOADS[case.workload]
    batch = workload.make(case)
    truth = workload.truth(batch)
    make_ready(batch, case.device)
    return compared(provider.run(batch), truth, provider.outputs, case)


def fact(seconds, **more):
    return {"family": "eager", "refused": None, "error": 1e-7, "wrong": False, "seconds": seconds} | more
