"""Published methods as presets: each shows the settings that differ from the preset it is made from."""

from reprlib import repr as shown

from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Recipe

EGPO = Recipe(
    name="EGPO",
    advantage=AdvantageConfig(
        weight="inverse_uncertainty", clamp="asymmetric", weight_bounds=(0.8, 2.0), all_wrong="negative", nsr_scale=1.0
    ),
    loss=PolicyLossConfig(clip_low=0.2, clip_high=0.2, reduction="token_mean"),
)
"""Metacognitive entropy calibration: advantages weighted by certainty (arXiv 2602.22751, Eq. 2-13; ``token_mean`` as in
the authors' runs).
"""

EGPO_C1 = EGPO.replace(name="EGPO_C1", clamp="symmetric")
"""EGPO with both weight bounds for every answer (arXiv 2602.22751, ablation C1)."""

EGPO_C2 = EGPO.replace(name="EGPO_C2", clamp="negative_only")
"""EGPO with both weight bounds for correct answers, at most 1 for incorrect ones (arXiv 2602.22751, ablation C2)."""

EGPO_C3 = EGPO.replace(name="EGPO_C3", clamp="positive_only")
"""EGPO with both weight bounds for incorrect answers, at least 1 for correct ones (arXiv 2602.22751, ablation C3)."""

EGPO_C4 = EGPO.replace(name="EGPO_C4", lock_all_wrong=True)
"""EGPO with weight 1 in all-wrong groups (arXiv 2602.22751, ablation C4)."""

EGPO_C5 = EGPO.replace(name="EGPO_C5", renorm="after")
"""EGPO with weights divided by their group's mean after the clamp (arXiv 2602.22751, Eq. 9, ablation C5)."""

EGPO_C6 = EGPO.replace(name="EGPO_C6", renorm="before")
"""EGPO with weights divided by their group's mean before the clamp (arXiv 2602.22751, Eq. 9, ablation C6)."""

GRPO = Recipe(
    name="GRPO",
    advantage=AdvantageConfig(baseline="mean", scale="group_std", weight="none", clamp="none", all_wrong="zero"),
    loss=PolicyLossConfig(clip_low=0.2, clip_high=0.2, reduction="seq_mean_token_mean"),
)
"""Rewards normalised by their group; mean over each response (DeepSeekMath, arXiv 2402.03300, Eq. 3)."""

DAPO = GRPO.replace(name="DAPO", clip_low=0.2, clip_high=0.28, reduction="token_mean")
"""A higher upper clip, and the mean over all tokens (arXiv 2503.14476, Eq. 8). Its dynamic sampling and length penalty
are `egpo_kernels.informative_groups` and `egpo_kernels.soft_overlong_penalty`.
"""

DR_GRPO = GRPO.replace(name="DR_GRPO", scale="none", reduction="seq_mean_token_sum_norm")
"""No division by the standard deviation; token losses are summed and divided by a constant length (arXiv 2503.20783).
Set that length: ``DR_GRPO.replace(norm_length=...)``.
"""

GSPO = GRPO.replace(name="GSPO", ratio="sequence", clip_low=3e-4, clip_high=4e-4)
"""One ratio for each sequence (arXiv 2507.18071, Eq. 5 and 7)."""

EDGE_GRPO = GRPO.replace(
    name="EDGE_GRPO", weight="inverse_uncertainty", statistic="shannon", clamp="none", reduction="token_mean"
)
"""Advantages times the group's mean Shannon entropy, divided by the response's own (arXiv 2507.21848)."""

NSR = GRPO.replace(
    name="NSR", baseline="correctness", positive_scale=0.0, negative_scale=1.0, scale="none", reduction="token_mean"
)
"""Negative sample reinforcement: only incorrect answers have a gradient (arXiv 2506.01347)."""

PSR = NSR.replace(name="PSR", positive_scale=1.0, negative_scale=0.0)
"""Positive sample reinforcement: only correct answers have a gradient (arXiv 2506.01347)."""

W_REINFORCE = NSR.replace(name="W_REINFORCE", positive_scale=0.1, negative_scale=1.0)
"""Weighted REINFORCE: advantage 0.1 for correct answers, -1 for incorrect ones (arXiv 2506.01347)."""

RLOO = GRPO.replace(name="RLOO", baseline="leave_one_out", scale="none", reduction="seq_mean_token_sum")
"""REINFORCE leave-one-out: the baseline is the mean reward of the others in the group (arXiv 2402.14740)."""

REINFORCE_PP_BASELINE = GRPO.replace(name="REINFORCE_PP_BASELINE", scale="batch_whiten", reduction="token_mean")
"""REINFORCE++ with a baseline: reward minus group mean, whitened over the batch's tokens (arXiv 2501.03262)."""

LITE_PPO = GRPO.replace(name="LITE_PPO", scale="batch_std", reduction="token_mean")
"""Lite PPO: reward minus group mean, divided by the batch's standard deviation (arXiv 2508.08221)."""

MAXRL = GRPO.replace(name="MAXRL", scale="group_mean", reduction="token_mean")
"""Maximum likelihood RL: reward minus group mean, divided by the group mean (arXiv 2602.02710)."""

CISPO = GRPO.replace(name="CISPO", surrogate="cispo", clip_low=1.0, clip_high=4.0, reduction="token_mean")
"""Each log-prob times a capped ratio without gradient (MiniMax-M1, arXiv 2506.13585); ``clip_low=1.0`` is no bound."""

SAPO = GRPO.replace(name="SAPO", surrogate="sapo", tau_positive=1.0, tau_negative=1.05)
"""A soft gate instead of the clip (arXiv 2511.20347)."""

GMPO = GRPO.replace(name="GMPO", surrogate="gmpo", clip_low=0.4, clip_high=0.4)
"""Geometric mean of a sequence's ratios, each clipped on one side, by 0.4 nats (arXiv 2507.20673)."""

RECIPES: dict[str, Recipe] = {
    recipe.name.lower(): recipe
    for recipe in (
        *(EGPO, EGPO_C1, EGPO_C2, EGPO_C3, EGPO_C4, EGPO_C5, EGPO_C6),
        *(GRPO, DAPO, DR_GRPO, GSPO, EDGE_GRPO, NSR, PSR, W_REINFORCE, RLOO),
        *(REINFORCE_PP_BASELINE, LITE_PPO, MAXRL, CISPO, SAPO, GMPO),
    )
}
"""Every recipe; the key is its name in lower case."""


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
