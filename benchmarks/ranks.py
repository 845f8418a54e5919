"""The picture of a vocabulary split over two ranks: what lies on which, what they tell one another, what each gets."""

from pathlib import Path
from typing import Any

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from benchmarks.pictures import plt, save

OURS, BOTH, ARROW, TEXT = "#0a67c2", "#c3c9d0", "#636c76", "#1f2328"
COLUMNS = (2.1, 6.9)
"""Where each rank's column is centred."""
WIDTH = 4.0
ROWS = (
    (7.6, "tokens, mask, advantages, log-probs", "the same on every rank", BOTH),
    (6.3, "hidden states [N, H]", "the same, or a part of the tokens (sequence_parallel)", BOTH),
    (5.0, "weight rows {0}", "this rank's own", OURS),
    (3.7, "logits [N, V / 2], columns {0}", "one read: maximum, sum of exponentials, token's logit", OURS),
    (1.2, "loss, metrics, log-probs", "the whole ones, the same bits", BOTH),
    (-0.1, "gradient of columns {0}", "one read more, one write; nothing is told", OURS),
)


def draw(folder: Path) -> list[Path]:
    """Draw it into ``folder``."""
    figure, axes = plt.subplots(figsize=(9, 7.4), layout="constrained")
    for rank, (centre, own) in enumerate(zip(COLUMNS, ("0 … V/2", "V/2 … V"), strict=True)):
        axes.text(centre, 8.65, f"rank {rank}", ha="center", fontsize=14, fontweight="bold", color=TEXT)
        for height, title, note, colour in ROWS:
            _box(axes, centre, height, title.format(own), note, colour)
        for start, stop in ((4.55, 4.15), (3.25, 2.86), (2.14, 1.65), (0.75, 0.35)):
            _arrow(axes, (centre, start), (centre, stop))
    axes.add_patch(
        FancyBboxPatch((0.2, 2.2), 8.6, 0.6, boxstyle="round,pad=0.05", facecolor="white", edgecolor=OURS, linewidth=2)
    )
    text = "one all_gather: 4 numbers a row from each rank, put together in the ranks' order"
    axes.text(4.5, 2.5, text, ha="center", va="center", fontsize=11, color=TEXT)
    axes.set(xlim=(-0.1, 9.1), ylim=(-0.7, 9.1))
    axes.set_axis_off()
    return [save(figure, folder / "ranks.png", dpi=110, facecolor="white")]


def _box(axes: Any, centre: float, height: float, title: str, note: str, colour: str) -> None:
    corner = (centre - WIDTH / 2, height - 0.42)
    axes.add_patch(FancyBboxPatch(corner, WIDTH, 0.84, boxstyle="round,pad=0.03", facecolor=colour, edgecolor="none"))
    ink = "white" if colour == OURS else TEXT
    axes.text(centre, height + 0.15, title, ha="center", va="center", fontsize=11, fontweight="bold", color=ink)
    axes.text(centre, height - 0.19, note, ha="center", va="center", fontsize=8.5, color=ink)


def _arrow(axes: Any, start: tuple[float, float], stop: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color=ARROW, linewidth=1.2))
