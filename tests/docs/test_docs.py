"""Every block of Python in the documentation runs, and does what the page says."""

import re

import pytest
import torch

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


def links(page):
    """What a page links to, relative to the repository."""
    written = re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page])
    for link in written + re.findall(r"""\b(?:src|srcset|href)="(?!https?:)([^"#]+)""", PAGES[page]):
        target = (ROOT / page).parent.joinpath(link).resolve()
        assert target.exists(), f"{page}: {link}"
        # The documentation is built from docs alone.
        assert page == "README.md" or target.is_relative_to(ROOT / "docs"), f"{page}: {link} leaves docs"
        yield target.relative_to(ROOT).as_posix()


def test_links_exist_and_lead_from_the_start_pages_to_every_page():
    leads = {page: set(links(page)) for page in PAGES}
    seen, todo = set(), ["README.md", "docs/index.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        todo += leads.get(page, set()) - seen
    assert set(PAGES) <= seen


def test_anchors_exist():
    for page, text in PAGES.items():
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
            target = (ROOT / page).parent.joinpath(link).resolve() if link else ROOT / page
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            found = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in found, f"{page}: {link}#{anchor}"


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
    assert names["table"].grad.abs().sum() > 0


def test_from_logits():
    names = at_hand()
    mask = names["mask"]
    names = run("docs/logits.md", names)
    assert names["logits"].grad.abs().sum() > 0 and names["metrics"]["policy/tokens/sum"] == mask.sum()
    assert_bits(names["tokens"][:, :-1], names["input_ids"][:, 1:], "tokens shifted by one")


def test_from_hidden_states():
    names = run("docs/hidden_states.md", at_hand())
    assert names["hidden"].grad.abs().sum() > 0 and names["lm_head"].weight.grad.abs().sum() > 0


def test_kept_sets_page():
    names = run("docs/kept_sets.md", at_hand())
    assert names["logits"].grad.abs().sum() > 0 and names["lm_head"].weight.grad.abs().sum() > 0
    assert names["support"].offsets.tolist() == [0, 0, 0, 0, 2, 3, 5, 5, 8, *[8] * 4]
    rows = names["mask"].sum()
    assert names["metrics"]["support/rows/sum"] == rows and names["metrics"]["support/kept/max"] == 2


def test_micro_batches_make_the_whole_batchs_gradient():
    names = run("docs/micro_batches.md", at_hand())
    assert names["metrics"]["policy/tokens/sum"] == names["mask"].sum()
    whole = at_hand()
    arguments = [whole[name] for name in ("tokens", "groups", "rewards")]
    logits = whole["model"](whole["tokens"])
    ek.egpo_loss(logits, *arguments, old_log_probs=whole["old_log_probs"], mask=whole["mask"]).loss.backward()
    torch.testing.assert_close(names["table"].grad, whole["table"].grad, rtol=1e-12, atol=1e-15)


def test_options_page_weighs_and_prices():
    names = run("docs/options.md", at_hand())
    names["loss"].backward()
    assert names["logits"].grad.abs().sum() > 0
    weights = names["weights"]
    assert weights.shape == (16,) and ((weights == 0) | ((weights >= 0.5) & (weights <= 2))).all()


def test_diagnostics_page():
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    names = run("docs/diagnostics.md", at_hand())
    assert 0 <= names["auc"] <= 1 and -1 <= names["spearman"] <= 1
    assert names["gap"] == names["gap"] != 0 and set(names["curves"]) == {"thinking", "answer"}
    assert "nats" in names["axes"].get_xlabel() + names["axes"].get_ylabel()


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
