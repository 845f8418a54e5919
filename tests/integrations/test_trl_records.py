"""EGPOTrainer replays what a rollout_func says its sampler kept: old, current and reference log-probs."""

import copy
import itertools
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (make parity installs it)")

import trl.trainer.utils
from transformers import TrainerCallback
from trl import GRPOConfig

from egpo_kernels.integrations.trl import EGPOTrainer
from egpo_kernels.integrations.trl_records import truncating
from tests.integrations.models import VOCAB, make_model
from tests.integrations.test_trl import mixture, saved
from tests.integrations.test_trl_groups import Watched
from tests.integrations.trl_runs import STOCK, prompts, rollout, rollout_of_ids, rollout_with_sets, run, steps
from tests.support.accuracy import assert_accurate, assert_rounding

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def sets_of(batch):
    """The record of a batch as a mask over the vocabulary; all where there is none."""
    whole = torch.zeros(*batch["completion_ids"].shape, VOCAB, dtype=torch.bool)
    for row, record in enumerate(batch["sampling_masks"]):
        for place, (low, high) in enumerate(zip(record.offsets[:-1], record.offsets[1:], strict=True)):
            whole[row, place, record.ids[low:high]] = True
    return whole | ~whole.any(-1, keepdim=True)


def masked(model, batch, temperature=1.0):
    """Log-probs of a batch's completions: log-softmax of whole logits that are -inf outside of the sets."""
    ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    logits = model(ids, attention_mask=attention).logits[:, -batch["completion_ids"].shape[1] - 1 : -1] / temperature
    every = torch.where(sets_of(batch), logits, -torch.inf).log_softmax(-1)
    return every.gather(-1, batch["completion_ids"][..., None])[..., 0]


def assert_over_the_sets(found, batch, temperature=1.0, model=None):
    model, mask = make_model() if model is None else model, batch["completion_mask"].bool()
    with torch.no_grad():
        plain, exact = (masked(each, batch, temperature)[mask] for each in (model, copy.deepcopy(model).double()))
    # A log-prob is a difference of numbers of some nats.
    assert_accurate(found[mask], plain, exact, exact.abs() + 1, "log-probs")
    singletons = sets_of(batch).sum(-1)[mask] == 1
    assert singletons.any() and (found[mask][singletons] == 0).all()
    assert (exact < -0.1).any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_old_log_probs_are_over_the_kept_sets(temperature, tmp_path):
    options = {"num_iterations": 2, "temperature": temperature, "rollout_func": rollout_with_sets}
    trainer = run(Watched, tmp_path, max_steps=1, **options)
    assert_over_the_sets(trainer.first["old_per_token_logps"], trainer.first, temperature)


def test_a_list_a_token_is_the_same_record(tmp_path):
    """As vLLM returns it: `sampling_mask.token_ids`."""

    def nested(prompts, trainer):
        output = rollout_with_sets(prompts, trainer)
        flat = zip(output["sampling_mask_ids"], output.pop("sampling_mask_offsets"), strict=True)
        output["sampling_mask_ids"] = [
            ids if ids is None else [ids[low:high] for low, high in itertools.pairwise(ends)] for ids, ends in flat
        ]
        return output

    runs = [run(EGPOTrainer, tmp_path, rollout_func=func) for func in (rollout_with_sets, nested)]
    for found, wanted in zip(*(each.weights for each in runs), strict=True):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


class Gradients(TrainerCallback):
    """Of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.found = self.__dict__.get("found") or {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}])
@pytest.mark.parametrize("iterations", [1, 2])
def test_the_gradient_is_that_of_masked_logits(iterations, split, tmp_path):
    callback = Gradients()
    options = {"num_iterations": iterations, "rollout_func": rollout_with_sets, "recipe": STOCK} | split
    trainer = run(Watched, tmp_path, max_steps=1, before=lambda trainer: trainer.add_callback(callback), **options)
    batch, found = trainer.first, {}
    for dtype in (torch.float32, torch.float64):
        model = make_model().train().to(dtype)
        log_probs, mask = masked(model, batch), batch["completion_mask"]
        loss = -batch["advantages"][:, None] * (log_probs - log_probs.detach()).exp() * mask
        (loss.sum() / mask.sum()).backward()
        found[dtype] = {name: each.grad for name, each in model.named_parameters()}
    largest = max(each.abs().max() for each in found[torch.float64].values())
    assert largest > 1e-3
    for name, exact in found[torch.float64].items():
        assert_accurate(callback.found[name], found[torch.float32][name], exact, largest, name)


def test_the_ratio_of_the_first_step_is_one(tmp_path):
    trainer = run(EGPOTrainer, tmp_path, num_iterations=2, rollout_func=rollout_with_sets)
    ends = [(step["egpo/policy/ratio/min"], step["egpo/policy/ratio/max"]) for step in steps(trainer)]
    assert ends[0] == (1.0, 1.0) and ends[1][0] < 1 < ends[1][1]


@pytest.mark.parametrize("adapters", [False, True])
def test_the_reference_is_over_the_kept_sets_too(adapters, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("TRL's head was called")

    peft = pytest.importorskip("peft", reason="peft is not installed (make parity installs it)")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    options = {"beta": 0.1, "rollout_func": rollout_with_sets, "recipe": STOCK, "num_iterations": 2}
    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", refuse)
    trainer = run(Watched, tmp_path, saved(tmp_path), peft_config=config if adapters else None, **options)
    assert_over_the_sets(trainer.first["ref_per_token_logps"], trainer.first)
    # The policy moves away from a reference that began as itself.
    assert steps(trainer)[0]["kl"] == 0 and steps(trainer)[-1]["kl"] > 1e-6


def test_what_was_kept_is_reported_in_training_and_evaluation(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts(2), "num_generations_eval": 4}
    options |= {"per_device_eval_batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = run(Watched, tmp_path, max_steps=1, rollout_func=rollout_with_sets, **options)
    sizes = sets_of(trainer.first).sum(-1)[trainer.first["completion_mask"].bool()]
    sizes = sizes[sizes < VOCAB]
    wanted = {"rows/sum": len(sizes), "kept/max": sizes.max(), "singletons/sum": (sizes == 1).sum()}
    wanted |= {"missing_tokens/sum": 0, "kept/mean": sizes.float().mean()}
    training, evaluation = ([step for step in steps(trainer) if each in step] for each in ("loss", "eval_loss"))
    for name, value in wanted.items():
        assert_rounding(torch.tensor(training[0][f"egpo/support/{name}"]), torch.as_tensor(value).float())
    assert evaluation[0]["eval_egpo/support/rows/sum"] > 0


def test_rewards_do_not_see_the_record(tmp_path):
    seen = []

    def reward(completion_ids, **columns):
        seen.append(columns.keys())
        return [float(len(ids)) for ids in completion_ids]

    run(EGPOTrainer, tmp_path, max_steps=1, rollout_func=rollout_with_sets, reward_funcs=reward)
    assert seen and not any(name.startswith("sampling_mask") for names in seen for name in names)


def changed(**change):
    """A rollout whose record is changed: each value a function of the one that was there."""

    def func(prompts, trainer):
        output = rollout_with_sets(prompts, trainer)
        return output | {
            f"sampling_mask_{name}": made(output[f"sampling_mask_{name}"]) for name, made in change.items()
        }

    return func


def first(make):
    return lambda values: [make(values[0]), *values[1:]]


REFUSED = {
    "offsets alone": (changed(ids=lambda _: None), "returned sampling_mask_offsets without sampling_mask_ids"),
    "too few": (changed(ids=lambda ids: ids[1:]), "sampling_mask_ids with 7 entries; .* one for each of 8 completions"),
    "no list": (changed(ids=lambda _: 3), "sampling_mask_ids is int"),
    "offsets that leave": (
        changed(offsets=first(lambda ends: [*ends[:-1], 99])),
        r"sampling_mask_offsets\[0\] is .* it must start at 0",
    ),
    "a token too many": (
        changed(offsets=first(lambda ends: [*ends, ends[-1]])),
        r"sampling_mask_ids\[0\] has a record",
    ),
    "a token too few": (
        changed(ids=first(lambda _: []), offsets=first(lambda _: [0])),
        "a record of 0 tokens for completion 0, which has",
    ),
}


@pytest.mark.parametrize("func, message", REFUSED.values(), ids=REFUSED)
def test_records_that_do_not_fit_are_refused(func, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        run(EGPOTrainer, tmp_path, max_steps=1, rollout_func=func)


def test_a_record_for_log_probs_of_trl_is_refused(tmp_path):
    with pytest.raises(ValueError, match="returned sampling_mask_ids for a model with images or an auxiliary loss"):
        run(EGPOTrainer, tmp_path, mixture(), max_steps=1, rollout_func=rollout_with_sets)


TRUNCATED = [
    ({"top_p": 0.9}, "top_p=0.9"),
    ({"top_k": 20, "min_p": 0.1}, "top_k=20, min_p=0.1"),
    ({"generation_kwargs": {"top_p": 0.8}}, "top_p=0.8"),
]


@pytest.mark.parametrize("options, named", TRUNCATED)
def test_truncation_without_a_record_is_said_once(options, named, tmp_path):
    for func, times in ((rollout, 1), (rollout_of_ids, 1), (rollout_with_sets, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(EGPOTrainer, tmp_path, max_steps=2, rollout_func=func, **options)
        said = [str(each.message) for each in caught if "no record of the kept tokens" in str(each.message)]
        assert len(said) == times and all(f"({named})" in each for each in said)


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 1.0, "top_k": -1, "min_p": 0.0}, {"generation_kwargs": {"top_p": None}}]
)
def test_options_that_keep_all_do_not_truncate(options, tmp_path):
    assert truncating(GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)) == {}
