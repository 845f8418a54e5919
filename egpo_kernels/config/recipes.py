"""Published methods as presets: data, every setting that differs from the row's parent visible."""

from reprlib import repr as shown

from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Recipe

EGPO = Recipe(
    name="EGPO",
    advantage=AdvantageConfig(
        weight="inverse_uncertainty", clamp="asymmetric", weight_bounds=(0.8, 2.0), all_wrong="negative", nsr_scale=1.0
    ),
    loss=PolicyLossConfig(clip_low=0.2, clip_high=0.2, reduction="token_mean"),
)
"""Metacognitive entropy calibration (arXiv 2602.22751, Eq. 2-13; token mean as in the authors' runs)."""

EGPO_C1 = EGPO.replace(name="EGPO_C1", clamp="symmetric")
"""EGPO with both bounds for every answer (arXiv 2602.22751, ablation C1)."""

EGPO_C2 = EGPO.replace(name="EGPO_C2", clamp="negative_only")
"""EGPO with only the incorrect side one-sided (arXiv 2602.22751, ablation C2)."""

EGPO_C3 = EGPO.replace(name="EGPO_C3", clamp="positive_only")
"""EGPO with only the correct side one-sided (arXiv 2602.22751, ablation C3)."""

EGPO_C4 = EGPO.replace(name="EGPO_C4", lock_all_wrong=True)
"""EGPO with weight 1 on groups that the all-wrong rule applies to (arXiv 2602.22751, ablation C4)."""

EGPO_C5 = EGPO.replace(name="EGPO_C5", renorm="after")
"""EGPO with weights renormalised after the clamp (arXiv 2602.22751, Eq. 9, ablation C5)."""

EGPO_C6 = EGPO.replace(name="EGPO_C6", renorm="before")
"""EGPO with weights renormalised before the clamp (arXiv 2602.22751, Eq. 9, ablation C6)."""

GRPO = Recipe(
    name="GRPO",
    advantage=AdvantageConfig(baseline="mean", scale="group_std", weight="none", clamp="none", all_wrong="zero"),
    loss=PolicyLossConfig(clip_low=0.2, clip_high=0.2, reduction="seq_mean_token_mean"),
)
"""Group-normalised rewards, mean over each response (DeepSeekMath, arXiv 2402.03300, Eq. 3)."""

DAPO = GRPO.replace(name="DAPO", clip_low=0.2, clip_high=0.28, reduction="token_mean")
"""Clip-higher and token mean (arXiv 2503.14476, Eq. 8). Its dynamic sampling and overlong penalty are
`egpo_kernels.informative_groups` and `egpo_kernels.soft_overlong_penalty`.
"""

DR_GRPO = GRPO.replace(name="DR_GRPO", scale="none", reduction="seq_mean_token_sum_norm")
"""No standard deviation, sums over one constant length (arXiv 2503.20783): give it by ``replace(norm_length=...)``."""

GSPO = GRPO.replace(name="GSPO", ratio="sequence", clip_low=3e-4, clip_high=4e-4)
"""One ratio a sequence (arXiv 2507.18071, Eq. 5 and 7)."""

EDGE_GRPO = GRPO.replace(
    name="EDGE_GRPO", weight="inverse_uncertainty", statistic="shannon", clamp="none", reduction="token_mean"
)
"""Advantages over a response's share of its group's mean Shannon entropy (arXiv 2507.21848)."""

NSR = GRPO.replace(
    name="NSR", baseline="correctness", positive_scale=0.0, negative_scale=1.0, scale="none", reduction="token_mean"
)
"""Negative sample reinforcement: only incorrect answers teach (arXiv 2506.01347)."""

PSR = NSR.replace(name="PSR", positive_scale=1.0, negative_scale=0.0)
"""Positive sample reinforcement: only correct answers teach (arXiv 2506.01347)."""

W_REINFORCE = NSR.replace(name="W_REINFORCE", positive_scale=0.1, negative_scale=1.0)
"""Weighted REINFORCE: correct answers count a tenth (arXiv 2506.01347)."""

RLOO = GRPO.replace(name="RLOO", baseline="leave_one_out", scale="none", reduction="seq_mean_token_sum")
"""REINFORCE leave-one-out: the others of the group are the baseline (arXiv 2402.14740)."""

REINFORCE_PP_BASELINE = GRPO.replace(name="REINFORCE_PP_BASELINE", scale="batch_whiten", reduction="token_mean")
"""REINFORCE++ with a baseline: less the group's mean, whitened over the batch's tokens (arXiv 2501.03262)."""

LITE_PPO = GRPO.replace(name="LITE_PPO", scale="batch_std", reduction="token_mean")
"""Lite PPO: less the group's mean, over the batch's standard deviation (arXiv 2508.08221)."""

MAXRL = GRPO.replace(name="MAXRL", scale="group_mean", reduction="token_mean")
"""Maximum likelihood RL: relative to the group's mean reward (arXiv 2602.02710)."""

CISPO = GRPO.replace(name="CISPO", surrogate="cispo", clip_low=1.0, clip_high=4.0, reduction="token_mean")
"""A capped, undifferentiated ratio weighs each log-prob (MiniMax-M1, arXiv 2506.13585); 1.0 is no lower bound."""

SAPO = GRPO.replace(name="SAPO", surrogate="sapo", tau_positive=1.0, tau_negative=1.05)
"""A soft gate in place of the clip (arXiv 2511.20347)."""

GMPO = GRPO.replace(name="GMPO", surrogate="gmpo", clip_low=0.4, clip_high=0.4)
"""Geometric mean of a sequence's ratios, each clipped by 0.4 nats on one side (arXiv 2507.20673)."""

RECIPES: dict[str, Recipe] = {
    recipe.name.lower(): recipe
    for recipe in (
        *(EGPO, EGPO_C1, EGPO_C2, EGPO_C3, EGPO_C4, EGPO_C5, EGPO_C6),
        *(GRPO, DAPO, DR_GRPO, GSPO, EDGE_GRPO, NSR, PSR, W_REINFORCE, RLOO),
        *(REINFORCE_PP_BASELINE, LITE_PPO, MAXRL, CISPO, SAPO, GMPO),
    )
}
"""Every recipe by its name in lower case."""


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
        raise ValueError(f"recipe is {shown(recipe)}; it must be a Recipe or one of {', '.join(RECIPES)}")
    return RECIPES[recipe.lower()]
