"""The documentation site lists every page, and every public name has a place in its API pages."""

import ast
import importlib
import re

import pytest

import egpo_kernels as ek
from egpo_kernels import diagnostics
from egpo_kernels.formulas import metrics
from tests.support.page import PAGES, ROOT, at_hand, run

pytestmark = pytest.mark.cpu

DOCS = ROOT / "docs"
RECIPES = ROOT / "egpo_kernels" / "config" / "recipes.py"  # of which egpo_kernels.recipes is all
PLACES = [
    place
    for page in DOCS.glob("api/*.md")
    for place in re.findall(r"^::: egpo_kernels\.(\S+)$", page.read_text(), re.MULTILINE)
]


def defined(path, kinds):
    """Names that a module defines by statements of these kinds, or imports to pass them on: ``import x as x``."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, kinds):
            targets = getattr(node, "targets", None) or [getattr(node, "target", node)]
            names |= {target.id if isinstance(target, ast.Name) else target.name for target in targets}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
    return {name for name in names if not name.startswith("_")}


def public_names():
    """What users import, by the path after ``egpo_kernels.``; of a training stack's module what its page imports."""
    yield from (name for name in ek.__all__ if name != "recipes")
    everything = (ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    yield from (f"recipes.{name}" for name in defined(RECIPES, everything))
    yield from (f"diagnostics.{name}" for name in diagnostics.__all__)
    stacks = {name for text in PAGES.values() for name in re.findall(r"egpo_kernels\.integrations\.(\w+)", text)}
    assert {"transformers", "trl", "verl", "openrlhf", "slime"} <= stacks
    for stack in stacks:
        module = ROOT / "egpo_kernels" / "integrations" / f"{stack}.py"
        yield from (f"integrations.{stack}.{name}" for name in defined(module, (ast.FunctionDef, ast.ClassDef)))


def test_every_public_name_has_one_place():
    names = list(public_names())
    assert {"egpo_loss", "recipes.get", "recipes.RECIPES", "integrations.verl.engine_loss"} <= set(names)
    assert sorted(PLACES) == sorted(names)


def test_the_api_page_lists_what_the_others_hold():
    listed = set(re.findall(r"`(\w+)`", (DOCS / "api" / "index.md").read_text()))
    assert {name for name in ek.__all__ if name != "recipes"} <= listed


def test_every_metric_is_explained():
    code = set(re.findall(r"`([\w/.]+)`", (DOCS / "api" / "metrics.md").read_text()))
    known = {key for table in metrics.TABLES for key in table.keys}
    stems = {name.removesuffix("...") for name in code if name.endswith("/...")}
    named = {
        name
        for name in code
        if name.startswith(("policy/", "egpo/", "support/", "vocab_group/")) and not name.endswith("...")
    }
    endings = re.compile(r"(count/)?sum|mean|min|max")
    assert named <= known and all(any(key.startswith(stem) for key in known) for stem in stems)
    left = {key for key in known - named if not any(endings.fullmatch(key.removeprefix(stem)) for stem in stems)}
    assert not left


def test_navigation_lists_every_page():
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_start_page_makes_a_gradient():
    names = run("docs/index.md", at_hand())
    assert names["logits"].grad.abs().sum() > 0 and names["metrics"]["policy/tokens/sum"] == names["mask"].sum()


def test_names_in_prose_and_pictures_are_links():
    pytest.importorskip("mkdocs", reason="the docs extra is not installed (make docs installs it)")
    pages = importlib.import_module("website.pages")
    kept = "<h2><code>egpo_loss</code></h2><pre>x <code>egpo_loss</code></pre><code>mask</code>"
    argument = '<tr class="doc-section-item"><td><code>rollout_weights</code></td>'
    html = pages.on_page_content(f"{kept}{argument}<td><code>roc</code></td></tr>")
    link = '<autoref identifier="egpo_kernels.diagnostics.roc"><code>roc</code></autoref>'
    assert html == f"{kept}{argument}<td>{link}</td></tr>"
    assert (
        pages.on_page_content('<img alt="x" src="../x.png" />')
        == '<a href="../x.png"><img alt="x" src="../x.png" /></a>'
    )


@pytest.mark.parametrize("what", ['script src="https:', 'script async src="', 'link rel="stylesheet" href="https:'])
def test_a_page_loads_nothing_from_elsewhere(what):
    exceptions = pytest.importorskip(
        "mkdocs.exceptions", reason="the docs extra is not installed (make docs installs it)"
    )
    pages = importlib.import_module("website.pages")
    page = type("Page", (), {"file": type("File", (), {"src_uri": "index.md"})})
    own = '<a href="https://arxiv.org/abs/2602.22751">paper</a><script src="assets/x.js"></script>'
    own += '<link rel="canonical" href="https://example.org/"><link rel="stylesheet" href="assets/x.css">'
    assert pages.on_post_page(own, page) == own
    with pytest.raises(exceptions.PluginError, match=rf"index\.md loads <{what}"):
        pages.on_post_page(f'{own}<{what}//example.org/x">', page)


def test_settings_show_the_defaults_that_they_have():
    griffe = pytest.importorskip("griffe", reason="the docs extra is not installed (make docs installs it)")
    settings = importlib.import_module("website.settings")
    package = griffe.load("egpo_kernels", search_paths=[ROOT], extensions=griffe.load_extensions(settings.Settings()))
    shown = {each.name: each.default for each in package["PolicyLossConfig"].parameters}
    assert shown["surrogate"] == "'clip'" and shown["clip_low"] == "0.2" and shown["norm_length"] == "None"
    assert {name for name in shown if name != "self"} == set(ek.PolicyLossConfig.__dataclass_fields__)
    arguments = package["Recipe"].docstring.parse("google")[1]
    assert [each.name for each in arguments.value] == ["name", "advantage", "loss"]
    assert arguments.value[1].default == "AdvantageConfig()"
