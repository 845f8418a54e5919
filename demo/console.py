"""What the terminal shows: a progress bar, one line a step, and the table at the end."""

import math
from pathlib import Path

import rich.console
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo.history import FILES

HEADER = (
    "                             groups: all          uncertainty       weight      sum of\n"
    "step  reward     loss   grad  mixed wrong right   right wrong    min mean  max   adv.  seconds"
)


class Console:
    """Prints above a progress bar that stays at the bottom while `progress()` is entered."""

    def __init__(self, recipe_name: str, steps: int):
        self._console = rich.console.Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._recipe_name = recipe_name
        self._task = self._progress.add_task("", total=steps)

    def progress(self) -> Progress:
        """The progress bar, to be entered with `with`."""
        return self._progress

    def doing(self, what: str) -> None:
        """Says beside the bar what is going on."""
        self._progress.update(self._task, description=f"{self._recipe_name}: {what}")

    def step(self, record: dict) -> None:
        """One line of numbers, under the header."""
        if record["step"] == 1:
            self._print(f"drift of the ratio from the sampler: {record['drift']:.4f} nats per token", style="cyan")
            self._print(HEADER, style="bold")
        metrics = record["metrics"]
        groups = "".join(f"{metrics[f'egpo/groups/{kind}/sum']:6.0f}" for kind in ("mixed", "all_wrong", "all_correct"))
        doubt = "".join(_number(metrics[f"egpo/uncertainty/{kind}/mean"], 6, 2) for kind in ("correct", "incorrect"))
        weight = "".join(_number(metrics[f"egpo/weight/{kind}"], 5, 2) for kind in ("min", "mean", "max"))
        self._print(
            f"{record['step']:4d}  {record['reward']:6.3f}  {record['loss']:+7.4f}  {record['grad_norm']:5.2f} "
            f"{groups}  {doubt}  {weight}  {metrics['egpo/advantage/sum']:+5.1f}  {record['seconds']:7.1f}"
        )
        self._progress.advance(self._task)

    def held_out(self, record: dict) -> None:
        """One line: the reward on held-out prompts."""
        parts = ", ".join(f"{label} {part['reward']:.2f}" for label, part in record["by_task"].items())
        self._print(f"held-out reward after step {record['step']}: {record['reward']:.3f} ({parts})", style="cyan")

    def finish(self, rows: list[tuple[str, str]], folder: Path, finished: bool) -> None:
        """The table, and where the files are."""
        table = Table(box=box.SIMPLE_HEAD, show_header=False)
        for name, value in rows:
            table.add_row(name, value)
        self._print(table)
        self._print(("Done" if finished else "Stopped early; what was done is") + f" in {folder}/: {', '.join(FILES)}")

    def _print(self, what, style: str | None = None) -> None:
        self._console.print(what, style=style, soft_wrap=isinstance(what, str))


def _number(value: float, width: int, digits: int) -> str:
    """A number of fixed width, or a dash where there is none."""
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:{width}.{digits}f}"
