"""What the options of TRL's GRPOConfig are in a recipe (read from TRL 1.16)."""

import dataclasses
from typing import Any

from trl import GRPOConfig

from egpo_kernels.config import recipes
from egpo_kernels.config.fields import renamed
from egpo_kernels.config.settings import PolicyLossConfig, Recipe
from egpo_kernels.inputs.validation import check_choice

LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {"surrogate": "clip", "reduction": "token_mean"},
    "bnpo": {"surrogate": "clip", "reduction": "token_mean"},
    "grpo": {"surrogate": "clip", "reduction": "seq_mean_token_mean"},
    "dr_grpo": {"surrogate": "clip", "reduction": "seq_mean_token_sum_norm"},
    "luspo": {"surrogate": "clip", "reduction": "seq_mean_token_sum"},
    "cispo": {"surrogate": "cispo", "reduction": "token_mean", "clip_low": 1.0},
    "sapo": {"surrogate": "sapo", "reduction": "seq_mean_token_mean"},
}
"""``loss_type``; the counts of bnpo are the micro-batch's own."""
RENAMED = {
    "delta": "dual_clip",
    "importance_sampling_level": "ratio",
    "sapo_temperature_pos": "tau_positive",
    "sapo_temperature_neg": "tau_negative",
}
"""Options that are a setting by another name; those below are not as simple."""
NAMES = {ours: theirs for theirs, ours in RENAMED.items()} | {
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "ratio_cap": "epsilon_high",
    "kl_coef": "beta",
    "surrogate": "loss_type",
}
"""What GRPOConfig calls our settings."""
CHOICES = {
    "loss_type": tuple(LOSSES),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize",),
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}


def adjusted(recipe: Recipe | str, args: GRPOConfig) -> Recipe:
    """``recipe`` as ``args`` change it: an option that is not at its default is a setting.

    Raises:
        ValueError: An option that no recipe has, or settings that do not go together.
    """
    for name, choices in CHOICES.items():
        check_choice(f"args.{name}", getattr(args, name), choices)
    base = recipes.get(recipe)
    given = {name: value for name, value in vars(args).items() if value != DEFAULTS.get(name)}
    changed: dict[str, Any] = {ours: given[theirs] for theirs, ours in RENAMED.items() if theirs in given}
    if "loss_type" in given:
        changed |= LOSSES[args.loss_type]
    if "scale_rewards" in given:
        changed["scale"] = {"batch": "batch_std", "none": "none"}[args.scale_rewards]
    changed |= _bounds(base.loss.surrogate, changed.get("surrogate", base.loss.surrogate), args, given)
    if "beta" in given:
        changed["kl_coef"] = args.beta
        if base.loss.kl_coef == 0 or "use_bias_correction_kl" in given:
            changed["kl_times_ratio"] = args.use_bias_correction_kl
    made = _replaced(base, changed)
    if made.loss.reduction == "seq_mean_token_sum_norm" and made.loss.norm_length is None:
        made = made.replace(norm_length=float(args.max_completion_length))
    _check(made, args, given)
    return made


def _bounds(before: str, surrogate: str, args: GRPOConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The bounds of the ratio: TRL's own, where its options name one, or another surrogate than the recipe's."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    lower, upper = "epsilon" in given, bool(given.keys() & {"epsilon", "epsilon_high"})
    switched = surrogate != before
    if surrogate == "cispo":
        if lower and "epsilon_high" in given:
            raise ValueError(
                f"args.epsilon is {args.epsilon} with epsilon_high {high} and cispo, which TRL does not bound below; "
                "it must be left at its default: a recipe's clip_low is a lower bound"
            )
        return {"ratio_cap": high} if switched or upper else {}  # TRL's bound is the ratio's own
    found: dict[str, Any] = {"ratio_cap": None} if switched else {}
    if lower or switched:
        found["clip_low"] = args.epsilon
    if upper or switched:
        found["clip_high"] = high
    return found


def _replaced(recipe: Recipe, changed: dict[str, Any]) -> Recipe:
    try:
        return recipe.replace(**changed)
    except (ValueError, TypeError) as error:
        names = {ours: f"args.{theirs}" for ours, theirs in NAMES.items() if ours in changed}
        raise ValueError(f"{renamed(error, names)} (recipe {recipe.name})") from error


def _check(recipe: Recipe, args: GRPOConfig, given: dict[str, Any]) -> None:
    loss = recipe.loss
    if loss.kl_coef != args.beta:
        raise ValueError(
            f"args.beta is {args.beta} with kl_coef {loss.kl_coef} in the recipe; they must be equal, because TRL "
            "loads a reference only for beta"
        )
    if loss.reduction in ("sum", "none"):
        raise ValueError(f"recipe has reduction {loss.reduction!r}; it must be a mean, for micro-batches to add up")
    if "delta" in given and args.delta < 1 + loss.clip_high:
        raise ValueError(
            f"args.delta is {args.delta}; it must be at least 1 + clip_high, {1 + loss.clip_high}: below that it caps "
            "positive advantages in TRL, and negative ones in dual clip"
        )


def nearest_loss_type(loss: PolicyLossConfig, args: GRPOConfig) -> str:
    """The ``loss_type`` by which TRL reports its metrics; sapo's are none."""
    alike = [name for name, settings in LOSSES.items() if settings["surrogate"] == loss.surrogate]
    same = [name for name in alike if LOSSES[name]["reduction"] == loss.reduction]
    return args.loss_type if args.loss_type in same else [*same, *alike, "sapo"][0]
