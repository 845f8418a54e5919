"""Settings: checked when made, frozen, replaced by name, written to plain values and read back."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

import egpo_kernels as ek

CONFIGS = [ek.AdvantageConfig, ek.PolicyLossConfig]
NAN, INF = float("nan"), float("inf")

ADVANTAGE_CHOICES = {
    "baseline": ["mean", "leave_one_out", "correctness", "none"],
    "scale": ["group_std", "batch_std", "batch_whiten", "group_mean", "none"],
    "weight": ["inverse_uncertainty", "none"],
    "statistic": ["nll", "shannon"],
    "clamp": ["asymmetric", "symmetric", "negative_only", "positive_only", "none"],
    "renorm": ["none", "after", "before"],
    "all_wrong": ["negative", "negative_no_correct", "zero"],
    "singleton": ["zero", "raw"],
}
LOSS_CHOICES = {
    "surrogate": ["clip", "cispo", "sapo", "gmpo"],
    "ratio": ["token", "sequence", "sequence_token"],
    "kl": ["k1", "k2", "k3"],
    "reduction": ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "sum", "none"],
}
GOOD = [(ek.AdvantageConfig, name, value) for name, values in ADVANTAGE_CHOICES.items() for value in values]
GOOD += [(ek.PolicyLossConfig, name, value) for name, values in LOSS_CHOICES.items() for value in values]
GOOD += [
    (ek.AdvantageConfig, "positive_scale", 0),
    (ek.AdvantageConfig, "negative_scale", 0.1),
    (ek.AdvantageConfig, "std_eps", 0),
    (ek.AdvantageConfig, "weight_bounds", (0, 1)),
    (ek.AdvantageConfig, "weight_bounds", [1.0, 1.0]),
    (ek.AdvantageConfig, "nsr_scale", 0.0),
    (ek.AdvantageConfig, "lock_all_wrong", True),
    (ek.AdvantageConfig, "correct_threshold", -3),
    (ek.PolicyLossConfig, "kl_times_ratio", "on_policy"),
    (ek.PolicyLossConfig, "kl_max", 10),
    (ek.PolicyLossConfig, "kl_times_ratio", True),
    (ek.PolicyLossConfig, "clip_low", 1.0),
    (ek.PolicyLossConfig, "clip_high", 5.0),
    (ek.PolicyLossConfig, "dual_clip", 3.0),
    (ek.PolicyLossConfig, "max_log_ratio", 5),
    (ek.PolicyLossConfig, "kl_coef", 0.1),
    (ek.PolicyLossConfig, "entropy_coef", -0.1),
]
GOOD += [
    (ek.AdvantageConfig, "nsr_scale", np.float32(0.5)),
    (ek.AdvantageConfig, "weight_bounds", np.array([0.5, 2.0])),
    (ek.AdvantageConfig, "weight_bounds", [np.float64(0.5), np.int64(2)]),
    (ek.AdvantageConfig, "lock_all_wrong", np.True_),
    (ek.PolicyLossConfig, "clip_high", np.float16(0.25)),
    (ek.PolicyLossConfig, "dual_clip", np.int32(3)),
]
BAD_VALUES = [
    (ek.AdvantageConfig, "std_eps", -1e-9),
    (ek.AdvantageConfig, "std_eps", NAN),
    (ek.AdvantageConfig, "uncertainty_eps", 0.0),
    (ek.AdvantageConfig, "uncertainty_eps", INF),
    (ek.AdvantageConfig, "nsr_scale", -1.0),
    (ek.AdvantageConfig, "weight_bounds", (-0.1, 2.0)),
    (ek.AdvantageConfig, "weight_bounds", (1.1, 2.0)),
    (ek.AdvantageConfig, "weight_bounds", (0.8, 0.9)),
    (ek.AdvantageConfig, "weight_bounds", (0.8, INF)),
    (ek.AdvantageConfig, "correct_threshold", -INF),
    (ek.PolicyLossConfig, "clip_low", 1.1),
    (ek.PolicyLossConfig, "clip_low", -0.1),
    (ek.PolicyLossConfig, "clip_high", -0.1),
    (ek.PolicyLossConfig, "dual_clip", 1.0),
    (ek.PolicyLossConfig, "max_log_ratio", 0.0),
    (ek.PolicyLossConfig, "max_log_ratio", 81),
    (ek.PolicyLossConfig, "kl_coef", -0.1),
    (ek.PolicyLossConfig, "entropy_coef", NAN),
    (ek.AdvantageConfig, "positive_scale", -1.0),
    (ek.AdvantageConfig, "negative_scale", INF),
    (ek.PolicyLossConfig, "tau_positive", 0.0),
    (ek.PolicyLossConfig, "tau_negative", 1e4),
    (ek.PolicyLossConfig, "kl_max", 0.0),
    (ek.PolicyLossConfig, "norm_length", 100),
    (ek.PolicyLossConfig, "tau_positive", 2),  # with another surrogate than sapo
    (ek.PolicyLossConfig, "kl_times_ratio", "old_policy"),
    (ek.PolicyLossConfig, "ratio_cap", 5.0),
]
BAD_TYPES = [
    (ek.AdvantageConfig, "std_eps", "1e-6"),
    (ek.AdvantageConfig, "weight_bounds", 2.0),
    (ek.AdvantageConfig, "weight_bounds", (0.8,)),
    (ek.AdvantageConfig, "weight_bounds", ("0.8", 2.0)),
    (ek.AdvantageConfig, "lock_all_wrong", 1),
    (ek.PolicyLossConfig, "clip_low", None),
    (ek.PolicyLossConfig, "clip_high", True),
    (ek.PolicyLossConfig, "dual_clip", "3"),
    (ek.PolicyLossConfig, "kl_times_ratio", 1),
]
CHOICES = [(ek.AdvantageConfig, name) for name in ADVANTAGE_CHOICES]
CHOICES += [(ek.PolicyLossConfig, name) for name in LOSS_CHOICES]


@pytest.mark.parametrize("kind, name, value", GOOD)
def test_good_settings(kind, name, value):
    made = kind(**{name: value})
    found = getattr(made, name)
    assert list(found) == list(value) if isinstance(found, tuple) else found == value
    assert kind.from_dict(made.to_dict()) == made
    assert (made == kind()) is (found == getattr(kind(), name))
    assert hash(made) == hash(kind(**{name: value}))


@pytest.mark.parametrize("kind, name, value", BAD_VALUES)
def test_bad_values(kind, name, value):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name}\b.* is .* must be"):
        kind(**{name: value})


@pytest.mark.parametrize("kind, name, value", BAD_TYPES)
def test_bad_types(kind, name, value):
    with pytest.raises(TypeError, match=rf"{kind.__name__}\.{name}\b.* is .* must be"):
        kind(**{name: value})


@pytest.mark.parametrize("kind, name", CHOICES)
@pytest.mark.parametrize("value", ["other", None, 3, ["token"], {}])
def test_choices_are_listed_in_the_message(kind, name, value):
    default = getattr(kind(), name)
    with pytest.raises((ValueError, TypeError), match=rf"{kind.__name__}\.{name} is .* must be one of .*{default!r}"):
        kind(**{name: value})


def test_norm_length_goes_with_its_reduction():
    made = ek.PolicyLossConfig(reduction="seq_mean_token_sum_norm", norm_length=128)
    assert made.norm_length == 128.0
    assert ek.PolicyLossConfig.from_dict(made.to_dict()) == made


def test_settings_that_need_one_another():
    assert ek.PolicyLossConfig(surrogate="cispo", ratio_cap=5).ratio_cap == 5.0
    with pytest.raises(ValueError, match=r"ratio_cap is 0\.5 with clip_low 0\.1; it must be at least 1 - clip_low"):
        ek.PolicyLossConfig(surrogate="cispo", clip_low=0.1, ratio_cap=0.5)
    assert ek.PolicyLossConfig(surrogate="sapo", tau_positive=2, tau_negative=0.5).tau_positive == 2.0
    for surrogate in ("cispo", "sapo", "gmpo"):
        for ratio in ("sequence", "sequence_token"):
            with pytest.raises(
                ValueError, match=rf"ratio is '{ratio}' with surrogate '{surrogate}'; it must be 'token'"
            ):
                ek.PolicyLossConfig(surrogate=surrogate, ratio=ratio)
        with pytest.raises(ValueError, match=r"dual_clip is 3\.0 with surrogate .* belongs to surrogate 'clip'"):
            ek.PolicyLossConfig(surrogate=surrogate, dual_clip=3.0)
    assert ek.PolicyLossConfig(kl_times_ratio=True, max_log_ratio=40).max_log_ratio == 40
    with pytest.raises(ValueError, match=r"max_log_ratio is 41\.0 with kl_times_ratio=True, .* at most 40 there"):
        ek.PolicyLossConfig(kl_times_ratio=True, max_log_ratio=41)
    for baseline in ("correctness", "none"):
        with pytest.raises(ValueError, match=rf"scale is 'group_mean' with baseline '{baseline}', .* must be 'none'"):
            ek.AdvantageConfig(baseline=baseline, scale="group_mean")


@pytest.mark.parametrize(
    "name, value", [("clip_low", 0.1), ("clip_high", 0.3), ("tau_positive", 2), ("tau_negative", 1)]
)
def test_a_setting_that_the_surrogate_does_not_use_is_refused(name, value):
    for surrogate in LOSS_CHOICES["surrogate"]:
        uses = (surrogate == "sapo") == name.startswith("tau")
        if uses:
            assert getattr(ek.PolicyLossConfig(surrogate=surrogate, **{name: value}), name) == value
        else:
            with pytest.raises(ValueError, match=rf"{name} is .* with surrogate '{surrogate}', .* be left at"):
                ek.PolicyLossConfig(surrogate=surrogate, **{name: value})


@pytest.mark.parametrize("kind", [*CONFIGS, ek.Recipe])
def test_settings_are_frozen_and_keyword_only(kind):
    made = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(kind)[0].name, "mean")
    with pytest.raises(TypeError, match="positional argument"):
        kind("mean")
    with pytest.raises(TypeError, match="clip_hihg"):
        kind(clip_hihg=0.3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_settings_survive_copies(kind):
    made = kind()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)):
        assert other == made and other.json == made.json and hash(other) == hash(made)
        # FSDP2 rebuilds the dataclasses among a forward's arguments like this.
        fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        again = dataclasses.replace(made, **fields)
        assert again == made and again.json == made.json


def test_defaults_are_those_of_the_method():
    made = ek.Recipe()
    assert made == ek.recipes.EGPO
    assert made.name == "EGPO" and made.loss.reduction == "token_mean"
    advantage = made.advantage
    assert (advantage.weight, advantage.clamp, advantage.all_wrong) == ("inverse_uncertainty", "asymmetric", "negative")
    assert advantage.weight_bounds == (0.8, 2.0) and advantage.nsr_scale == 1.0 and advantage.renorm == "none"
    grpo = ek.recipes.GRPO
    assert (grpo.advantage.weight, grpo.advantage.all_wrong) == ("none", "zero")
    assert grpo.advantage.scale == "group_std" and grpo.loss.reduction == "seq_mean_token_mean"


# Recipes.


@pytest.mark.parametrize("name", ["egpo", "EGPO", "Egpo", "grpo", "GRPO"])
def test_recipes_by_name_in_any_case(name):
    assert ek.recipes.get(name) is getattr(ek.recipes, name.upper())


def test_unknown_recipes():
    with pytest.raises(ValueError, match=r"recipe is 'ppo'; it must be a Recipe or one of egpo, .*, dapo, "):
        ek.recipes.get("ppo")
    for value in (None, 3, ek.AdvantageConfig()):
        with pytest.raises(TypeError, match=r"recipe is .* must be a Recipe"):
            ek.recipes.get(value)
    for name, value in (("name", 3), ("advantage", ek.PolicyLossConfig()), ("loss", {"clip_low": 0.1})):
        with pytest.raises(TypeError, match=rf"Recipe\.{name} is .* must be"):
            ek.Recipe(**{name: value})


def test_replace_is_flat():
    made = ek.recipes.EGPO.replace(clip_high=0.28, nsr_scale=0.5, name="mine", weight_bounds=[0.5, 3])
    assert made.name == "mine" and made.loss.clip_high == 0.28 and made.advantage.nsr_scale == 0.5
    assert made.advantage.weight_bounds == (0.5, 3.0)
    assert made.loss.clip_low == 0.2 and made.advantage.clamp == "asymmetric"
    assert ek.recipes.EGPO.loss.clip_high == 0.2, "the recipe itself is unchanged"
    assert ek.recipes.EGPO.replace() == ek.recipes.EGPO
    normed = ek.recipes.GRPO.replace(reduction="seq_mean_token_sum_norm", norm_length=512)
    assert normed.loss.norm_length == 512 and normed.name == "GRPO"


def test_replace_refuses_what_is_no_setting():
    for name in ("clip", "json", "advantage", "loss"):
        with pytest.raises(ValueError, match=f"no setting '{name}'; it must be one of name, baseline"):
            ek.recipes.EGPO.replace(**{name: 1})
    with pytest.raises(ValueError, match=r"PolicyLossConfig\.clip_low is 2"):
        ek.recipes.EGPO.replace(clip_low=2)


@pytest.mark.parametrize(
    "recipe", [*ek.recipes.RECIPES.values(), ek.recipes.EGPO.replace(dual_clip=3, kl="k1")], ids=repr
)
def test_recipes_round_trip_through_json(recipe):
    assert ek.Recipe.from_dict(recipe.to_dict()) == recipe
    text = json.dumps(recipe.to_dict())
    assert ek.Recipe.from_dict(json.loads(text)) == recipe
    assert isinstance(recipe.to_dict()["advantage"]["weight_bounds"], list), "YAML writes no tuples"


def test_from_dict_fills_in_defaults():
    # As a YAML file has it.
    made = ek.Recipe.from_dict({"name": "x", "advantage": {"weight_bounds": [1, 2]}, "loss": {"clip_low": 0}})
    assert made == ek.Recipe(
        name="x", advantage=ek.AdvantageConfig(weight_bounds=(1, 2)), loss=ek.PolicyLossConfig(clip_low=0)
    )
    assert ek.Recipe.from_dict({}) == ek.Recipe()


def test_from_dict_refuses_unknown_names():
    with pytest.raises(ValueError, match="Recipe has no setting 'los'"):
        ek.Recipe.from_dict({"los": {}})
    with pytest.raises(ValueError, match="PolicyLossConfig has no setting 'clip'"):
        ek.Recipe.from_dict({"loss": {"clip": 0.2}})
    with pytest.raises(ValueError, match="AdvantageConfig has no setting 'json'"):
        ek.AdvantageConfig.from_dict({"json": "{}"})
    for value in (None, "loss", [("clip_low", 0.1)]):
        with pytest.raises(TypeError, match="it must be a mapping"):
            ek.PolicyLossConfig.from_dict(value)
        with pytest.raises(TypeError, match="it must be a mapping"):
            ek.Recipe.from_dict({"loss": value})
