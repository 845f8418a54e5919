"""EGPOTrainer's advantages: of whole groups, from which log-probs, and that they teach."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (make parity installs it)")

import egpo_kernels as ek
from egpo_kernels.integrations.trl import EGPOTrainer
from tests.integrations.models import make_model
from tests.integrations.trl_runs import GROUP, even, rollout, rollout_with_tools, run, steps
from tests.support.accuracy import assert_rounding

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Watched(EGPOTrainer):
    """Keeps its first generation batch, and the rows of all forwards."""

    forwards = ()

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.first = self.__dict__.get("first", output)
        return output

    def _get_per_token_logps_and_entropies(self, model, input_ids, *inputs, **named):
        if not isinstance(model, tuple):  # else TRL reports what was found already
            self.forwards += (len(input_ids), torch.is_grad_enabled())
        return super()._get_per_token_logps_and_entropies(model, input_ids, *inputs, **named)


def at_first(batch, temperature=1.0):
    """Log-probs and entropies of a batch's completions, from whole logits of the model as it was, and their mask."""
    ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = make_model()(ids, attention_mask=attention).logits[:, -width - 1 : -1] / temperature
    every = logits.log_softmax(-1)
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    return every.gather(-1, batch["completion_ids"][..., None])[..., 0], -(every.exp() * every).sum(-1), mask


def unscored(prompts, trainer):
    """A sampler that did not score every token."""
    output = rollout(prompts, trainer)
    output["logprobs"] = [[None if i == 1 else x for i, x in enumerate(row)] for row in output["logprobs"]]
    return output


ROLLOUTS = {
    "default": {},
    "iterations": {"num_iterations": 2},
    "temperature": {"temperature": 0.7},
    "tools": {"rollout_func": rollout_with_tools},
    "both log-probs": {"rollout_func": rollout, "num_iterations": 2},
    "entropy": {"recipe": "edge_grpo"},
    "entropy, iterations": {"recipe": "edge_grpo", "num_iterations": 2},
    "whitened": {"recipe": "reinforce_pp_baseline"},
    "leave one out": {"recipe": "rloo"},
}


@pytest.mark.parametrize("options", ROLLOUTS.values(), ids=ROLLOUTS)
def test_whole_groups_are_weighted_by_the_policy(options, tmp_path):
    given = {"max_steps": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "recipe": "egpo"}
    trainer = run(Watched, tmp_path, **given | options)
    log_probs, entropy, mask = at_first(trainer.first, options.get("temperature", 1.0))
    if options.get("rollout_func") is rollout_with_tools:
        log_probs = trainer.first["sampling_per_token_logps"]
        assert not torch.equal(mask, trainer.first["completion_mask"])
    rewards = torch.tensor(even(trainer.first["completion_ids"].tolist()))
    wanted = ek.group_advantages(GROUP, rewards, log_probs, mask, entropy=entropy, config=trainer.recipe.advantage)
    assert_rounding(trainer.first["advantages"], wanted.advantages)
    assert trainer.recipe.advantage.weight == "none" or wanted.weights.unique().numel() > 3
    assert steps(trainer)[0]["egpo/groups/sum"] == 3


@pytest.mark.parametrize("sampler", [rollout, unscored])
def test_the_sampler_saves_a_forward(sampler, tmp_path):
    trainer = run(Watched, tmp_path, max_steps=1, rollout_func=sampler)
    assert trainer.forwards == (8, True)
    sampled, mask = trainer.first["sampling_per_token_logps"], trainer.first["completion_mask"]
    rewards = torch.tensor(even(trainer.first["completion_ids"].tolist()))
    assert sampled.isnan().any() == (sampler is unscored)
    wanted = ek.group_advantages(GROUP, rewards, sampled, mask, entropy_mask=mask * ~sampled.isnan())
    assert_rounding(trainer.first["advantages"], wanted.advantages)
    assert wanted.uncertainty[mask.sum(1) > 1].isfinite().all()


def test_a_recipe_without_weights_costs_no_forward(tmp_path):
    assert run(Watched, tmp_path, max_steps=1, recipe="grpo").forwards == (8, True)
    assert run(Watched, tmp_path, max_steps=1, recipe="egpo").forwards == (8, False, 8, True)


def test_a_forward_has_no_more_rows_than_a_micro_batch(tmp_path):
    rows = []

    def watch(trainer):
        trainer.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    run(EGPOTrainer, tmp_path, num_iterations=2, before=watch, **options)
    assert set(rows) == {2}


def test_groups_that_are_all_wrong_teach(tmp_path):
    def wrong(completion_ids, **_):
        return [0.0] * len(completion_ids)

    before = dict(make_model().named_parameters())
    for recipe, changes in (("egpo", True), ("grpo", False)):
        trainer = run(EGPOTrainer, tmp_path, recipe=recipe, reward_funcs=wrong)
        changed = any(not torch.equal(value, before[name]) for name, value in trainer.weights[-1].items())
        assert changed == changes
        assert steps(trainer)[0]["egpo/groups/all_wrong/sum"] == 2


def test_learning_raises_the_reward(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 3e-2, "max_grad_norm": 1.0, "rollout_func": None}
    trainer = run(EGPOTrainer, tmp_path, max_steps=60, per_device_train_batch_size=16, **options)
    rewards = [step["reward"] for step in steps(trainer)]
    assert sum(rewards[:5]) / 5 < 0.7 and sum(rewards[-5:]) / 5 > 0.9


@pytest.mark.parametrize("recipe", ek.recipes.RECIPES)
def test_every_recipe_runs(recipe, tmp_path):
    trainer = run(EGPOTrainer, tmp_path, recipe=recipe, num_iterations=2, max_steps=2)
    assert all(torch.tensor([step["loss"], step["grad_norm"]]).isfinite().all() for step in steps(trainer))
    assert any(step["grad_norm"] > 0 for step in steps(trainer))
