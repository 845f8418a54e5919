"""Settings, results, and the row tensors every backend is handed."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Config = TypeVar("Config", bound="_Checked")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _choice(*values: str) -> Any:
    return dataclasses.field(default=values[0], metadata={"choices": values})


def _number(
    default: float | None, low: float, high: float = math.inf, *, open_low: bool = False, optional: bool = False
) -> Any:
    bounds = {"low": low, "high": high, "open_low": open_low, "optional": optional}
    return dataclasses.field(default=default, metadata=bounds)


def check_number(
    name: str, value: Any, *, low: float, high: float, open_low: bool = False, optional: bool = False
) -> float | None:
    """Return ``value`` as a float, or raise naming what it must be."""
    if value is None and optional:
        return None
    wanted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
    wanted += " or None" if optional else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be {wanted}")
    # Not math.isfinite: a traced call has symbolic numbers.
    if not (low <= value <= high and abs(value) < math.inf) or (open_low and value == low):
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    return float(value)


class _Checked:
    """What the two settings classes share: every field is checked when the object is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if not field.init:
                continue
            name, value = f"{type(self).__name__}.{field.name}", getattr(self, field.name)
            if "choices" in field.metadata:
                choices = field.metadata["choices"]
                if value not in choices:
                    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
            elif "low" in field.metadata:
                object.__setattr__(self, field.name, check_number(name, value, **field.metadata))
            elif isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be True or False")
        self._check_together()
        # Opaque operators take strings, not objects: the settings travel as JSON, made once.
        object.__setattr__(self, "json", json.dumps(self.to_dict()))

    def _check_together(self) -> None:
        """Check what involves several fields."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON; `from_dict` reads them back."""
        fields = [field.name for field in dataclasses.fields(self) if field.init]  # type: ignore[arg-type]
        values = {name: getattr(self, name) for name in fields}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Make the settings from `to_dict`'s values; fields left out take their defaults."""
        check_keys(cls.__name__, values, [field.name for field in dataclasses.fields(cls) if field.init])  # type: ignore[arg-type]
        return cls(**values)


def check_keys(name: str, values: Mapping[str, Any], allowed: list[str]) -> None:
    """Raise when ``values`` is no mapping or holds a key outside ``allowed``."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is made from {type(values).__name__}; it must be a mapping of its fields")
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it must be one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig(_Checked):
    """How rewards and uncertainties of whole groups become advantages (EGPO, arXiv 2602.22751, Eq. 2, 5-13).

    Attributes:
        baseline: What is subtracted from a reward: the mean of its group.
        scale: What the difference is divided by: ``group_std`` (sample std, ddof 1, plus ``std_eps``) or ``none``.
        std_eps: Added to the standard deviation.
        weight: ``inverse_uncertainty`` (Eq. 7) or ``none`` (weight 1).
        statistic: The uncertainty H of a sequence: ``nll`` of its sampled tokens (Eq. 5/6) or mean ``shannon`` entropy.
        uncertainty_eps: Added to H in the weight's denominator.
        clamp: ``asymmetric`` (Eq. 8), ``symmetric`` (both sides use both bounds), ``negative_only`` / ``positive_only``
            (only the incorrect / correct side is one-sided, the other symmetric), ``none``.
        weight_bounds: ``(lambda_min, lambda_max)`` with ``0 <= lambda_min <= 1 <= lambda_max``.
        renorm: Divide weights by their group's mean: ``none``, ``after`` or ``before`` the clamp (Eq. 9).
        all_wrong: What collapsed groups without a correct answer get: ``negative`` (-nsr_scale each),
            ``negative_no_correct`` (also where rewards differ but nobody is correct), ``zero``.
        nsr_scale: Size of that penalty.
        lock_all_wrong: Weight 1 on groups the all-wrong rule applies to.
        singleton: Advantage of a group of one: ``zero`` or its ``raw`` reward.
        correct_threshold: A response is correct when its reward is above this, unless ``correct`` is given.

    Raises:
        ValueError: A setting outside its choices or range.
        TypeError: A setting of the wrong type.
    """

    baseline: str = _choice("mean")
    scale: str = _choice("group_std", "none")
    std_eps: float = _number(1e-6, 0.0)
    weight: str = _choice("inverse_uncertainty", "none")
    statistic: str = _choice("nll", "shannon")
    uncertainty_eps: float = _number(1e-5, 0.0, open_low=True)
    clamp: str = _choice("asymmetric", "symmetric", "negative_only", "positive_only", "none")
    weight_bounds: tuple[float, float] = (0.8, 2.0)
    renorm: str = _choice("none", "after", "before")
    all_wrong: str = _choice("negative", "negative_no_correct", "zero")
    nsr_scale: float = _number(1.0, 0.0)
    lock_all_wrong: bool = False
    singleton: str = _choice("zero", "raw")
    correct_threshold: float = _number(0.5, -math.inf)
    json: str = dataclasses.field(init=False, repr=False, compare=False)

    def _check_together(self) -> None:
        name, bounds = "AdvantageConfig.weight_bounds", self.weight_bounds
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(f"{name} is {bounds!r}; it must be a pair (lambda_min, lambda_max)")
        low = check_number(f"{name}[0]", bounds[0], low=0.0, high=1.0)
        high = check_number(f"{name}[1]", bounds[1], low=1.0, high=math.inf)
        object.__setattr__(self, "weight_bounds", (low, high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossConfig(_Checked):
    """The per-token policy loss and its reduction (EGPO, arXiv 2602.22751, Eq. 12).

    Attributes:
        surrogate: ``clip``, the clipped surrogate of PPO (arXiv 1707.06347).
        ratio: ``token``, or ``sequence``: exp of the mean log-ratio, shared by a sequence's tokens (GSPO, 2507.18071).
        clip_low: The ratio is clipped below at ``1 - clip_low``.
        clip_high: The ratio is clipped above at ``1 + clip_high``.
        dual_clip: With c given and a negative advantage the loss is at most ``-c A`` (arXiv 1912.09729).
        max_log_ratio: Log-ratios are clamped to +- this, in nats; no gradient flows where they are clamped.
        kl: Estimator of the KL to the reference: ``k1``, ``k2``, ``k3``.
        kl_coef: Factor of the KL term; above 0 it needs ``ref_log_probs``.
        entropy_coef: Factor of the entropy bonus.
        reduction: ``token_mean``, ``seq_mean_token_mean``, ``seq_mean_token_sum``, ``seq_mean_token_sum_norm``, ``sum``
            or ``none`` (per token).
        norm_length: The constant C of ``seq_mean_token_sum_norm``, in tokens.

    Raises:
        ValueError: A setting outside its choices or range.
        TypeError: A setting of the wrong type.
    """

    surrogate: str = _choice("clip")
    ratio: str = _choice("token", "sequence")
    clip_low: float = _number(0.2, 0.0, 1.0)
    clip_high: float = _number(0.2, 0.0)
    dual_clip: float | None = _number(None, 1.0, optional=True, open_low=True)
    # exp(60) is 1e26: float32 still holds it times an advantage of 1e12.
    max_log_ratio: float = _number(20.0, 0.0, 60.0, open_low=True)
    kl: str = dataclasses.field(default="k3", metadata={"choices": ("k1", "k2", "k3")})
    kl_coef: float = _number(0.0, 0.0)
    entropy_coef: float = _number(0.0, -math.inf)
    reduction: str = _choice(
        "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "sum", "none"
    )
    norm_length: float | None = _number(None, 0.0, open_low=True, optional=True)
    json: str = dataclasses.field(init=False, repr=False, compare=False)

    def _check_together(self) -> None:
        if (self.reduction == "seq_mean_token_sum_norm") != (self.norm_length is not None):
            raise ValueError(
                f"PolicyLossConfig.norm_length is {self.norm_length!r} with reduction {self.reduction!r}; it must be "
                "given (a length in tokens) with 'seq_mean_token_sum_norm' and left out otherwise"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One published method: its advantages and its policy loss.

    Attributes:
        name: The method's name.
        advantage: Group-level settings.
        loss: Token-level settings.
    """

    name: str = "EGPO"
    advantage: AdvantageConfig = AdvantageConfig()
    loss: PolicyLossConfig = PolicyLossConfig()

    def __post_init__(self) -> None:
        for name, kind in (("name", str), ("advantage", AdvantageConfig), ("loss", PolicyLossConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"Recipe.{name} is {type(value).__name__}; it must be {kind.__name__}")

    def replace(self, **settings: Any) -> "Recipe":
        """Return a copy with settings of either half changed by name: ``EGPO.replace(clip_high=0.28)``.

        Raises:
            ValueError: A name that is no setting, or a value out of range.
        """
        halves = {"advantage": self.advantage.to_dict(), "loss": self.loss.to_dict()}
        allowed = ["name", *halves["advantage"], *halves["loss"]]
        check_keys("Recipe.replace", settings, allowed)
        changed: dict[str, Any] = {"name": settings.get("name", self.name)}
        for half, kind in (("advantage", AdvantageConfig), ("loss", PolicyLossConfig)):
            own = {key: value for key, value in settings.items() if key in halves[half]}
            changed[half] = kind(**{**halves[half], **own})
        return Recipe(**changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON; `from_dict` reads them back."""
        return {"name": self.name, "advantage": self.advantage.to_dict(), "loss": self.loss.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Make a recipe from `to_dict`'s values.

        Raises:
            ValueError: An unknown key or a value out of range.
        """
        check_keys("Recipe", values, ["name", "advantage", "loss"])
        made = dict(values)
        if "advantage" in made:
            made["advantage"] = AdvantageConfig.from_dict(made["advantage"])
        if "loss" in made:
            made["loss"] = PolicyLossConfig.from_dict(made["loss"])
        return cls(**made)


Metrics = dict[str, Tensor]


class LossOutput(NamedTuple):
    """A loss and what was seen on the way: ``loss`` 0-d (or per token), ``metrics`` detached 0-d tensors."""

    loss: Tensor
    metrics: Metrics


class GroupAdvantages(NamedTuple):
    """Per-sequence results of `group_advantages`, each ``[S]`` and without gradient.

    ``advantages = weights * base``; ``uncertainty`` is H in nats per token, NaN for a sequence that has none.
    """

    advantages: Tensor
    weights: Tensor
    base: Tensor
    uncertainty: Tensor
    metrics: Metrics


class TokenLogProbs(NamedTuple):
    """Log-probabilities of the tokens and, when asked for, the entropy of each position, both in nats."""

    log_probs: Tensor
    entropy: Tensor | None


class Rows(NamedTuple):
    """What the backends are handed per token, flattened to ``[N]``; None where the caller gave nothing.

    ``mask`` says which rows are looked at; every other field may hold anything where it is False.
    """

    mask: Tensor
    tokens: Tensor | None = None
    temperature: Tensor | None = None
    advantages: Tensor | None = None
    factor: Tensor | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    rollout_weights: Tensor | None = None
