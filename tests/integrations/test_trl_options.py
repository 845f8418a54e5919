"""Options of GRPOConfig: what they are in a recipe, what is refused, and what only a sampler of its own shows."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (make parity installs it)")

from trl import GRPOConfig, GRPOTrainer

import egpo_kernels as ek
from egpo_kernels.integrations.trl import EGPOTrainer
from egpo_kernels.integrations.trl_options import LOSSES, adjusted
from tests.integrations.models import make_model
from tests.integrations.test_trl import assert_same_runs
from tests.integrations.trl_runs import GROUP, STOCK, rollout, run, steps
from tests.parity.facts import arguments
from tests.parity.facts_trl import TRL
from tests.support.accuracy import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def config(**options):
    return GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **options)


def settings(recipe):
    return recipe.advantage.to_dict() | recipe.loss.to_dict()


NAMES = {name: torch.ones(2, 3) for name in ("mask", "entropy", "log_probs", "old_log_probs", "sampler_log_probs")}
NAMES |= {"advantages": torch.ones(2), "num_items_in_batch": torch.tensor(6), "num_processes": 1}


def is_config(theirs):
    """Whether a line names options of GRPOConfig; the others are inputs of TRL's loss, or need vLLM."""
    options = set(arguments(theirs, NAMES))
    return options <= set(GRPOConfig.__dataclass_fields__) and "use_vllm" not in options


LINES = [same for same in (*TRL.losses, *TRL.modifiers, *TRL.advantages) if is_config(same.theirs)]


@pytest.mark.parametrize("same", LINES, ids=lambda same: same.theirs)
def test_options_mean_what_the_parity_page_says(same):
    """Each line of the page is a `GRPOConfig` and settings; the first makes the second of a recipe."""
    options = arguments(same.theirs, NAMES)
    if "sapo_temperature_pos" in options:
        options["loss_type"] = "sapo"  # TRL says nothing where another loss does not use them
    args = config(**options)
    wanted = {name: value for name, value in arguments(same.ours, NAMES).items() if name in settings(STOCK)}
    if same.theirs.startswith("entropy_coef"):
        wanted = {}  # TRL's own bonus, whatever the loss type
    found = adjusted(STOCK, args)
    if "loss_type" in options:
        wanted = LOSSES[args.loss_type] | wanted
    if args.loss_type == "cispo":
        wanted.setdefault("ratio_cap", 0.2)
    assert settings(found) == settings(STOCK.replace(**wanted))


@pytest.mark.parametrize("recipe", ek.recipes.RECIPES)
def test_default_options_leave_a_recipe_alone(recipe):
    wanted = ek.recipes.get(recipe)
    if recipe == "dr_grpo":
        wanted = wanted.replace(norm_length=float(config().max_completion_length))
    assert adjusted(recipe, config()) == wanted


KL = ek.recipes.EGPO.replace(kl_coef=0.1, kl="k2")


@pytest.mark.parametrize(
    ("recipe", "options", "wanted"),
    [
        ("gspo", {"epsilon_high": 0.1}, {"clip_high": 0.1}),
        ("gspo", {"epsilon": 0.1}, {"clip_low": 0.1, "clip_high": 0.1}),
        ("cispo", {"epsilon_high": 3.0}, {"ratio_cap": 3.0}),
        ("cispo", {"epsilon": 0.3}, {"ratio_cap": 0.3}),
        ("dapo", {"loss_type": "sapo"}, {**LOSSES["sapo"], "clip_high": 0.2}),
        ("cispo", {"loss_type": "grpo"}, {**LOSSES["grpo"], "clip_low": 0.2, "clip_high": 0.2}),
        ("egpo", {"loss_type": "cispo", "epsilon_high": 3.0}, {**LOSSES["cispo"], "ratio_cap": 3.0}),
        ("egpo", {"beta": 0.1, "use_bias_correction_kl": False}, {"kl_coef": 0.1}),
        ("egpo", {"scale_rewards": False}, {"scale": "none"}),
        ("cispo", {"loss_type": "cispo"}, {}),
        (KL, {"beta": 0.1}, {}),
        (KL, {"beta": 0.1, "use_bias_correction_kl": False}, {"kl_times_ratio": False}),
    ],
)
def test_options_change_recipes(recipe, options, wanted):
    assert settings(adjusted(recipe, config(**options))) == settings(ek.recipes.get(recipe).replace(**wanted))


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("egpo", {"loss_type": "vespo"}, "args.loss_type is 'vespo'; it must be one of 'dapo', 'bnpo', 'grpo'"),
        (
            "egpo",
            {"multi_objective_aggregation": "normalize_then_sum"},
            "args.multi_objective_aggregation is 'normalize_then_sum'; it must be one of 'sum_then_normalize'",
        ),
        (
            ek.recipes.EGPO.replace(kl_coef=0.1),
            {},
            "args.beta is 0.0 with kl_coef 0.1 in the recipe; they must be equal",
        ),
        (ek.recipes.EGPO.replace(reduction="sum"), {}, "recipe has reduction 'sum'; it must be a mean"),
        ("gspo", {"loss_type": "cispo"}, "ratio is 'sequence' with surrogate 'cispo'.*recipe GSPO"),
        ("sapo", {"delta": 2.0}, "args.delta is 2.0 with surrogate 'sapo'.*recipe SAPO"),
        ("egpo", {"delta": 0.9}, "args.delta is 0.9; it must be"),
        ("egpo", {"delta": 1.1}, "args.delta is 1.1; it must be at least 1 . clip_high, 1.2"),
        ("egpo", {"epsilon": 1.5}, "args.epsilon is 1.5; it must be"),
        ("cispo", {"epsilon": 0.3, "epsilon_high": 3.0}, "args.epsilon is 0.3 with epsilon_high 3.0 and cispo"),
        ("sapo", {"epsilon": 0.3}, "args.epsilon is 0.3 with surrogate 'sapo'"),
        ("egpo", {"sapo_temperature_pos": 2.0}, "args.sapo_temperature_pos is 2.0 with surrogate 'clip'"),
        ("cispo", {"epsilon_high": 0.0}, "args.epsilon_high is 0.0; it must be"),
        ("egpo", {"importance_sampling_level": "turn"}, "args.importance_sampling_level is 'turn'; it must be one of"),
        (
            "egpo",
            {"scale_rewards": "bogus"},
            "args.scale_rewards is 'bogus'; it must be one of 'group', 'batch', 'none'",
        ),
        ("egpoo", {}, "recipe is 'egpoo'; it must be a Recipe or one of egpo, "),
    ],
)
def test_refused(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        adjusted(recipe, config(**options))


def from_vllm(trainer):
    """As if vLLM had drawn the samples."""
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_correction_for_vllm(mode, correction, tmp_path):
    options = {
        "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": 0.5,
        "vllm_importance_sampling_correction": correction, "rollout_func": rollout, "before": from_vllm,
    }  # fmt: skip
    runs = [
        run(kind, tmp_path, **options, **own) for kind, own in ((EGPOTrainer, {"recipe": STOCK}), (GRPOTrainer, {}))
    ]
    assert not correction or any(step["sampling/importance_sampling_ratio/max"] != 1 for step in steps(runs[1]))
    assert_same_runs(*runs)


def test_autocast(tmp_path):
    """In 16 bits, by the accuracy rule: no worse than TRL."""
    kinds = [(EGPOTrainer, {"recipe": STOCK, "bf16": True}), (GRPOTrainer, {"bf16": True}), (GRPOTrainer, {})]
    runs = [steps(run(kind, tmp_path, max_steps=1, **own))[0] for kind, own in kinds]
    for name, terms in (("loss", 4.0), ("grad_norm", 10.0), ("entropy", 4.0)):
        ours, theirs, exact = (torch.tensor(step[name], dtype=torch.float32) for step in runs)
        assert ours != exact
        assert_accurate(ours, theirs, exact.double(), terms, name)


def test_logged_completions_have_their_advantages(tmp_path):
    def wrong(completion_ids, **_):
        return [0.0] * len(completion_ids)

    recipe = ek.recipes.EGPO.replace(weight="none")
    trainer = run(EGPOTrainer, tmp_path, max_steps=2, log_completions=True, reward_funcs=wrong, recipe=recipe)
    assert list(trainer._logs["advantages"]) == [-1.0] * 2 * GROUP


@pytest.mark.parametrize(("recipe", "paper"), [("egpo_c5", True), ("rloo", False)])
def test_model_cards_name_the_method(recipe, paper, tmp_path):
    run(EGPOTrainer, tmp_path, make_model().train(), max_steps=1, save_strategy="steps", save_steps=1, recipe=recipe)
    card = (tmp_path / "README.md").read_text()
    assert recipe.upper() in card and "egpo_kernels" in card and "2402.03300" not in card
    assert ("2602.22751" in card) == paper
