"""What calls cost the host, as a Markdown table."""

from typing import Any

from benchmarks import tables
from benchmarks.machine import headline

COLUMNS = ("call", "who", "host time (quartiles)", "launches of its kernels", "of torch's", "host time / ours")
NOTES = """\
CPU time of one thread for a call, forward and backward (advantages have none, nor has what says "no gradient"), with
launches stubbed: the median of {rounds} rounds in shuffled order. Tensors are on a CPU and small, {tokens}
tokens ({responses} sequences for `policy_loss` and `group_advantages`), a vocabulary of {vocab}, a hidden
size of {hidden}, {dtype}, so that torch's own arithmetic takes little of the time; most in the rows `linear_*`, where a
CPU's matrix products are slow to start. Triton does all that it does for a launch on a GPU but its C launcher and the
driver's call. Ours reports all metrics where it does not say otherwise. Torch's launches are the operations that launch
a kernel on a GPU, a lower bound.
"""


def markdown(report: dict[str, Any]) -> str:
    """A header, a row a contender, what the columns mean."""
    ours: dict[str, float] = {}
    rows = []
    for one in report["results"]:
        function, comma, how = one["call"].partition(",")
        name = [f"`{function}`{comma}{how}", one["provider"]]
        if one["refused"] is not None:
            rows.append([*name, one["refused"], "-", "-", "-"])
            continue
        low, median, high = (1e6 * one["seconds"][place] for place in ("lower_quartile", "median", "upper_quartile"))
        ratio = f"{median / ours.setdefault(one['call'], median):.2f}"
        counts = (len(one["launches"]), len(one["operations"]))
        rows.append([*name, f"{median:.0f} us ({low:.0f} to {high:.0f})", *counts, ratio])
    shape = f"[{report['shape']['sequences']} x {report['shape']['length']}]"
    notes = NOTES.format(rounds=report["rounds"], tokens=shape, **report["shape"])
    versions = ", ".join(f"{name} {found}" for name, found in report["rivals"].items())
    return f"{headline(report['machine'])}; {versions}\n\n{tables.table(COLUMNS, rows)}\n\n{notes}"
