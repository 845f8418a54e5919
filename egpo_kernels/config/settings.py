"""Settings of advantages and losses, and the recipe that holds both."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from egpo_kernels.config.fields import Checked, check_keys, check_number, check_pair, choice, number

SURROGATES = ("clip", "cispo", "sapo", "gmpo")
"""The policy losses of a token: functions of these names in both `surrogates.py`, in torch and for triton."""
MAX_LOG_RATIO = 60.0
"""exp(60) is 1e26: float32 still holds it times an advantage of 1e12."""
MAX_LOG_RATIO_TWICE = 40.0
"""exp(80) is 6e34: the KL k3 times the ratio."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig(Checked):
    """How rewards and uncertainties of whole groups become advantages (EGPO, arXiv 2602.22751, Eq. 2, 5-13).

    Attributes:
        baseline: What is subtracted from a reward: the ``mean`` of its group, or of the others in it
            (``leave_one_out``, arXiv 2402.14740). The other two ignore groups: ``none`` subtracts nothing,
            ``correctness`` replaces the reward by ``positive_scale`` or ``-negative_scale`` (arXiv 2506.01347).
        positive_scale: Advantage of a correct answer with baseline ``correctness``.
        negative_scale: Minus the advantage of an incorrect answer with baseline ``correctness``.
        scale: What the difference is divided by. ``group_std``: sample standard deviation (ddof 1) of the group plus
            ``std_eps``; ``batch_std``: that of all rewards; ``batch_whiten``: whitened over the batch's tokens in the
            mask (arXiv 2501.03262); ``group_mean``: group mean plus ``std_eps``, advantage 0 if the mean is not
            positive; ``none``. With baseline ``correctness`` or ``none`` only the batch's scales have an effect.
        std_eps: Added to the standard deviation or the mean.
        weight: ``inverse_uncertainty`` (Eq. 7) or ``none`` (weight 1).
        statistic: The uncertainty H of a sequence: ``nll`` of its sampled tokens (Eq. 5/6) or mean ``shannon`` entropy.
        uncertainty_eps: Added to H in the weight's denominator.
        clamp: ``asymmetric`` (Eq. 8: correct at least 1, incorrect at most 1), ``symmetric`` (both bounds for all),
            ``negative_only`` / ``positive_only`` (Eq. 8 for incorrect / correct answers only), ``none``.
        weight_bounds: ``(lambda_min, lambda_max)`` with ``0 <= lambda_min <= 1 <= lambda_max``.
        renorm: Divide weights by their group's mean: ``none``, ``after`` or ``before`` the clamp (Eq. 9).
        all_wrong: Advantage in groups with equal rewards and no correct answer: ``negative`` (-nsr_scale), ``zero``, or
            ``negative_no_correct`` (-nsr_scale, also if rewards differ but no answer is correct).
        nsr_scale: Size of the negative advantage of ``all_wrong``.
        lock_all_wrong: Weight 1 in the groups that ``all_wrong`` applies to.
        singleton: Advantage of a group of one: ``zero`` or its ``raw`` reward.
        correct_threshold: A response is correct if its reward is above this, unless ``correct`` is passed.

    Raises:
        ValueError: A setting outside its choices or range.
        TypeError: A setting of the wrong type.
    """

    baseline: str = choice("mean", "leave_one_out", "correctness", "none")
    positive_scale: float = number(1.0, 0.0)
    negative_scale: float = number(1.0, 0.0)
    scale: str = choice("group_std", "batch_std", "batch_whiten", "group_mean", "none")
    std_eps: float = number(1e-6, 0.0)
    weight: str = choice("inverse_uncertainty", "none")
    statistic: str = choice("nll", "shannon")
    uncertainty_eps: float = number(1e-5, 0.0, open_low=True)
    clamp: str = choice("asymmetric", "symmetric", "negative_only", "positive_only", "none")
    weight_bounds: tuple[float, float] = (0.8, 2.0)
    renorm: str = choice("none", "after", "before")
    all_wrong: str = choice("negative", "negative_no_correct", "zero")
    nsr_scale: float = number(1.0, 0.0)
    lock_all_wrong: bool = False
    singleton: str = choice("zero", "raw")
    correct_threshold: float = number(0.5, -math.inf)

    @property
    def compares(self) -> bool:
        """Whether a reward is compared with its group, so that the rules for groups apply."""
        return self.baseline in ("mean", "leave_one_out")

    @property
    def of_batch(self) -> bool:
        """Whether the scale is that of the whole batch."""
        return self.scale in ("batch_std", "batch_whiten")

    def _check_together(self) -> None:
        if self.scale == "group_mean" and not self.compares:
            raise ValueError(
                f"AdvantageConfig.scale is 'group_mean' with baseline {self.baseline!r}, which knows no group; it must "
                "be 'none', 'batch_std' or 'batch_whiten' there"
            )
        name = "AdvantageConfig.weight_bounds"
        bounds = check_pair(name, self.weight_bounds, "a pair (lambda_min, lambda_max)")
        low = check_number(f"{name}[0]", bounds[0], low=0.0, high=1.0)
        high = check_number(f"{name}[1]", bounds[1], low=1.0, high=math.inf)
        object.__setattr__(self, "weight_bounds", (low, high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossConfig(Checked):
    """The per-token policy loss and its reduction (EGPO, arXiv 2602.22751, Eq. 12).

    Attributes:
        surrogate: ``clip``, the clipped surrogate of PPO (arXiv 1707.06347); ``cispo`` (arXiv 2506.13585), ``sapo``
            (arXiv 2511.20347), ``gmpo`` (arXiv 2507.20673), whose ratio is the token's by definition.
        ratio: ``token``; ``sequence``: exp of the mean log-ratio, shared by a sequence's tokens (GSPO, arXiv
            2507.18071); ``sequence_token``: the same value, each token with its own gradient (GSPO-token).
        clip_low: Lower bound of the ratio, ``1 - clip_low`` (1.0: no bound, as in cispo's paper); for gmpo the lower
            bound of the log-ratio, ``-clip_low`` nats.
        clip_high: Upper bound of the ratio, ``1 + clip_high``; for gmpo that of the log-ratio, ``clip_high`` nats.
        ratio_cap: Upper bound of cispo's ratio itself, instead of ``1 + clip_high``.
        dual_clip: A number c: with a negative advantage the loss is at most ``-c A`` (arXiv 1912.09729).
        tau_positive: Temperature of sapo's gate where the advantage is positive.
        tau_negative: Temperature of sapo's gate where it is not.
        max_log_ratio: Log-ratios are clamped to +- this, in nats; no gradient flows where they are clamped.
        kl: Estimator of the KL to the reference: ``k1``, ``k2``, ``k3``.
        kl_coef: Factor of the KL term; above 0 the losses need ``ref_log_probs``.
        kl_max: The estimate is clamped to +- this, in nats; no gradient flows where it is clamped.
        kl_times_ratio: Multiply the estimate by the ratio, gradient included: unbiased for samples of the old policy
            (DeepSeek-V3.2, arXiv 2512.02556). ``"on_policy"``: by ``exp(l - sg(l))``, 1 with a gradient (NeMo-RL).
        entropy_coef: Factor of the entropy bonus.
        reduction: Loss aggregation: ``token_mean``, ``seq_mean_token_mean``, ``seq_mean_token_sum``,
            ``seq_mean_token_sum_norm``, ``sum`` or ``none`` (per token).
        norm_length: The constant C of ``seq_mean_token_sum_norm``, in tokens; that reduction needs it.

    Raises:
        ValueError: A setting outside its choices or range.
        TypeError: A setting of the wrong type.
    """

    surrogate: str = choice(*SURROGATES)
    ratio: str = choice("token", "sequence", "sequence_token")
    clip_low: float = number(0.2, 0.0, 1.0)
    clip_high: float = number(0.2, 0.0)
    ratio_cap: float | None = number(None, 0.0, optional=True, open_low=True)
    dual_clip: float | None = number(None, 1.0, optional=True, open_low=True)
    tau_positive: float = number(1.0, 1e-3, 1e3)
    tau_negative: float = number(1.05, 1e-3, 1e3)
    max_log_ratio: float = number(20.0, 0.0, MAX_LOG_RATIO, open_low=True)
    kl: str = dataclasses.field(default="k3", metadata={"choices": ("k1", "k2", "k3")})
    kl_coef: float = number(0.0, 0.0)
    kl_max: float | None = number(None, 0.0, optional=True, open_low=True)
    kl_times_ratio: bool | str = dataclasses.field(default=False, metadata={"choices": ("on_policy",)})
    entropy_coef: float = number(0.0, -math.inf)
    reduction: str = choice(
        "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "sum", "none"
    )
    norm_length: float | None = number(None, 0.0, open_low=True, optional=True)

    @property
    def trims(self) -> bool:
        """Whether log-ratios are clipped one by one before their sequence pools them."""
        return self.surrogate == "gmpo"

    @property
    def pools(self) -> bool:
        """Whether a token's loss depends on the log-ratios of its whole sequence."""
        return self.ratio != "token" or self.trims

    @property
    def late(self) -> bool:
        """Whether a token's gradient depends on what is known only after all tokens are read, or in backward."""
        return self.pools or self.reduction == "none"

    @property
    def has_bonus(self) -> bool:
        """Whether the entropy is in the loss."""
        # A branch, as torch's compiler makes a symbol of a comparison, and a symbol is no key of a dict.
        return True if self.entropy_coef != 0 else False  # noqa: SIM210

    def _check_together(self) -> None:
        self._check_only("norm_length", "reduction", "seq_mean_token_sum_norm")
        self._check_only("ratio_cap", "surrogate", "cispo")
        self._check_only("dual_clip", "surrogate", "clip")
        if self.ratio_cap is not None and self.ratio_cap < 1 - self.clip_low:
            what = f"PolicyLossConfig.ratio_cap is {self.ratio_cap!r} with clip_low {self.clip_low!r}"
            raise ValueError(f"{what}; it must be at least 1 - clip_low, the lower bound")
        for name in ("clip_low", "clip_high") if self.surrogate == "sapo" else ("tau_positive", "tau_negative"):
            self._check_default(name)
        if self.kl_times_ratio is True and self.max_log_ratio > MAX_LOG_RATIO_TWICE:
            what = f"PolicyLossConfig.max_log_ratio is {self.max_log_ratio!r} with kl_times_ratio=True"
            raise ValueError(f"{what}, two ratios' product; it must be at most {MAX_LOG_RATIO_TWICE:g} there")
        if self.ratio != "token" and self.surrogate != "clip":
            raise ValueError(
                f"PolicyLossConfig.ratio is {self.ratio!r} with surrogate {self.surrogate!r}; it must be 'token' there"
            )

    def _check_default(self, name: str) -> None:
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value != default:
            what = f"PolicyLossConfig.{name} is {value!r} with surrogate {self.surrogate!r}, which does not use it"
            raise ValueError(f"{what}; it must be left at {default!r} there")

    def _check_only(self, name: str, field: str, wanted: str) -> None:
        value, chosen = getattr(self, name), getattr(self, field)
        if value is not None and chosen != wanted:
            raise ValueError(
                f"PolicyLossConfig.{name} is {value!r} with {field} {chosen!r}; it must be None there: it belongs to "
                f"{field} {wanted!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One published method: its advantages and its policy loss.

    Attributes:
        name: The method's name.
        advantage: Settings of the advantages.
        loss: Settings of the loss.
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
        """Return a copy with some settings changed, of advantages or loss: ``EGPO.replace(clip_high=0.28)``.

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
