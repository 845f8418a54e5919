"""What the README shows of the results: one table, one picture of it, and a picture of what is fused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.patches import FancyBboxPatch

from benchmarks import tables
from benchmarks.machine import headline
from benchmarks.pictures import plt, save
from benchmarks.report import Report, case_of, cases_of, duration
from benchmarks.workloads import WORKLOADS, size

DTYPE = "bf16"
COLUMNS = {
    "egpo_kernels": "egpo_kernels",
    "eager": "PyTorch by hand",
    "torch.compile": "torch.compile",
    "TRL": "TRL",
    "Liger": "Liger",
    "cut-cross-entropy": "cut-cross-entropy",
}
"""Families of providers, as a reader knows them; each is shown by its first that ran."""
ROWS = ("logits", "log-probs", "linear", "linear-frozen", "advantages", "policy-loss")
PICTURED = {"logits": "From logits", "linear": "From hidden states"}
NOTES = """
Median time of a call, and the memory it takes beside its inputs; **bold** is the fastest, * is further from float64
than rounding explains, - is not offered there or wants a GPU.{host}
"""
HOST_NOTES = """ The host's rows: CPU time with launches
stubbed, launches of its own kernels + of torch's; see [counts](docs/counts.md#what-a-call-costs-the-host)."""
HOST_ROWS = ("logits_policy_loss", "egpo_loss")


class Theme(NamedTuple):
    """Colours that go with a page: its text, what is only mentioned, ours, text upon ours, and everybody else's."""

    text: str
    quiet: str
    ours: str
    upon_ours: str
    others: str


THEMES = {
    "light": Theme("#1f2328", "#636c76", "#0a67c2", "#ffffff", "#c3c9d0"),
    "dark": Theme("#e6edf3", "#9198a1", "#58a6ff", "#0d1117", "#4b545e"),
}


def leading(reports: Sequence[Report], workload: str) -> list[dict[str, Any]]:
    """The records of a workload's largest batch, in 16 bits where it was measured so."""
    for report in reports:
        cases = [case for case in cases_of(report, leading=True) if case.workload == workload]
        for case in sorted(cases, key=lambda case: case.dtype != DTYPE)[:1]:
            return [one for one in report["results"] if case_of(one) == case]
    raise ValueError(f"no report has the workload {workload!r}; benchmarks/results must hold one that does")


def contenders(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first of each family that ran."""
    found: dict[str, dict[str, Any]] = {}
    for one in records:
        if one["refused"] is None and one["family"] in COLUMNS:
            found.setdefault(one["family"], one)
    return found


def table(reports: Sequence[Report], host: Report | None = None) -> str:
    """A row a workload, a column a family, and where it was measured; then what calls cost the ``host``."""
    rows = []
    for workload in ROWS:
        records = leading(reports, workload)
        rows.append([f"{WORKLOADS[workload].title}, {size(case_of(records[0]))}", *_cells(records)])
    for call in HOST_ROWS if host else ():
        rows.append([f"host time of `{call}`, forward and backward", *_host_cells(host, call)])
    shown = [report for report in reports if any(one["workload"] in ROWS for one in report["results"])]
    measured = [*shown, *([host] if host else [])]
    where = "\n".join(f"- {headline(report['machine'])}" for report in measured)
    notes = NOTES.format(host=HOST_NOTES if host else "")
    return f"{tables.table(['', *COLUMNS.values()], rows)}\n{notes}\n{where}\n"


def _host_cells(host: Report, call: str) -> list[str]:
    found = contenders([one for one in host["results"] if one["call"] == call])
    fastest = min(found.values(), key=_seconds)
    cells = []
    for family in COLUMNS:
        one = found.get(family)
        if one is None:
            cells.append("-")
            continue
        time = duration(_seconds(one))
        launches = f"{len(one['launches'])} + {len(one['operations'])} launches"
        cells.append(f"{f'**{time}**' if one is fastest else time}<br>{launches}")
    return cells


def _cells(records: list[dict[str, Any]]) -> list[str]:
    found = contenders(records)
    fastest = min((one for one in found.values() if not one["wrong"]), key=_seconds)
    cells = []
    for family in COLUMNS:
        one = found.get(family)
        if one is None:
            cells.append("-")
            continue
        time = f"**{duration(_seconds(one))}**" if one is fastest else duration(_seconds(one))
        cells.append(f"{time}{'*' if one['wrong'] else ''}<br>{_mebibytes(one)}")
    return cells


def _seconds(one: dict[str, Any]) -> float:
    return one["seconds"]["median"]


def _mebibytes(one: dict[str, Any]) -> str:
    return f"{one['peak_bytes'] / 2**20:.0f} MiB"


def draw(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Both pictures, for light pages and for dark ones."""
    made = []
    for name, theme in THEMES.items():
        with plt.rc_context({"text.color": theme.text, "font.size": 12}):
            made.append(_fused(leading(reports, "logits"), theme, folder / f"fused-{name}.png"))
            made.append(_results(reports, theme, folder / f"results-{name}.png"))
    return made


def _results(reports: Sequence[Report], theme: Theme, path: Path) -> Path:
    """Time and memory from logits, and from hidden states."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.4), layout="constrained", height_ratios=[4, 6])
    figure.get_layout_engine().set(hspace=0.08, w_pad=0.15)
    for row, (workload, title) in zip(axes, PICTURED.items(), strict=True):
        shown = contenders(leading(reports, workload))
        names = [COLUMNS[family] + ("*" if one["wrong"] else "") for family, one in shown.items()][::-1]
        colours = [theme.ours if family == "egpo_kernels" else theme.others for family in shown][::-1]
        for place, value, text in (
            (row[0], _seconds, lambda one: duration(_seconds(one))),
            (row[1], _peak, _mebibytes),
        ):
            values = [value(one) for one in shown.values()][::-1]
            bars = place.barh(names, values, color=colours, height=0.72)
            place.bar_label(bars, [text(one) for one in shown.values()][::-1], padding=5, color=theme.text)
            place.set(xlim=(0, 1.22 * max(values)), xticks=[])
            place.spines[:].set_visible(False)
            place.tick_params(length=0, labelcolor=theme.text, labelleft=place is row[0])
        row[0].set_title(f"{title}: time", loc="left", fontweight="bold", fontsize=12)
        row[1].set_title("Memory", loc="left", fontweight="bold", fontsize=12)
    caption = f"CPU, {reports[0]['machine']['threads']} threads, {DTYPE}; loss and gradients, the head trains"
    figure.supxlabel(f"{caption}; * is further from float64 than rounding explains", fontsize=10, color=theme.quiet)
    return save(figure, path, dpi=150, transparent=True)


def _peak(one: dict[str, Any]) -> float:
    return one["peak_bytes"]


COPIES = (
    ("logits", 1),
    ("float32\ncopy", 2),
    ("log_softmax", 2),
    ("gradient of\ngather", 2),
    ("gradient of\nsoftmax", 2),
)
"""What eager PyTorch makes of 16-bit logits, in their size; the gradient of the logits comes last."""
UNIT, GAP, HEIGHT = 7.2, 2.6, 9.0
"""Width of a tensor as large as the logits, space between two, and their height."""
ADVANTAGE = "groups, rewards, old log-probs → uncertainty H → clamped weight → advantage of each answer"


def _fused(records: list[dict[str, Any]], theme: Theme, path: Path) -> Path:
    """Tensors as wide as the memory they take: by hand, and here."""
    shown = {one["provider"]: one for one in records if one["refused"] is None}
    figure, axes = plt.subplots(figsize=(10, 4))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 120), ylim=(0, 46))
    axes.axis("off")
    eager, ours, inplace = (shown[name] for name in ("eager", "egpo_kernels", "egpo_kernels, in place"))
    axes.text(2, 42.5, "By hand in PyTorch", fontweight="bold")
    axes.text(26, 42.5, "a box is as wide as the memory it takes", fontsize=9.5, color=theme.quiet)
    place = 2.0
    for name, width in (*COPIES, ("gradient", 1)):
        place = _tensor(axes, place, 30, width, name, theme, theme.others)
    _said(axes, 30, eager, f"{_times(eager)} x the logits", theme)
    axes.text(2, 22.5, "egpo_kernels", fontweight="bold", color=theme.ours)
    place = _tensor(axes, 2.0, 10, 1, "logits", theme, theme.others)
    # As wide as what it replaces, so that both gradients stand in one column.
    width = 8 + 3 * GAP / UNIT
    pill = "one pass: log-prob, ratio, clip, KL, entropy, metrics, gradient"
    place = _tensor(axes, place, 10, width, pill, theme, theme.ours, filled=False)
    _tensor(axes, place, 10, 1, "gradient", theme, theme.ours)
    _said(axes, 10, ours, f"{_times(ours)} x, in place {_times(inplace)} x", theme)
    middle = 2 + UNIT + GAP + UNIT * width / 2
    axes.text(middle, 2.4, ADVANTAGE, ha="center", va="center", fontsize=9.5, color=theme.quiet)
    axes.annotate("", (middle, 9.8), (middle, 4.4), arrowprops={"arrowstyle": "->", "color": theme.quiet})
    batch = f"CPU, {size(case_of(ours))}"
    axes.text(92.5, 2.4, batch, va="center", fontsize=9.5, color=theme.quiet)
    return save(figure, path, dpi=150, transparent=True)


def _tensor(
    axes: Any, left: float, bottom: float, size: float, name: str, theme: Theme, colour: str, filled: bool = True
) -> float:
    """One box; returns where the next begins. What is not filled takes no memory of that size."""
    box = FancyBboxPatch(
        (left, bottom), UNIT * size, HEIGHT, boxstyle="round,pad=0,rounding_size=0.8",
        facecolor=colour if filled else "none", edgecolor=colour, linewidth=1.6,
    )  # fmt: skip
    axes.add_patch(box)
    right = left + UNIT * size
    colour_of_text = theme.upon_ours if filled and colour == theme.ours else theme.text
    axes.text(
        (left + right) / 2, bottom + HEIGHT / 2, name, ha="center", va="center", fontsize=10 if size > 1 else 9,
        color=colour_of_text,
    )  # fmt: skip
    if name != "gradient":
        arrow = {"arrowstyle": "->", "color": theme.quiet}
        axes.annotate("", (right + GAP, bottom + HEIGHT / 2), (right, bottom + HEIGHT / 2), arrowprops=arrow)
    return right + GAP


def _said(axes: Any, bottom: float, one: dict[str, Any], memory: str, theme: Theme) -> None:
    """Peak memory and time, at the end of a row."""
    axes.text(92.5, bottom + 6.2, memory, va="center", fontweight="bold")
    axes.text(92.5, bottom + 2.6, f"of memory, {duration(_seconds(one))}", va="center", color=theme.quiet)


def _times(one: dict[str, Any]) -> str:
    times = one["peak_bytes"] / one["logits_bytes"]
    return f"{times:.1f}" if times >= 2 else f"{times:.2f}"
