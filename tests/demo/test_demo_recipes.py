"""The demo's table of recipes, from a file of saved answers to text and picture."""

import json
import math
import re
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
from demo import recipes as demo_recipes
from demo import rollouts
from egpo_kernels import group_advantages
from egpo_kernels.recipes import EGPO, RECIPES

GROUP_SIZE = 4
# Step 1: mixed and all wrong. Step 2: mixed, all wrong, all correct. Step 3: the same.
CORRECT = {1: ["1000", "0000"], 2: ["0000", "0101", "1111"], 3: ["0111", "0000", "1111"]}


def make_records():
    generator = torch.Generator().manual_seed(0)
    records = []
    for step, groups in CORRECT.items():
        for group, kinds in enumerate(groups):
            for kind in kinds:
                length = int(torch.randint(1, 6, (), generator=generator))
                log_probs = torch.randn(length, generator=generator).abs().neg()
                record = {"step": step, "group": group, "expected": "7", "text": " a|b", "reward": float(kind)}
                record |= {"ended": bool(length % 2), "log_probs": log_probs.tolist()}
                record["entropies"] = (-0.5 * log_probs).tolist()
                records.append(record)
    return records


@pytest.fixture
def folder(tmp_path):
    (tmp_path / rollouts.FILE).write_text("".join(json.dumps(record) + "\n" for record in make_records()))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo.recipes", *map(str, arguments)])
    return demo_recipes.main()


def rows(text, first):
    """Cells of the table whose header begins with this word."""
    table = re.search(rf"^\| {first} \|.*?(?=\n\n|\Z)", text, re.M | re.S).group().splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_every_recipe_and_every_answer_is_in_the_text(folder, monkeypatch):
    assert run(monkeypatch, folder) == 0
    text = (folder / "recipes.md").read_text()
    assert "step 2 of a demo run" in text and "12 answers to 3 prompts" in text
    names = [name for row in rows(text, "recipes")[2:] for name in row[0].split(", ")]
    assert sorted(names) == sorted(recipe.name for recipe in RECIPES.values())
    header, _, *answers = rows(text, "group")
    assert len(answers) == 12
    assert {len(row) for row in answers} == {len(header)}
    assert (folder / "recipes.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_those_of_group_advantages(folder, monkeypatch):
    run(monkeypatch, folder, "--step", 1, "--out", folder / "new")
    header, _, *answers = rows((folder / "new" / "recipes.md").read_text(), "group")
    chosen = [record for record in make_records() if record["step"] == 1]
    width = max(len(record["log_probs"]) for record in chosen)
    padded = torch.tensor([record["log_probs"] + [0.0] * (width - len(record["log_probs"])) for record in chosen])
    mask = torch.tensor([[t < len(record["log_probs"]) for t in range(width)] for record in chosen])
    rewards = torch.tensor([record["reward"] for record in chosen])
    wanted = group_advantages(GROUP_SIZE, rewards, padded, mask, config=EGPO.advantage)
    column = header.index("EGPO")
    found = {(row[5], float(row[column])) for row in answers}
    pairs = zip(wanted.uncertainty.tolist(), wanted.advantages.tolist(), strict=True)
    assert found == {(f"{h:.2f}", float(f"{a:.2f}")) for h, a in pairs}


def test_order_inside_a_group():
    records = demo_recipes.in_order([record for record in make_records() if record["step"] == 2])
    assert [record["group"] for record in records] == sorted(record["group"] for record in records)
    mixed = [record for record in records if record["group"] == 1]
    assert [record["reward"] for record in mixed] == [1, 1, 0, 0]
    doubt = rollouts.pack(mixed).uncertainty.tolist()
    assert doubt[0] <= doubt[1] and doubt[2] <= doubt[3]


def test_auc_inside_groups():
    # 3 against 1 and 3: won and tied; 0 against 1 and 3: lost twice. 5 against 4: won.
    groups = [(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 0.0])), (torch.tensor([4.0]), torch.tensor([5.0]))]
    assert rollouts.auc_inside(groups) == 2.5 / 5
    assert math.isnan(rollouts.auc_inside([]))
    found = rollouts.pack(make_records()).mixed_groups()
    assert [(len(right), len(wrong)) for right, wrong in found] == [(1, 3), (2, 2), (3, 1)]


def test_spans_of_answers():
    answers = rollouts.pack(make_records())
    spans = answers.spans()
    assert int(spans["end token alone"].sum()) == int(answers.ended.sum())
    assert torch.equal(spans["without end token"] ^ spans["end token alone"], spans["whole answer"])
    assert int(spans["whole answer"].sum()) == int(answers.lengths.sum())


@pytest.mark.parametrize(
    "arguments, message",
    [(["nowhere"], "folder is 'nowhere'; it must be"), (["{folder}", "--step", "9"], "step is 9; it must be")],
)
def test_bad_arguments(folder, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, *(argument.format(folder=folder) for argument in arguments))
    assert message in capsys.readouterr().err
