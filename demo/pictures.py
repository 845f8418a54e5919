"""The pictures of a run: who was unsure, what that predicts, and what was learnt from what."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from demo.history import History
from demo.rollouts import Rollouts, auc_inside
from egpo_kernels import diagnostics

CORRECT, INCORRECT = "#1b7f5c", "#c8472d"
EGPO, GRPO = "#2b5fa5", "#8a8a8a"
# Log axes: what lies outside is drawn at the edge.
SMALLEST_H, LARGEST_H = 1e-3, 10.0
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10.5, "axes.titlesize": 12}


def draw_uncertainty(answers: Rollouts, caption: str, path: Path) -> None:
    """H of correct against incorrect answers: all together, and inside each mixed group."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
        diagnostics.plot_gap(answers.uncertainty, answers.correct, left)
        _by_group(right, answers)
        _finish(figure, caption, path)


def draw_diagnostics(answers: Rollouts, caption: str, path: Path) -> None:
    """What uncertainty predicts, over each part of the answers, and how it goes with length."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
        diagnostics.plot_roc(answers.curves(), left)
        diagnostics.plot_length(answers.uncertainty, answers.lengths, answers.correct, right)
        _finish(figure, caption, path)


def draw_training(history: History, caption: str, path: Path) -> None:
    """By step: reward on held-out prompts, and the share of answers that get a gradient."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
        _held_out(left, history)
        _gradient_share(right, history)
        _finish(figure, caption, path)


def _by_group(axes, answers: Rollouts) -> None:
    mixed = answers.mixed_groups()
    title = f"Same prompt: {len(mixed)} mixed groups"
    if mixed:
        means = [tuple(kind.mean().clamp(SMALLEST_H, LARGEST_H).item() for kind in kinds) for kinds in mixed]
        axes.plot([SMALLEST_H, LARGEST_H], [SMALLEST_H, LARGEST_H], color="black", label="equally uncertain")
        axes.scatter(*zip(*means, strict=True), color=INCORRECT, alpha=0.6, label="one group of 8 answers")
        above = sum(incorrect > correct for correct, incorrect in means)
        title += f", {above} above the line, AUC {auc_inside(mixed):.2f}"
        axes.legend(frameon=False, loc="lower right")
    axes.set(xscale="log", yscale="log", xlim=(SMALLEST_H, LARGEST_H), ylim=(SMALLEST_H, LARGEST_H), aspect="equal")
    axes.set_title(title)
    axes.set_xlabel("mean H of correct answers (nats per token)")
    axes.set_ylabel("mean H of incorrect answers (nats per token)")


def _held_out(axes, history: History) -> None:
    steps = [record["step"] for record in history.held_out]
    rewards = [record["reward"] for record in history.held_out]
    prompts = history.held_out[0]["prompts"]
    errors = [math.sqrt(reward * (1 - reward) / prompts) for reward in rewards]
    axes.errorbar(steps, rewards, errors, color=EGPO, marker="o", capsize=3, label="mean, bar: ±1 standard error")
    axes.set_title(f"Reward on {prompts} held-out prompts, greedy answers")
    axes.set_ylabel("share answered correctly")
    _step_axis(axes)


def _gradient_share(axes, history: History) -> None:
    steps = [record["step"] for record in history.steps]
    shares = {name: [record["share_with_gradient"][name] for record in history.steps] for name in ("EGPO", "GRPO")}
    for (name, values), colour, marker in zip(shares.items(), (EGPO, GRPO), "os", strict=True):
        axes.plot(steps, values, color=colour, marker=marker, label=f"{name}: mean {sum(values) / len(values):.0%}")
    axes.fill_between(steps, shares["GRPO"], shares["EGPO"], color=EGPO, alpha=0.1, label="all-wrong groups")
    axes.set_title("Answers that get a gradient, on the very same rollouts")
    axes.set_ylabel("share with advantage other than 0")
    _step_axis(axes)


def _step_axis(axes) -> None:
    axes.set_ylim(0, 1.15)
    axes.set_yticks([tick / 5 for tick in range(6)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper center", ncol=3, fontsize=9.5, columnspacing=1.0, handlelength=1.4)


def _finish(figure, caption: str, path: Path) -> None:
    figure.text(0.5, -0.04, caption, ha="center", fontsize=9, color="#555555")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
