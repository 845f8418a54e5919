"""Settings that come from configuration systems: OmegaConf's containers, hydra's instantiate."""

import pytest

pytest.importorskip("omegaconf", reason="omegaconf is not installed (make parity installs it)")
pytest.importorskip("hydra", reason="hydra-core is not installed (make parity installs it)")

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import egpo_kernels as ek
from tests.integrations.models import VOCAB

RECIPES = [ek.recipes.get(name) for name in ek.recipes.RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_from_omegaconf(recipe):
    """Reported: "weight_bounds is [0.8, 2.0]; it must be a pair"."""
    made = ek.Recipe.from_dict(OmegaConf.create(recipe.to_dict()))
    assert made == recipe and made.to_dict() == recipe.to_dict()
    text = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(recipe.to_dict())))
    assert ek.Recipe.from_dict(text) == recipe


def test_a_recipe_by_hydra():
    config = OmegaConf.create(
        {
            "_target_": "egpo_kernels.Recipe",
            "name": "mine",
            "advantage": {"_target_": "egpo_kernels.AdvantageConfig", "weight_bounds": [0.9, 1.5]},
            "loss": {"_target_": "egpo_kernels.PolicyLossConfig", "clip_high": 0.28},
        }
    )
    made = instantiate(config)
    assert made == ek.recipes.EGPO.replace(name="mine", weight_bounds=(0.9, 1.5), clip_high=0.28)
    assert instantiate({"_target_": "egpo_kernels.Recipe.from_dict", "values": made.to_dict()}) == made


def test_arguments_from_omegaconf():
    """Of functions: bounds, tags, a temperature."""
    config = OmegaConf.create({"bounds": [0.5, 2.0], "close_tag": [3, 4], "temperature": 0.7})
    log_probs, tokens = torch.zeros(2, 3), torch.tensor([[1, 3, 4], [3, 4, 5]])
    assert ek.rollout_weights(log_probs, log_probs, bounds=config.bounds).eq(1).all()
    assert ek.response_spans(tokens, config.close_tag).answer.tolist() == [[0, 0, 0], [0, 0, 1]]
    names = OmegaConf.create(["a", "a"])
    assert torch.equal(ek.informative_groups(names, torch.tensor([0.0, 1.0])), torch.ones(2, dtype=torch.bool))
    logits = torch.randn(2, 3, VOCAB)
    found, wanted = (ek.token_log_probs(logits, tokens, temperature=each) for each in (config.temperature, 0.7))
    assert torch.equal(found.log_probs, wanted.log_probs)
