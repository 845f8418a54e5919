"""Every block of Python in the documentation runs, and does what the page says."""

import re

import pytest

import egpo_kernels as ek
from tests.support.accuracy import assert_bits
from tests.support.page import PAGES, ROOT, at_hand, blocks, run, shown
from tests.support.stack_table import STACKS, stack_table

pytestmark = pytest.mark.cpu


def test_every_page_with_code_is_run_by_a_test():
    tests = {path: path.read_text() for path in ROOT.glob("tests/**/test_*.py")}
    for page in PAGES:
        named = [
            path for path, text in tests.items() if re.search(rf"""["/]{re.escape(page.split("/")[-1])}["']""", text)
        ]
        assert named or not blocks(page), page


def test_every_page_is_linked_from_the_readme_and_links_exist():
    for page, text in PAGES.items():
        assert page == "README.md" or f"({page})" in PAGES["README.md"], page
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_stacks_are_those_of_the_table():
    assert shown("stacks") == stack_table(), "run python -m tests.support.stack_table"
    adapters = {path.name for path in (ROOT / "egpo_kernels" / "integrations").glob("[!_]*.py")}
    assert adapters == {file for stack in STACKS for file in stack.files}


def test_bad_input_says_what_the_page_prints(capsys):
    run("docs/bad_input.md", at_hand())
    printed = capsys.readouterr().out
    promised = re.findall(r"print\(.*\)  # (.*)$", PAGES["docs/bad_input.md"], re.MULTILINE)
    assert len(promised) == 2
    assert all(text.removesuffix("...").strip() in printed for text in promised)


def test_mathematics_by_hand():
    names = run("docs/mathematics.md")  # the page asserts its numbers
    correct, uncertain = names["rewards"] > 0.5, -names["old_log_probs"][:, 0] > 1
    # In the page's words: certainty saves no incorrect answer, uncertainty costs no correct one.
    weights = names["found"].weights
    assert weights[~correct & uncertain].max() < 1 and weights[~correct & ~uncertain].min() == 1 < weights[0]


def test_the_first_page_learns(capsys):
    first, second = blocks("docs/getting_started.md")
    exec(first, {})
    assert capsys.readouterr().out.startswith("reward 1.00")
    names = at_hand()
    exec(second, names)
    assert names["table"].grad.abs().sum() > 0


def test_performance_page_scales():
    names = run("docs/performance.md", at_hand())
    assert names["table"].grad.abs().sum() > 0 and names["lm_head"].weight.grad.abs().sum() > 0


def test_recipes_page_changes_what_it_says():
    names = run("docs/recipes.md", at_hand())
    assert names["mine"].loss.clip_high == 0.28 and names["softer"].advantage.nsr_scale == 0.25
    assert_bits(names["kept"], names["groups"] == 0, "groups that do not agree")


def test_every_recipe_of_the_page_exists():
    table = PAGES["docs/recipes.md"].split("## Which one")[1].split("## Changing")[0]
    named = {name for name in re.findall(r"`([a-z_0-9]+)`", table)} - {"norm_length"}
    assert named | {f"egpo_c{i}" for i in range(2, 6)} == set(ek.recipes.RECIPES)


def test_own_loop():
    names = at_hand()
    before = names["table"].detach().clone()
    plain, _ = blocks("docs/pytorch.md")  # the other needs accelerate
    exec(plain, names)
    assert (names["table"] - before).abs().max() > 0
    assert names["metrics"]["policy/ratio/max"] > 1.0001  # the second epoch is off-policy
    assert names["metrics"]["policy/tokens/sum"] == names["mask"].sum()
