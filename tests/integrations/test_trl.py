"""EGPOTrainer beside TRL's GRPOTrainer: real runs, step by step."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (make parity installs it)")

import transformers
import trl.trainer.utils
from trl import GRPOTrainer

import egpo_kernels as ek
from egpo_kernels.integrations.trl import EGPOTrainer
from egpo_kernels.integrations.trl_options import LOSSES
from tests.integrations.models import SHARED, VOCAB, make_model
from tests.integrations.trl_runs import STOCK, even, lengths, prompts, rollout, rollout_with_tools, run, steps
from tests.support.accuracy import assert_rounding
from tests.support.cost import products

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TIMED = ("step_time", "runtime", "_per_second")


def assert_same_runs(ours, theirs):
    """Every number that TRL logs, in every step, and the weights after it."""
    assert len(steps(ours)) == len(steps(theirs)) > 0
    names = sorted({name for step in steps(theirs) for name in step if not name.endswith(TIMED)})
    assert {"loss", "grad_norm", "reward", "entropy"} <= set(names)
    # What is a sum that cancels is measured by the size of its terms: advantages (times log-probs in cispo), e^x.
    size = max(abs(step.get(f"egpo/advantage/{end}", 0.0)) for step in steps(ours) for end in ("min", "max"))
    sizes = {"loss": size * max(step.get("entropy", 0.0) for step in steps(ours)), "kl": 1.0}
    for name in names:
        found, wanted = ([step.get(name) for step in steps(run)] for run in (ours, theirs))
        found, wanted = (torch.tensor([float("nan" if x is None else x) for x in each]) for each in (found, wanted))
        sums = torch.full((1,), sizes.get(name, 0.0))
        found, wanted = (torch.cat([values, sums]) for values in (found, wanted))
        assert_rounding(found, wanted)
    for found, wanted in zip(ours.weights, theirs.weights, strict=True):
        for name, value in wanted.items():
            assert_rounding(found[name], value)


OFF_POLICY = {"steps_per_generation": 2, "num_iterations": 2}
OPTIONS = {
    "on-policy": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "off-policy": OFF_POLICY,
}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type(loss_type, how, tmp_path):
    options = OPTIONS[how] | {"loss_type": loss_type}
    ours = run(EGPOTrainer, tmp_path, recipe=STOCK, **options)
    theirs = run(GRPOTrainer, tmp_path, **options)
    assert any(step["grad_norm"] > 0.01 for step in steps(theirs))
    assert_same_runs(ours, theirs)


MORE = {
    "epsilon": {"epsilon": 0.05, "epsilon_high": 0.1} | OFF_POLICY,
    "one epsilon": {"epsilon": 0.05} | OFF_POLICY,
    "delta": {"delta": 1.3} | OFF_POLICY,
    "ratio of a sequence": {"importance_sampling_level": "sequence"} | OFF_POLICY,
    "ratio of a sequence, luspo": {"importance_sampling_level": "sequence", "loss_type": "luspo"} | OFF_POLICY,
    "cispo's cap": {"loss_type": "cispo", "epsilon_high": 1.05} | OFF_POLICY,
    "sapo's temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0} | OFF_POLICY,
    "scale by the batch": {"scale_rewards": "batch"},
    "scale by nothing": {"scale_rewards": "none"},
    "tokens of high entropy": {"top_entropy_quantile": 0.4} | OFF_POLICY,
    "entropy bonus": {"entropy_coef": 0.1, "gradient_accumulation_steps": 2},
    "entropy bonus of the uncertain": {"entropy_coef": 0.1, "top_entropy_quantile": 0.4, "loss_type": "grpo"},
    "adaptive bonus": {
        "entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 3.1, "entropy_coef_delta": 0.05,
        "entropy_coef_max": 1.0,
    },
    "truncated completions": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "truncated completions, accumulated": {
        "mask_truncated_completions": True, "loss_type": "dr_grpo", "gradient_accumulation_steps": 2,
    },
    "off-policy sequences": {"off_policy_mask_threshold": 0.01} | OFF_POLICY,
    "sampler's log-probs": {"rollout_func": rollout, "off_policy_mask_threshold": 3.0},
    "tool mask": {"rollout_func": rollout_with_tools},
    "temperature": {"temperature": 0.7} | OFF_POLICY,
    "several rewards": {"reward_funcs": [even, lengths], "reward_weights": [1.0, 0.5]},
    "answers without reward": {"reward_funcs": lengths},
    "evaluation": {
        "gradient_accumulation_steps": 2, "steps_per_generation": 4, "eval_strategy": "steps", "eval_steps": 1,
        "eval_dataset": prompts(4), "num_generations_eval": 2, "per_device_eval_batch_size": 4,
    },
    "generated": {"rollout_func": None},
    "padded": {"pad_to_multiple_of": 8},
}  # fmt: skip


@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_options(options, tmp_path):
    ours, theirs = run(EGPOTrainer, tmp_path, recipe=STOCK, **options), run(GRPOTrainer, tmp_path, **options)
    assert any(step.get("grad_norm", 0.0) > 0.01 for step in steps(theirs))
    assert_same_runs(ours, theirs)


def test_no_upper_bound(tmp_path, monkeypatch):
    """0 is not None. Ratios of 1 then lie on the bound, where torch.clamp passes no gradient from torch 2.14 on."""
    clamp = torch.clamp

    def inclusive(values, *bounds, **named):
        found = clamp(values.detach(), *bounds, **named)
        return torch.where(found == values, values, found)

    monkeypatch.setattr(torch, "clamp", inclusive)
    test_options({"epsilon": 0.1, "epsilon_high": 0.0} | OFF_POLICY, tmp_path)


def test_metrics_are_of_a_step_and_apart_from_those_of_evaluation(tmp_path):
    trainer = run(EGPOTrainer, tmp_path, **MORE["evaluation"])
    assert [step["egpo/sequences/sum"] for step in steps(trainer) if "egpo/sequences/sum" in step] == [32, 32]
    assert [step["eval_egpo/sequences/sum"] for step in steps(trainer) if "eval_loss" in step] == [8, 8, 8]
    assert not any(name.startswith("egpo/policy/loss") for step in steps(trainer) for name in step)


ALIKE = {
    "gspo": {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.01},
    "dapo": {"epsilon_high": 0.28},
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_recipe_reports_as_the_same_options_do(name, tmp_path):
    more = {"clip_high": 0.01} if name == "cispo" else {}
    recipe = ek.recipes.get(name).replace(std_eps=1e-4, **more)
    assert_same_runs(
        run(EGPOTrainer, tmp_path, recipe=recipe, **OFF_POLICY), run(GRPOTrainer, tmp_path, **OFF_POLICY, **ALIKE[name])
    )


def saved(folder, name="Llama"):
    """A model that has a name, as TRL's reference must."""
    make_model(name).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).train()


@pytest.mark.parametrize(
    "options", [{}, {"use_bias_correction_kl": False}, {"loss_type": "grpo"}, {"num_iterations": 2}]
)
def test_kl_to_a_reference(options, tmp_path):
    kinds = ((EGPOTrainer, {"recipe": STOCK.replace(**LOSSES[options.get("loss_type", "dapo")])}), (GRPOTrainer, {}))
    runs = [run(kind, tmp_path, saved(tmp_path), beta=0.1, **options, **own) for kind, own in kinds]
    assert steps(runs[1])[-1]["kl"] > 1e-3
    assert_same_runs(*runs)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapters(beta, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (make parity installs it)")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    runs = [
        run(kind, tmp_path, saved(tmp_path), beta=beta, peft_config=config, num_iterations=2, **own)
        for kind, own in ((EGPOTrainer, {"recipe": STOCK}), (GRPOTrainer, {}))
    ]
    assert any(not torch.equal(value, runs[0].weights[0][name]) for name, value in runs[0].weights[-1].items())
    assert_same_runs(*runs)


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "Cohere"])
def test_what_models_do_to_their_logits(name, tmp_path):
    runs = [
        run(kind, tmp_path, make_model(name).train(), num_iterations=2, **own)
        for kind, own in ((EGPOTrainer, {"recipe": STOCK}), (GRPOTrainer, {}))
    ]
    assert_same_runs(*runs)


def mixture():
    """A model with an auxiliary loss, which only TRL's own head gives."""
    torch.manual_seed(0)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 0.1}
    config = transformers.Qwen3MoeConfig(**SHARED, **more, output_router_logits=True)
    return transformers.Qwen3MoeForCausalLM(config).train()


def rounded():
    """A model of 16 bits, whose output layer ``cast_lm_head_to_fp32`` multiplies in 32."""
    return make_model().train().bfloat16()


HEADS = {
    "mixture": {"model": mixture},
    "cast": {"cast_lm_head_to_fp32": True, "loss_type": "grpo"},
    "cast from 16 bits": {"model": rounded, "cast_lm_head_to_fp32": True, "max_steps": 1, "num_iterations": 1},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_heads_that_are_more_than_a_layer(options, tmp_path):
    """A mixture's auxiliary loss is given by TRL's own head; one cast to float32 is ours."""
    options = {"num_iterations": 2, "gradient_accumulation_steps": 2, **options}
    make = options.pop("model", lambda: make_model().train())
    recipe = STOCK.replace(**LOSSES[options.get("loss_type", "dapo")])
    runs = [
        run(kind, tmp_path, make(), **options, **own)
        for kind, own in ((EGPOTrainer, {"recipe": recipe}), (GRPOTrainer, {}))
    ]
    assert make is not mixture or steps(runs[1])[0]["aux_loss"] > 0
    assert_same_runs(*runs)


def test_the_head_is_ours(tmp_path, monkeypatch):
    """TRL's own head is left to the reference model."""

    def refuse(*_):
        raise AssertionError("TRL's head was called")

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", refuse)
    run(EGPOTrainer, tmp_path, num_iterations=2)
    run(EGPOTrainer, tmp_path, rounded(), cast_lm_head_to_fp32=True, max_steps=1)
    with pytest.raises(AssertionError, match="TRL's head was called"):
        run(EGPOTrainer, tmp_path, saved(tmp_path), beta=0.1)


@pytest.mark.parametrize("adapters, count", [(True, 2), (False, 4)])
def test_products_of_a_step(adapters, count, tmp_path):
    """Of the size of the logits, in a real run: the entropy that TRL reports costs none."""
    peft = pytest.importorskip("peft", reason="peft is not installed (make parity installs it)")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    more = {"peft_config": config, "model": saved(tmp_path)} if adapters else {}
    seen = []

    class Counted(EGPOTrainer):
        def training_step(self, *inputs, **named):
            made = products(lambda: seen.append([super(Counted, self).training_step(*inputs, **named)]))
            seen[-1] = [each for each in made if VOCAB in each and SHARED["hidden_size"] in each]
            return torch.tensor(0.0)

    trainer = run(Counted, tmp_path, recipe="dapo", max_steps=1, **more)
    assert trainer.recipe.advantage.weight == "none"  # no forward of its own for the advantages
    (step,) = seen
    assert len(step) == count
