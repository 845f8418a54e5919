"""The demo's loss of a micro-batch is the same by both of its ways."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from demo.model import Prompts
from egpo_kernels import group_advantages, recipes
from tests.demo.tiny import make_policy
from tests.integrations.models import assert_same, differentiated

GROUP_SIZE = 4


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("name", ["egpo", "grpo", "dapo", "gspo"])
def test_a_micro_batch_by_both_ways(name, top_p):
    recipe = recipes.get(name)
    plain, fused = map(make_policy, (False, True))
    prompts = Prompts(torch.tensor([[0, 0, 9, 10], [11, 12, 13, 14]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    generator = torch.Generator().manual_seed(0)
    answers = fused.sample(prompts, GROUP_SIZE, 1.0, top_p, generator)
    assert not answers.mask.all()  # some ended early
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0], dtype=torch.float64)
    group = group_advantages(GROUP_SIZE, rewards, answers.log_probs, answers.mask, config=recipe.advantage)
    given = {"advantages": group.advantages, "mask": answers.mask, "temperature": 0.7, "config": recipe.loss}
    given["support"] = answers.support(slice(None))
    results = [
        differentiated(policy.model, policy.loss(prompts, answers.tokens, num_tokens=99, **given))
        for policy in (plain, fused)
    ]
    assert_same(results[1], results[0])
