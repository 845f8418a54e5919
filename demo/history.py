"""What a run has recorded so far: JSON-lines files, written as it goes, and the numbers read off them."""

import json
import math
from pathlib import Path

import torch

from demo import rollouts

PICTURES = ("uncertainty.png", "diagnostics.png", "training.png", "recipes.png")
FILES = ("summary.md", "recipes.md", *PICTURES, "log.jsonl", rollouts.FILE)


class History:
    """Records in memory and in `log.jsonl` and `rollouts.jsonl`; a line is in its file once the call returns."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.steps: list[dict] = []
        self.held_out: list[dict] = []
        self.rollouts: list[dict] = []
        # An earlier run's pictures beside this run's log would mislead.
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        self._log = folder / "log.jsonl"
        self._rollouts = folder / rollouts.FILE

    def add_run(self, settings: dict) -> None:
        """The first line of the log: what was run."""
        _append(self._log, [{"kind": "run", **settings}])

    def add_step(self, record: dict, answers: list[dict]) -> None:
        """The rollouts come first, so that a step in the log always has its answers on disk."""
        _append(self._rollouts, answers)
        _append(self._log, [record])
        self.rollouts += answers
        self.steps.append(record)

    def add_held_out(self, record: dict) -> None:
        _append(self._log, [record])
        self.held_out.append(record)

    def total(self, metric: str) -> float:
        """Sum of a step metric over the run."""
        return sum(record["metrics"][metric] for record in self.steps)

    def mixed_groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each group with both kinds: H of its correct and of its incorrect answers, float64, nats per token."""
        groups: dict[tuple[int, int], tuple[list, list]] = {}
        for rollout in self.rollouts:
            kinds = groups.setdefault((rollout["step"], rollout["group"]), ([], []))
            kinds[0 if rollout["reward"] == 1 else 1].append(rollout["uncertainty"])
        mixed = [kinds for kinds in groups.values() if all(kinds)]
        return [tuple(torch.tensor(kind, dtype=torch.float64) for kind in kinds) for kinds in mixed]


def pairs_won(low: torch.Tensor, high: torch.Tensor) -> float:
    """Number of pairs in which an entry of `high` exceeds one of `low`, ties counting half; both [n], any lengths."""
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high) + torch.searchsorted(ordered, high, right=True)
    return below.sum().item() / 2


def auc(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of correct-incorrect pairs in which the incorrect answer is the more uncertain; NaN without a pair.

    Each entry holds H of correct and of incorrect answers; pairs are formed inside an entry only.
    """
    count = sum(len(correct) * len(incorrect) for correct, incorrect in pairs)
    return sum(pairs_won(*pair) for pair in pairs) / count if count else math.nan


def _append(path: Path, records: list[dict]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(_plain(record), allow_nan=False) + "\n" for record in records))


def _plain(value):
    """The same value with NaN and infinities as None, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
