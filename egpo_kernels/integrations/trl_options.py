"""What the options of TRL's GRPOConfig are in a recipe (read from TRL 1.16)."""

import dataclasses
from typing import Any

from trl import GRPOConfig

from egpo_kernels import recipes
from egpo_kernels.types import PolicyLossConfig, Recipe
from egpo_kernels.validation import check_choice

LOSSES = {
    "dapo": {"surrogate": "clip", "reduction": "token_mean"},
    "bnpo": {"surrogate": "clip", "reduction": "token_mean"},
    "grpo": {"surrogate": "clip", "reduction": "seq_mean_token_mean"},
    "dr_grpo": {"surrogate": "clip", "reduction": "seq_mean_token_sum_norm"},
    "luspo": {"surrogate": "clip", "reduction": "seq_mean_token_sum"},
    "cispo": {"surrogate": "cispo", "reduction": "token_mean"},
    "sapo": {"surrogate": "sapo", "reduction": "seq_mean_token_mean"},
}
"""``loss_type``; the counts of bnpo are the micro-batch's own."""
RENAMED = {
    "delta": "dual_clip",
    "importance_sampling_level": "ratio",
    "sapo_temperature_pos": "tau_positive",
    "sapo_temperature_neg": "tau_negative",
}
"""Options that are a setting by another name."""
DEFAULTS = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}


def adjusted(recipe: Recipe | str, args: GRPOConfig) -> Recipe:
    """``recipe`` as ``args`` change it: an option that is not at its default is a setting.

    Raises:
        ValueError: An option that no recipe has, or settings that do not go together.
    """
    check_choice("args.loss_type", args.loss_type, tuple(LOSSES))
    check_choice("args.multi_objective_aggregation", args.multi_objective_aggregation, ("sum_then_normalize",))
    made = recipes.get(recipe)
    given = {name: value for name, value in vars(args).items() if value != DEFAULTS.get(name)}
    changed: dict[str, Any] = {ours: given[theirs] for theirs, ours in RENAMED.items() if theirs in given}
    if "loss_type" in given:
        changed |= LOSSES[args.loss_type]
    if "scale_rewards" in given:
        changed["scale"] = {"batch": "batch_std", "none": "none"}[args.scale_rewards]
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if "epsilon" in given:
        changed["clip_low"] = args.epsilon
    if changed.get("surrogate", made.loss.surrogate) != "cispo":
        changed |= {"clip_high": high} if given.keys() & {"epsilon", "epsilon_high"} else {}
    elif given.keys() & {"loss_type", "epsilon_high"}:
        changed["ratio_cap"] = high  # TRL's bound is the ratio's own
    if "beta" in given:
        changed |= {"kl_coef": args.beta, "kl_times_ratio": args.use_bias_correction_kl}
    made = made.replace(**changed)
    if made.loss.reduction == "seq_mean_token_sum_norm" and made.loss.norm_length is None:
        made = made.replace(norm_length=float(args.max_completion_length))
    if made.loss.kl_coef != args.beta:
        raise ValueError(
            f"args.beta is {args.beta} with kl_coef {made.loss.kl_coef} in the recipe; they must be equal, because TRL "
            "loads a reference only for beta"
        )
    if made.loss.reduction in ("sum", "none"):
        raise ValueError(
            f"recipe has reduction {made.loss.reduction!r}; it must be a mean, for micro-batches to add up"
        )
    return made


def nearest_loss_type(loss: PolicyLossConfig, args: GRPOConfig) -> str:
    """The ``loss_type`` by which TRL reports its metrics; sapo's are none."""
    alike = [name for name, settings in LOSSES.items() if settings["surrogate"] == loss.surrogate]
    same = [name for name in alike if LOSSES[name]["reduction"] == loss.reduction]
    return args.loss_type if args.loss_type in same else [*same, *alike, "sapo"][0]
