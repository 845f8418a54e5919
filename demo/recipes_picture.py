"""The heat map of `demo.recipes`: a row a recipe, a column an answer, groups apart."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import FuncNorm

from demo.pictures import CORRECT, INCORRECT, plt
from demo.rollouts import Rollouts

TICKS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
NAMES_A_LINE = 3


def draw(answers: Rollouts, table: dict[tuple[str, ...], torch.Tensor], title: str, path: Path) -> None:
    """One panel a group, its answers in the order given."""
    values = torch.stack(list(table.values()))
    norm, ticks = _colours(values.abs().max().item() or 1.0)
    names = list(dict.fromkeys(answers.groups))
    members = [torch.tensor([group == name for group in answers.groups]) for name in names]
    sizes = [int(inside.sum()) for inside in members]
    figure, (panels,) = plt.subplots(
        1,
        len(names),
        sharey=True,
        squeeze=False,
        width_ratios=sizes,
        figsize=(15, 2.4 + 0.36 * len(table)),
        layout="constrained",
    )
    for axes, name, inside in zip(panels, names, members, strict=True):
        image = axes.imshow(values[:, inside].numpy(), cmap="RdBu", norm=norm, aspect="auto")
        _describe(axes, name.split("/")[1], answers.correct[inside], answers.uncertainty[inside])
    panels[0].set_yticks(range(-1, len(table)), ["● correct, x incorrect", *map(_label, table)], fontsize=9)
    order = "inside a group: correct answers first, the surest first"
    figure.supxlabel(f"uncertainty H of each answer (nats per token); {order}", fontsize=10)
    figure.suptitle(title, fontsize=12)
    bar = figure.colorbar(image, ax=panels.tolist(), ticks=ticks, format=_signed, pad=0.01, aspect=30)
    bar.set_label("advantage (palest: 0; colour by the square root)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _describe(axes, group: str, correct: torch.Tensor, uncertainty: torch.Tensor) -> None:
    """Above the recipes who was right, below them how sure."""
    for kind, marker, colour in ((True, "o", CORRECT), (False, "x", INCORRECT)):
        places = (correct == kind).nonzero()[:, 0].tolist()
        axes.scatter(places, [-1] * len(places), marker=marker, color=colour, s=22)
    axes.set_ylim(axes.get_ylim()[0], -1.6)
    axes.set_title(f"group {group}: {int(correct.sum())} of {len(correct)} right", fontsize=9.5)
    axes.set_xticks(range(len(correct)), [f"{h:.2f}" for h in uncertainty.tolist()], rotation=90, fontsize=7.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _colours(reach: float) -> tuple[FuncNorm, list[float]]:
    """White at 0, and by the square root from there: an eighth stays visible beside a seven."""
    norm = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x)), -reach, reach)
    return norm, [0.0, *(sign * tick for tick in TICKS if tick <= reach for sign in (-1, 1))]


def _label(names: tuple[str, ...]) -> str:
    lines = [", ".join(names[first : first + NAMES_A_LINE]) for first in range(0, len(names), NAMES_A_LINE)]
    return ",\n".join(lines)


def _signed(value: float, _: int) -> str:
    return f"{value:+g}" if value else "0"
