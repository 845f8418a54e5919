"""Published methods as presets: one row each, every setting that differs from the row's parent visible."""

from egpo_kernels.types import AdvantageConfig, PolicyLossConfig, Recipe

EGPO = Recipe(
    name="EGPO",
    advantage=AdvantageConfig(
        weight="inverse_uncertainty", clamp="asymmetric", weight_bounds=(0.8, 2.0), all_wrong="negative", nsr_scale=1.0
    ),
    loss=PolicyLossConfig(clip_low=0.2, clip_high=0.2, reduction="token_mean"),
)
"""EGPO: metacognitive entropy calibration (arXiv 2602.22751, Eq. 2-13; token mean as in the authors' runs)."""

GRPO = Recipe(
    name="GRPO",
    advantage=AdvantageConfig(weight="none", clamp="none", all_wrong="zero"),
    loss=PolicyLossConfig(clip_low=0.2, clip_high=0.2, reduction="seq_mean_token_mean"),
)
"""GRPO: group-normalised rewards, mean over each response (DeepSeekMath, arXiv 2402.03300, Eq. 3)."""

RECIPES: dict[str, Recipe] = {"egpo": EGPO, "grpo": GRPO}


def get(recipe: str | Recipe) -> Recipe:
    """Return the recipe of that name (in any case), or the recipe itself.

    Raises:
        ValueError: No recipe has that name.
        TypeError: Neither a name nor a `Recipe`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe is {type(recipe).__name__}; it must be a Recipe or one of {', '.join(RECIPES)}")
    if recipe.lower() not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; it must be a Recipe or one of {', '.join(RECIPES)}")
    return RECIPES[recipe.lower()]
