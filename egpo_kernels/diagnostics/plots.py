"""The same numbers as pictures, on Axes that are given or new. Every label carries its unit and its counts."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.diagnostics.extra import wanted
from egpo_kernels.diagnostics.measures import Roc, finite_sequences, length_correlation, uncertainty_gap
from egpo_kernels.inputs.validation import check_instance

CORRECT, INCORRECT, PLAIN = "#1b7f5c", "#c8472d", "#2b5fa5"
BINS = 32
ASIDE = 0.012
"""How far, as a share of all lengths, dots are moved aside so that one kind does not hide the other."""
DECADES = 4
"""The logarithmic axis of H reaches this far below the largest H; what lies below is drawn at its edge."""


def plot_gap(uncertainty: Tensor, correct: Tensor, ax: Any = None) -> Any:
    """Draw the distribution of H of correct and of incorrect sequences, with means and gap (Fig. 3 of the paper).

    Args:
        uncertainty: ``[S]`` nats per token.
        correct: ``[S]`` bool.
        ax: matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: A wrong shape.
        TypeError: A wrong type or dtype.
        ImportError: matplotlib is missing.
    """
    (values, right), _ = finite_sequences(uncertainty=(uncertainty, "floating"), correct=(correct, "bool"))
    found = uncertainty_gap(uncertainty, correct)
    ax = _axes(ax)
    low, high = _log_range(values)
    bins = torch.logspace(math.log10(low), math.log10(high), BINS + 1, dtype=torch.float64).numpy()
    for name, kind, spread, colour in (
        ("correct", values[right], found.correct, CORRECT),
        ("incorrect", values[~right], found.incorrect, INCORRECT),
    ):
        if not spread.sequences:
            ax.plot([], [], color=colour, label=f"{name}: none")
            continue
        label = f"{name}: n = {spread.sequences}, mean {spread.mean:.2f} (dashed)"
        share = [1 / spread.sequences] * spread.sequences
        ax.hist(kind.clamp(low, high).numpy(), bins, weights=share, color=colour, alpha=0.5, label=label)
        ax.axvline(min(max(spread.mean, low), high), ymax=0.8, color=colour, linestyle="--")
    gap = "not defined without both kinds" if math.isnan(found.gap) else f"{found.gap:+.2f} nats per token"
    ax.set_title(f"Gap incorrect - correct: {gap}")
    ax.set_xlabel(f"uncertainty H of a sequence (nats per token, log scale){_notes(found.left_out, values, low)}")
    ax.set_ylabel("share of the sequences of its kind")
    ax.set(xscale="log", xlim=(low, high))
    ax.margins(y=0.25)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(wanted("matplotlib.ticker").PercentFormatter(1.0))
    _plain_numbers(ax.xaxis)
    ax.legend(frameon=False, loc="upper left")
    return ax


def plot_roc(curves: Mapping[str, Roc], ax: Any = None) -> Any:
    """Draw the ROC curves of uncertainty as a predictor of incorrectness (Table 3 of the paper gives their areas).

    Args:
        curves: Name -> `Roc`, as `roc_of_spans` gives them, or ``{"whole response": roc(...)}``.
        ax: matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: No mapping to `Roc`.
        ImportError: matplotlib is missing.
    """
    check_instance("curves", curves, Mapping)
    for name, curve in curves.items():
        check_instance(f"curves[{name!r}]", curve, Roc)
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color="#8a8a8a", linestyle=":", label="chance: AUC 0.50")
    for name, curve in curves.items():
        auc = "AUC not defined" if math.isnan(curve.auc) else f"AUC {curve.auc:.2f}"
        counts = f"{curve.incorrect} incorrect, {curve.correct} correct"
        missing = f", {curve.left_out} left out" if curve.left_out else ""
        label = f"{name}: {auc}\n({counts}{missing})"
        ax.plot(curve.false_positive_rate, curve.true_positive_rate, label=label)
    ax.set_title("Uncertainty as a predictor of incorrectness")
    ax.set_xlabel("false positives: share of correct sequences called incorrect")
    ax.set_ylabel("true positives: share of incorrect sequences found")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.legend(loc="lower right", edgecolor="none", framealpha=0.9)
    return ax


def plot_length(uncertainty: Tensor, lengths: Tensor, correct: Tensor | None = None, ax: Any = None) -> Any:
    """Draw uncertainty against length, one dot a sequence, with both correlations.

    Dots of correct sequences are drawn a little to the left of their length, those of incorrect ones to the right.

    Args:
        uncertainty: ``[S]`` nats per token.
        lengths: ``[S]`` tokens.
        correct: ``[S]`` bool, for two colours; None for one.
        ax: matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: A wrong shape.
        TypeError: A wrong type or dtype.
        ImportError: matplotlib or scipy is missing.
    """
    found = length_correlation(uncertainty, lengths)
    given = {"uncertainty": (uncertainty, "floating"), "lengths": (lengths, "real")}
    given |= {} if correct is None else {"correct": (correct, "bool")}
    (values, counts, *right), _ = finite_sequences(**given)
    kinds = [("sequences", torch.ones_like(values, dtype=torch.bool), PLAIN)]
    if right:
        kinds = [("correct", right[0], CORRECT), ("incorrect", ~right[0], INCORRECT)]
    ax = _axes(ax)
    low, high = _log_range(values)
    aside = ASIDE * (counts.max() - counts.min()).item() if right and len(counts) else 0.0
    for (name, chosen, colour), shift in zip(kinds, (-aside, aside), strict=False):
        label = f"{name}: n = {int(chosen.sum())}"
        drawn = (counts[chosen] + shift).numpy(), values[chosen].clamp(low, high).numpy()
        ax.scatter(*drawn, color=colour, alpha=0.4, s=18, linewidths=0, label=label)
    pearson, spearman = _number(found.pearson), _number(found.spearman)
    ax.set_title(f"Uncertainty against length\nPearson {pearson} (of H, not log H), Spearman {spearman}")
    ax.set_xlabel(f"length of a sequence (tokens){_notes(found.left_out, values, low)}")
    ax.set_ylabel("uncertainty H of a sequence (nats per token, log scale)")
    ax.set(yscale="log", ylim=(low / 1.3, high * 1.3))
    _plain_numbers(ax.yaxis)
    ax.legend(frameon=False)
    return ax


def _axes(ax: Any) -> Any:
    """Return the given Axes, or those of a new figure."""
    if ax is not None:
        if not isinstance(ax, wanted("matplotlib.axes").Axes):
            raise TypeError(f"ax is {type(ax).__name__}; it must be a matplotlib Axes or None")
        return ax
    return wanted("matplotlib.pyplot").subplots(figsize=(6.4, 5.0), layout="constrained")[1]


def _log_range(values: Tensor) -> tuple[float, float]:
    """Ends of a logarithmic axis: at most DECADES below the largest value, [0.001, 1] without a positive one."""
    positive = values[values > 0]
    if not len(positive):
        return 1e-3, 1.0
    high = positive.max().item() * 1.1
    return max(positive.min().item() / 1.1, high / 10**DECADES), high


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis 0.1, 0.3, 1, 3."""
    ticker = wanted("matplotlib.ticker")
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _notes(left_out: int, values: Tensor, low: float) -> str:
    """Say under a label what the picture does not show where it is."""
    edge = int((values < low).sum())
    notes = [f"{edge} below {low:.1g} nats drawn at the edge"] if edge else []
    notes += [f"{left_out} without a finite value left out"] if left_out else []
    return "".join(f"\n{note}" for note in notes)


def _number(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:+.2f}"
