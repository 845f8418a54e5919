"""What a run has recorded so far, in memory and in JSON-lines files that are written as it goes."""

import json
import math
from pathlib import Path

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
