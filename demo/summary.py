"""The closing table: what the run's numbers say, and how far they reach."""

import math
from pathlib import Path

from demo.history import History
from demo.rollouts import Rollouts, auc_inside
from demo.settings import Settings
from egpo_kernels import diagnostics

LIMITS = (
    "One seed, one small model and a few minutes: this shows that the pieces work together on real answers. It does "
    "not show that one method trains better than another."
)
SPANS = (
    "AUC is the probability that an incorrect answer is more uncertain than a correct one. This model writes no "
    "thinking tag, so there are no thinking and answer spans; but every answer that was not cut off has a token that "
    "ends it, so uncertainty is taken over the whole answer, over what stands before that token, and at that token."
)


def summary_rows(
    settings: Settings, history: History, answers: Rollouts, seconds: float, peak_gb: float
) -> list[tuple[str, str]]:
    """Name and value of each row, as text."""
    return [
        *_reward_rows(history),
        *_uncertainty_rows(answers),
        ("answers without a closing think tag", _untagged(history)),
        *_prediction_rows(answers),
        *_gradient_rows(history),
        ("sampled from", settings.sampled_from),
        *_kept_rows(history),
        ("drift from the sampler, step 1", f"{history.steps[0]['drift']:.4f} nats/token"),
        ("time of a step", f"{sum(record['seconds'] for record in history.steps) / len(history.steps):.1f} s"),
        ("time, loading included", f"{seconds:.0f} s"),
        ("peak memory", f"{peak_gb:.1f} GB"),
    ]


def _reward_rows(history: History) -> list[tuple[str, str]]:
    before, after = history.held_out[0], history.held_out[-1]
    rows = [(f"held-out reward, step 0 -> {after['step']}", _change(before, after))]
    for label, part in after["by_task"].items():
        rows.append((f"  {label} ({part['prompts']} prompts)", _change(before["by_task"][label], part)))
    return rows


def _uncertainty_rows(answers: Rollouts) -> list[tuple[str, str]]:
    found = diagnostics.uncertainty_gap(answers.uncertainty, answers.correct)
    kinds = [(name, getattr(found, name)) for name in ("correct", "incorrect")]
    return [
        *(
            (f"uncertainty of {kind.sequences} {name} answers", f"{_text(kind.mean)} nats/token")
            for name, kind in kinds
        ),
        ("gap (incorrect - correct)", f"{_text(found.gap)} nats/token"),
    ]


def _prediction_rows(answers: Rollouts) -> list[tuple[str, str]]:
    mixed = answers.mixed_groups()
    length = diagnostics.length_correlation(answers.uncertainty, answers.lengths)
    return [
        *(
            (f"AUC, {name} (n = {curve.correct + curve.incorrect})", _text(curve.auc))
            for name, curve in answers.curves().items()
        ),
        (f"AUC, inside {len(mixed)} mixed groups", _text(auc_inside(mixed))),
        ("uncertainty against length, Pearson", _text(length.pearson)),
        ("uncertainty against length, Spearman", _text(length.spearman)),
    ]


def _gradient_rows(history: History) -> list[tuple[str, str]]:
    kinds = {name: history.total(f"egpo/groups/{name}/sum") for name in ("mixed", "all_wrong", "all_correct")}
    counts = ", ".join(f"{kind:.0f}" for kind in kinds.values())
    shares = {
        name: sum(record["share_with_gradient"][name] for record in history.steps) / len(history.steps)
        for name in history.steps[0]["share_with_gradient"]
    }
    return [
        ("groups: mixed, all wrong, all correct", counts),
        *((f"answers with a gradient under {name}", f"{share:.0%}") for name, share in shares.items()),
    ]


def _kept_rows(history: History) -> list[tuple[str, str]]:
    """What sampled tokens were chosen from; nothing where that was the whole vocabulary."""
    sizes = [len(ids) for record in history.rollouts for ids in record.get("kept", ()) if ids]
    if not sizes:
        return []
    return [
        ("tokens kept, mean", f"{sum(sizes) / len(sizes):.1f}"),
        ("sampled tokens kept alone", f"{sizes.count(1) / len(sizes):.0%}"),
    ]


def _untagged(history: History) -> str:
    return f"{sum(record['untagged'] for record in history.steps)} of {len(history.rollouts)}"


def write_summary(rows: list[tuple[str, str]], caption: str, finished: bool, path: Path) -> None:
    """The table as Markdown, with the pictures."""
    lines = [
        "# Demo run",
        "",
        f"{caption[0].upper()}{caption[1:]}{'' if finished else ', stopped early'}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name.strip()} | {value} |" for name, value in rows),
        "",
        SPANS,
        "",
        LIMITS,
        "",
        "![Uncertainty of correct and incorrect answers](uncertainty.png)",
        "",
        "![ROC of uncertainty as a predictor of incorrectness, uncertainty against length](diagnostics.png)",
        "",
        "![Held-out reward and share of answers with a gradient](training.png)",
        "",
        "The advantage every recipe gives to the same answers: [recipes.md](recipes.md).",
    ]
    path.write_text("\n".join(lines) + "\n")


def _change(before: dict, after: dict) -> str:
    return f"{before['reward']:.3f} -> {after['reward']:.3f}"


def _text(value) -> str:
    return "not defined" if math.isnan(value) else f"{float(value):.3f}"
