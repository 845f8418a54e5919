"""The settings that kernels are checked with, by the name that says what is special: recipes, then what none has."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from egpo_kernels.config.recipes import RECIPES
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig

Either = AdvantageConfig | PolicyLossConfig
Config = TypeVar("Config", AdvantageConfig, PolicyLossConfig)

KL = {"kl_coef": 0.1}
KL_MAX = 0.25
"""Some estimates are above it, of the first kind some below minus it."""
NEEDS: dict[Any, dict[str, Any]] = {
    "kl": KL,
    "kl_times_ratio": KL,
    "seq_mean_token_sum_norm": {"norm_length": 8.0},
}
"""What a field, or a choice, has an effect with."""
LOSSES: dict[str, dict[str, Any]] = {
    "dual clip": {"dual_clip": 3.0},
    "cispo, both bounds": {"surrogate": "cispo", "ratio_cap": 1.5},
    "sapo, other gates": {"surrogate": "sapo", "tau_positive": 2.0, "tau_negative": 0.5},
    "bounded log-ratios": {"max_log_ratio": 1.0},
    "entropy bonus, KL": {"entropy_coef": 0.01, **KL, "kl_max": KL_MAX},
}
"""Numbers that no recipe has."""
ADVANTAGES: dict[str, dict[str, Any]] = {
    "other numbers": {
        "std_eps": 0.1,
        "uncertainty_eps": 0.1,
        "weight_bounds": (0.5, 1.5),
        "nsr_scale": 0.5,
        "correct_threshold": 0.2,
    },
}


def losses() -> dict[str, PolicyLossConfig]:
    """Every recipe's loss, every choice of every field, the KL's estimators clamped too, and numbers."""
    named = {name: _needed(recipe.loss) for name, recipe in RECIPES.items()}
    for field, value in _choices(PolicyLossConfig, list(named.values())):
        settings = NEEDS.get(field, {}) | NEEDS.get(value, {}) | {field: value}
        named[f"{field} {value}"] = PolicyLossConfig(**settings)
        if field == "kl":
            named[f"{field} {value}, kl_max"] = PolicyLossConfig(**settings, kl_max=KL_MAX)
    return _distinct(named | {name: PolicyLossConfig(**settings) for name, settings in LOSSES.items()})


def advantages() -> dict[str, AdvantageConfig]:
    """Every recipe's advantages, every choice of every field, and numbers."""
    named = {name: recipe.advantage for name, recipe in RECIPES.items()}
    for field, value in _choices(AdvantageConfig, list(named.values())):
        named[f"{field} {value}"] = AdvantageConfig(**{field: value})
    return _distinct(named | {name: AdvantageConfig(**settings) for name, settings in ADVANTAGES.items()})


def _needed(config: PolicyLossConfig) -> PolicyLossConfig:
    """With what it cannot do without."""
    return PolicyLossConfig(**config.to_dict() | NEEDS.get(config.reduction, {}))


def _choices(kind: type[Either], had: Sequence[Either]) -> Iterator[tuple[str, Any]]:
    """Choices, flags among them, that none of ``had`` has, or has without effect."""
    for field in dataclasses.fields(kind):
        values: list[Any] = [False, True] if isinstance(field.default, bool) else []
        for value in [*values, *field.metadata.get("choices", ())]:
            if not any(_has(config, field.name, value) for config in had):
                yield field.name, value


def _has(config: Either, field: str, value: Any) -> bool:
    needs = NEEDS.get(field, {})
    return getattr(config, field) == value and all(bool(getattr(config, name)) for name in needs)


def _distinct(named: dict[str, Config]) -> dict[str, Config]:
    """Each once, by the first of its names."""
    seen: dict[Config, str] = {}
    for name, config in named.items():
        seen.setdefault(config, name)
    return {name: config for config, name in seen.items()}
