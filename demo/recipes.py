"""The advantage every recipe gives to the same saved answers, as text and picture: `python -m demo.recipes OUT`."""

import argparse
import sys
from pathlib import Path

import torch

from demo.recipes_picture import draw
from demo.rollouts import FILE, Rollouts, pack, read_records
from egpo_kernels import group_advantages
from egpo_kernels.recipes import GRPO, RECIPES, Recipe

Table = dict[tuple[str, ...], torch.Tensor]
"""Names of the recipes that share one group level, in the order of RECIPES -> advantages [S] of all answers."""


def main() -> int:
    """Reads a run's folder and writes `recipes.md` and `recipes.png` into it, or elsewhere."""
    parser = argparse.ArgumentParser(prog="python -m demo.recipes", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"a demo run's folder, with its {FILE}")
    parser.add_argument("--step", type=int, help="whose answers to take; else the first with every kind of group")
    parser.add_argument("--out", type=Path, help="where to write; else the same folder")
    given = parser.parse_args()
    if not (given.folder / FILE).is_file():
        parser.error(f"folder is {str(given.folder)!r}; it must be a demo run's folder and hold {FILE}")
    records = read_records(given.folder)
    steps = {record["step"] for record in records}
    if given.step is not None and given.step not in steps:
        parser.error(f"step is {given.step}; it must be one of the run's, {min(steps)} to {max(steps)}")
    out = given.out or given.folder
    out.mkdir(parents=True, exist_ok=True)
    write(records, out, given.step)
    print(f"wrote {out / 'recipes.md'} and {out / 'recipes.png'}")
    return 0


def write(records: list[dict], folder: Path, step: int | None = None) -> None:
    """Text and picture of one step's answers; records as in the run's file."""
    step = telling_step(records) if step is None else step
    records = in_order([record for record in records if record["step"] == step])
    answers = pack(records)
    table = advantages(answers)
    (folder / "recipes.md").write_text(text(records, answers, table))
    title = f"The advantage every recipe gives to the same {len(records)} answers (step {step} of a demo run)"
    draw(answers, table, title, folder / "recipes.png")


def telling_step(records: list[dict]) -> int:
    """The first step with most kinds of group: mixed, all wrong, all correct."""
    kinds: dict[int, dict[int, set]] = {}
    for record in records:
        kinds.setdefault(record["step"], {}).setdefault(record["group"], set()).add(record["reward"] == 1)
    return max(kinds, key=lambda step: (len({tuple(sorted(kind)) for kind in kinds[step].values()}), -step))


def in_order(records: list[dict]) -> list[dict]:
    """Records of a step group by group, correct answers first, the surest first."""
    doubt = pack(records).uncertainty.tolist()
    order = sorted(range(len(records)), key=lambda i: (records[i]["group"], records[i]["reward"] != 1, doubt[i]))
    return [records[i] for i in order]


def advantages(answers: Rollouts) -> Table:
    """Every recipe's advantages of the same answers. Recipes that differ in their loss alone share an entry."""
    names: dict[str, list[Recipe]] = {}
    for recipe in RECIPES.values():
        names.setdefault(recipe.advantage.json, []).append(recipe)
    return {
        tuple(recipe.name for recipe in alike): group_advantages(
            answers.groups,
            answers.rewards,
            answers.log_probs,
            cu_seqlens=answers.cu_seqlens,
            entropy=answers.entropies,
            config=alike[0].advantage,
        ).advantages
        for alike in names.values()
    }


def text(records: list[dict], answers: Rollouts, table: Table) -> str:
    """Markdown: a row a recipe, then a row an answer."""
    correct = int(answers.correct.sum())
    lines = [
        "# The advantage every recipe gives to the same answers",
        "",
        f"{len(records)} answers to {len(set(answers.groups))} prompts, step {records[0]['step']} of a demo run; "
        f"{correct} answers are correct.",
        "In a group, correct answers come first; the order is by uncertainty H (in nats per token), lowest first.",
        "",
        "![Advantages of all recipes](recipes.png)",
        "",
        *_by_recipe(answers, table),
        "",
        "Recipes on one line give the same advantages; they differ in their loss only.",
        "*Settings* are the settings of `AdvantageConfig` that differ from GRPO's.",
        "The other columns describe the advantages of all these answers.",
        "",
        "## Every answer",
        "",
        "*H* is the uncertainty of the answer, in nats per token; a column named by a recipe holds its advantages.",
        "",
        *_by_answer(records, answers, table),
    ]
    return "\n".join(lines) + "\n"


def _by_recipe(answers: Rollouts, table: Table) -> list[str]:
    header = ["recipes", "settings", "share not 0", "mean of correct", "mean of incorrect", "lowest", "highest", "sum"]
    rows = [header, ["---", "---", *["---:"] * 6]]
    for names, values in table.items():
        means = [values[kind].mean().item() for kind in (answers.correct, ~answers.correct)]
        numbers = [*means, values.min().item(), values.max().item(), values.sum().item()]
        share = f"{(values != 0).float().mean().item():.0%}"
        rows.append([", ".join(names), _settings(names[0]), share, *map(_signed, numbers)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _by_answer(records: list[dict], answers: Rollouts, table: Table) -> list[str]:
    header = ["group", "answer", "expected", "correct", "tokens", "H", *(names[0] for names in table)]
    rows = [header, ["---:", "---", "---", "---", *["---:"] * (len(header) - 4)]]
    lengths = answers.lengths.tolist()
    for index, record in enumerate(records):
        # A bar would end the cell.
        said = record["text"].strip().replace("|", "\\|").replace("\n", " ")
        known = [str(record["group"]), f"`{said}`" if said else "", record["expected"]]
        known += ["yes" if answers.correct[index] else "no", str(lengths[index])]
        known.append(f"{answers.uncertainty[index].item():.2f}")
        rows.append([*known, *(_signed(values[index].item()) for values in table.values())])
    return [f"| {' | '.join(row)} |" for row in rows]


def _settings(name: str) -> str:
    usual = GRPO.advantage.to_dict()
    recipe = next(recipe for recipe in RECIPES.values() if recipe.name == name)
    changed = {key: value for key, value in recipe.advantage.to_dict().items() if value != usual[key]}
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "as GRPO"


def _signed(value: float) -> str:
    # What float32 leaves of a sum that cancels is nothing.
    return "0" if abs(value) < 1e-6 else f"{value:+.2f}"


if __name__ == "__main__":
    sys.exit(main())
