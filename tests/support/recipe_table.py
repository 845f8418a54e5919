"""The tables of recipes, made of the presets and their docstrings: python -m tests.support.recipe_table"""

import ast
import itertools
import re
from pathlib import Path

from egpo_kernels.config import recipes
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Recipe
from tests.support.page import draw, markdown

HEADER = ["recipe", "source", "advantage", "weight", "all wrong", "loss", "reduction"]
ABLATION = re.compile(r"EGPO_C\d")
ABLATIONS = "EGPO with other weight bounds, all-wrong rule or renormalised weights: the paper's ablations"


def sources() -> dict[str, tuple[str, str]]:
    """What the docstring under each preset says before it names the paper, and the paper."""
    body = ast.parse(Path(recipes.__file__).read_text()).body
    found = {}
    for preset, text in itertools.pairwise(body):
        if isinstance(preset, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            said = re.match(r"(.*?)\s+\([^()]*arXiv (\d{4}\.\d{5})", text.value.value, re.DOTALL)
            found[preset.targets[0].id] = said.groups()
    return found


def advantage_cell(config: AdvantageConfig) -> str:
    if config.baseline == "correctness":
        return f"{config.positive_scale:g} if correct, else {0 - config.negative_scale:g}"
    base = {"mean": "r - group mean", "leave_one_out": "r - mean of the others", "none": "r"}[config.baseline]
    scales = {
        "group_std": f"({base}) / group std",
        "batch_std": f"({base}) / batch std",
        "batch_whiten": f"{base}, whitened over the batch's tokens",
        "group_mean": f"({base}) / group mean",
        "none": base,
    }
    return scales[config.scale]


def weight_cell(config: AdvantageConfig) -> str:
    if config.weight == "none":
        return "1"
    low, high = (f"{bound:g}" for bound in config.weight_bounds)
    one_sided, both = (f"[1, {high}]", f"[{low}, 1]"), (f"[{low}, {high}]", f"[{low}, {high}]")
    right, wrong = {
        "asymmetric": one_sided,
        "symmetric": both,
        "negative_only": (both[0], one_sided[1]),
        "positive_only": (one_sided[0], both[1]),
        "none": ("", ""),
    }[config.clamp]
    cell = "mean H / H" if config.statistic == "nll" else "mean entropy / entropy"
    cell += f"; correct `{right}`, incorrect `{wrong}`" if right else ""
    cell += f"; renormalised {config.renorm} the clamp" if config.renorm != "none" else ""
    return cell + ("; 1 in all-wrong groups" if config.lock_all_wrong else "")


def loss_cell(config: PolicyLossConfig) -> str:
    if config.surrogate == "cispo":
        return f"cispo, ratio at most {1 + config.clip_high if config.ratio_cap is None else config.ratio_cap:g}"
    if config.surrogate == "sapo":
        return f"sapo, tau {config.tau_positive:g} / {config.tau_negative:g}"
    if config.surrogate == "gmpo":
        return f"gmpo, log-ratios {-config.clip_low:g} / {config.clip_high:g}"
    return f"{config.ratio} ratio, clip {config.clip_low:g} / {config.clip_high:g}"


def row(recipe: Recipe, source: str) -> list[str]:
    advantage = recipe.advantage
    penalty = "0" if advantage.all_wrong == "zero" else f"{-advantage.nsr_scale:g} each"
    return [
        f"`{recipe.name}`",
        source,
        advantage_cell(advantage),
        weight_cell(advantage),
        penalty if advantage.compares else "-",
        loss_cell(recipe.loss),
        f"`{recipe.loss.reduction}`",
    ]


def recipe_table() -> str:
    """Markdown, a row for each preset with its settings."""
    papers = sources()
    return markdown([HEADER, *(row(it, papers[it.name][1]) for it in recipes.RECIPES.values())])


def short_table() -> str:
    """Markdown, a row for each method in a line of its own; a method's ablations share one."""
    found = sources()
    rows = [
        [f"`{name}`", said, f"[{paper}](https://arxiv.org/abs/{paper})"]
        for name, (said, paper) in found.items()
        if not ABLATION.fullmatch(name)
    ]
    ablations = [name for name in found if ABLATION.fullmatch(name)]
    first, last = (f"`{ablations[place]}`" for place in (0, -1))
    rows.insert(1, [f"{first} to {last}", ABLATIONS, rows[0][2]])
    return markdown([["recipe", "what it is", "paper"], *rows])


if __name__ == "__main__":
    draw("recipes", recipe_table())
    draw("recipes in short", short_table())
