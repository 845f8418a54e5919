"""Pictures of a report: time, rate and memory of the batch that leads, and how time scales."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from benchmarks.machine import headline
from benchmarks.report import Report, case_of, cases_of, duration
from benchmarks.workloads import HIDDEN, WORKLOADS, size

FAMILIES = {
    "egpo_kernels": "#1f77b4",
    "eager": "#7f7f7f",
    "torch.compile": "#ff7f0e",
    "Liger": "#d62728",
    "TRL": "#2ca02c",
    "quack": "#9467bd",
    "cut-cross-entropy": "#8c564b",
    "bare GEMMs": "#000000",
}
"""Who is compared, each in its colour in every picture."""


def draw(report: Report, folder: Path) -> list[Path]:
    """Of each workload the batch that leads, in every dtype, and scaling, but for heads, whose sizes are models'."""
    drawn = []
    for name in dict.fromkeys(one["workload"] for one in report["results"]):
        own = [one for one in report["results"] if one["workload"] == name and one["refused"] is None]
        if own:
            drawn.append(_leading(report, name, own, folder))
            if WORKLOADS[name].given != HIDDEN:
                drawn.append(_scaling(report, name, own, folder))
    return drawn


def _leading(report: Report, name: str, own: list[dict[str, Any]], folder: Path) -> Path:
    leading = [case for case in cases_of(report, leading=True) if case.workload == name]
    own = [one for one in own if case_of(one) in leading]
    dtypes = list(dict.fromkeys(one["dtype"] for one in own))
    columns = 3 if any(one["peak_bytes"] for one in own) else 2
    figure, axes = _panels(len(dtypes), columns, 5, 1 + 0.36 * len(own) + 0.6 * len(dtypes))
    for row, dtype in zip(axes, dtypes, strict=True):
        shown = [one for one in own if one["dtype"] == dtype][::-1]
        _bars(row[0], shown, [one["seconds"]["median"] for one in shown], f"{dtype}: time", duration)
        _rates(row[1], shown, report["copy_bandwidth"])
        if columns == 3:
            peaks = [(one["peak_bytes"] or 0) / 2**20 for one in shown]
            _bars(row[2], shown, peaks, "peak memory beyond the inputs, MiB", "{:.0f}".format)
    batch = size(leading[0]._replace(dtype=", ".join(dtypes)))
    return _save(figure, f"{name}: {WORKLOADS[name].title}, {batch}", report, folder / f"{name}.png")


def _rates(axes: Axes, shown: list[dict[str, Any]], copy: float) -> None:
    """Bandwidth beside that of a copy, or time beside that of the products alone."""
    if "bandwidth" in shown[0]:
        values, bar, title = [one["bandwidth"] / 1e9 for one in shown], copy / 1e9, "effective bandwidth, GB/s"
        _bars(axes, shown, values, title, "{:.1f}".format)
    else:
        values, bar = [one["over_gemms"] or 0 for one in shown], 1.0
        _bars(axes, shown, values, "time / bare GEMMs", "{:.2f}".format)
    axes.axvline(bar, color="black", linestyle="--", linewidth=1)
    if "bandwidth" in shown[0]:
        axes.annotate(" copy", (bar, 0), xycoords=("data", "axes fraction"), va="bottom", fontsize=8)
    axes.set_xlim(right=max(axes.get_xlim()[1], 1.15 * bar))


def _bars(axes: Axes, shown: list[dict[str, Any]], values: list[float], title: str, text: Any) -> None:
    bars = axes.barh([one["provider"] for one in shown], values, color=[FAMILIES[one["family"]] for one in shown])
    axes.bar_label(bars, [text(value) for value in values], padding=3, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_xlim(0, 1.25 * max(values, default=1) or 1)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _scaling(report: Report, name: str, own: list[dict[str, Any]], folder: Path) -> Path:
    dtypes = list(dict.fromkeys(one["dtype"] for one in own))
    over = [field for field in ("tokens", "vocab") if len({one[field] for one in own}) > 1] or ["tokens"]
    figure, axes = _panels(len(dtypes), len(over), 6.5, 3.6 * len(dtypes) + 0.8)
    for row, dtype in zip(axes, dtypes, strict=True):
        for place, field in zip(row, over, strict=True):
            _lines(place, [one for one in own if one["dtype"] == dtype], field, dtype)
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return _save(figure, f"{name}: how time scales", report, folder / f"{name}-scaling.png")


def _lines(axes: Axes, own: list[dict[str, Any]], field: str, dtype: str) -> None:
    other = "vocab" if field == "tokens" else "tokens"
    fixed, seen = max(one[other] for one in own), {}
    for provider in dict.fromkeys(one["provider"] for one in own):
        points = sorted(
            (one[field], one["seconds"]["median"], one["family"])
            for one in own
            if one["provider"] == provider and one[other] == fixed
        )
        family = points[0][2]
        seen[family] = seen.get(family, -1) + 1
        style = ("-", "--", ":", "-.")[seen[family] % 4]
        axes.plot(
            [x for x, _, _ in points], [y * 1e3 for _, y, _ in points], style, marker="o", markersize=4,
            color=FAMILIES[family], label=provider,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=field, ylabel="ms", title=f"{dtype}, {other} {fixed}")
    ticks = sorted({one[field] for one in own})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _panels(rows: int, columns: int, width: float, height: float) -> Any:
    size = (width * columns, height)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, sharey="row", layout="constrained")


def _save(figure: Any, title: str, report: Report, path: Path) -> Path:
    figure.suptitle(title, fontweight="bold")
    figure.supxlabel(headline(report["machine"]), fontsize=7, color="grey")
    return save(figure, path, dpi=120, bbox_inches="tight")


def save(figure: Any, path: Path, **options: Any) -> Path:
    """Write a figure, unless the same pixels are there already: encoders differ, and a page's history should not."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    plt.close(figure)
    drawn.seek(0)
    if not (path.exists() and _alike(plt.imread(path), plt.imread(drawn))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn.getvalue())
    return path


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether no pixel differs by more than a layout's last digit can change it."""
    return one.shape == other.shape and bool(np.abs(one - other).max() <= 8 / 255)
