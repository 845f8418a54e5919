"""What a call costs, counted: products of matrices, and memory at its peak. Operators hide both from dispatch modes."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from benchmarks.counts.measure import peak_allocated

PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2), "aten::bmm": (0, 1)}
"""The profiler's names of matrix products, and which arguments are the factors."""


def products(run: Callable[[], object]) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of every matrix product that is executed, inside operators too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
        run()
    found = []
    for event in seen.events():
        parent = event.cpu_parent
        if event.name in PRODUCTS and (parent is None or parent.name not in PRODUCTS):
            left, right = (event.input_shapes[place] for place in PRODUCTS[event.name])
            found.append((left[-2], left[-1], right[-1]))
    return found


def multiplications(run: Callable[[], object]) -> int:
    """Multiplications (and additions) in all matrix products."""
    return sum(rows * inner * columns for rows, inner, columns in products(run))


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that torch has allocated on the CPU at the most, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    return peak_allocated(seen)
