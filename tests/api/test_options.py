"""Every option of the token level by itself, in both layouts and on every backend, where it makes a difference.

Advantages and rollout weights differ from token to token, log-ratios reach beyond every bound.
"""

import dataclasses

import numpy as np
import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_alike, assert_rounding
from tests.support.batches import FAST
from tests.support.case import Case
from tests.support.make_case import make_case
from tests.support.runs import alone, check, nothing

PLAIN = ek.recipes.EGPO.replace(kl_coef=0.1, max_log_ratio=1.0, name="plain")
OPTIONS = {
    "ratio": "sequence_token",
    "kl": "k1",
    "kl_max": 0.05,
    "kl_times_ratio": "on_policy",
    "dual_clip": 1.5,
    "entropy_coef": 0.1,
    "reduction": "seq_mean_token_mean",
    "clip_low": 0.5,
    "clip_high": 0.6,
    "max_log_ratio": 20.0,
}
CHANGES = {name: {name: value} for name, value in OPTIONS.items()}
CHANGES |= {
    "sequence": {"ratio": "sequence"},
    "KL times ratio": {"kl_times_ratio": True},
    "sequence, KL on-policy": {"ratio": "sequence", "kl_times_ratio": "on_policy"},
    "sequence, KL times ratio": {"ratio": "sequence", "kl_times_ratio": True},
    "sequence_token, KL times ratio": {"ratio": "sequence_token", "kl_times_ratio": True},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0},
    "cispo, lower bound": {"surrogate": "cispo", "clip_low": 0.1},
    "cispo, KL times ratio": {"surrogate": "cispo", "kl_times_ratio": True},
    "cispo, ratio_cap": {"surrogate": "cispo", "ratio_cap": 0.9},
    "sapo": {"surrogate": "sapo"},
    "sapo, taus": {"surrogate": "sapo", "tau_positive": 4.0, "tau_negative": 0.1},
    "gmpo": {"surrogate": "gmpo"},
    "gmpo, KL times ratio": {"surrogate": "gmpo", "kl_times_ratio": True},
}
# What an option is compared with to see that it does something.
PARENTS = {
    "sequence_token": {"ratio": "sequence"},
    "cispo, ": {"surrogate": "cispo", "clip_low": 1.0},
    "sapo, ": {"surrogate": "sapo"},
    "gmpo, ": {"surrogate": "gmpo"},
    "sequence, ": {"ratio": "sequence"},
}


def case_of(changes: dict, layout: str) -> Case:
    recipe = PLAIN.replace(**changes)
    rng = np.random.default_rng(5)
    case = make_case(11, group_sizes=(4, 4), length=6, layout=layout, recipe=recipe, old="far", dtype=torch.float32)
    shape = case.tokens.shape
    given = {
        "advantages": torch.from_numpy(rng.normal(size=shape)),
        "rollout_weights": torch.from_numpy(rng.uniform(0.3, 2.0, size=shape)),
    }
    return case.replace(**{name: value.to(case.rewards) for name, value in given.items()})


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", CHANGES)
def test_options_on_every_backend(name, backend, layout):
    case = case_of(CHANGES[name], layout)
    exact, reference = alone(case.double(), "reference"), alone(case, "reference")
    check(case, alone(case, backend), reference, exact, case.double().advantages, nothing(case.double()))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("name", [name for name in CHANGES if PLAIN.replace(**CHANGES[name]).loss.pools])
def test_options_that_pool_look_at_tokens_without_an_advantage_too(name, backend):
    """Their log-ratios are in the ratio that the others share."""
    case = case_of({"kl_coef": 0.0, **CHANGES[name]}, "padded")
    case = case.replace(advantages=case.advantages * (torch.arange(case.advantages.shape[1]) % 2).to(case.advantages))
    fewer, every = (alone(case, backend, metrics=metrics) for metrics in ("active", "all"))
    assert_alike(fewer["gradient"], every["gradient"], name)
    assert_rounding(fewer["loss"], every["loss"])
    assert every["gradient"].any()


@pytest.mark.parametrize("name", CHANGES)
def test_options_make_a_difference(name):
    """To the gradient of what they change, on the very batch they are tested with."""
    changes = CHANGES[name]
    parent = next((PARENTS[start] for start in PARENTS if name.startswith(start)), {})
    parent = {"ratio": "sequence"} if changes.get("ratio") == "sequence_token" else parent
    one = case_of(changes, "padded")
    other = one.replace(recipe=PLAIN.replace(**parent))
    found, without = (alone(case, "reference")["gradient"] for case in (one, other))
    assert (found - without).abs().max() > 1e-4


def test_options_are_all_here():
    fields = {field.name for field in dataclasses.fields(ek.PolicyLossConfig) if field.init}
    tried = {name for changes in CHANGES.values() for name in changes}
    assert fields - tried == {"kl_coef", "norm_length"}, "an option without a line in CHANGES"
