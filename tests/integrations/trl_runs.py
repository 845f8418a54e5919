"""Real GRPOTrainer runs of a tiny model on a CPU, whose samples do not depend on how a batch is split."""

import itertools
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from egpo_kernels import recipes
from egpo_kernels.integrations.trl_options import LOSSES
from tests.integrations.models import VOCAB, make_model

# The same numbers as TRL: its epsilon, and its default loss.
STOCK = recipes.GRPO.replace(std_eps=1e-4, **LOSSES["dapo"])
GROUP = 4


def tokenizer() -> PreTrainedTokenizerFast:
    """Word i is token i; token 0 pads and token 2 ends."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def prompts(count: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{3 + i} w{20 + i}" for i in range(count)]})


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for a completion whose first word is an even one."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def lengths(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that is missing for some."""
    return [None if ids[0] % 3 == 0 else 0.25 * len(ids) for ids in completion_ids]


def sampled(trainer: Any, count: int) -> dict[str, list]:
    """Completions, short ones with an end, by their place in the global batch and by how many batches came before."""
    batch = trainer.__dict__.setdefault("batches", itertools.count())
    generator = torch.Generator().manual_seed(next(batch))
    size = count * trainer.accelerator.num_processes
    ids = torch.randint(3, VOCAB, (size, 8), generator=generator)
    sizes = torch.randint(1, 9, (size,), generator=generator)
    log_probs = -3 * torch.rand(size, 8, generator=generator)
    ids[torch.arange(size), sizes - 1] = torch.where((sizes > 1) & (sizes < 6), 2, ids[torch.arange(size), sizes - 1])
    first = trainer.accelerator.process_index * count
    rows = range(first, first + count)
    return {
        "completion_ids": [ids[row, : sizes[row]].tolist() for row in rows],
        "logprobs": [log_probs[row, : sizes[row]].tolist() for row in rows],
    }


def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
    """A `rollout_func` of TRL: the samples above, and what the sampler thought of them."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": ids, **sampled(trainer, len(prompts))}


def rollout_of_ids(prompts: list[str], trainer: Any) -> dict[str, list]:
    """The same of a sampler that gives no log-probs."""
    return {**rollout(prompts, trainer), "logprobs": None}


def rollout_with_sets(prompts: list[str], trainer: Any) -> dict[str, list]:
    """The same of a sampler that says what it kept: up to nine tokens with each, singletons too; of some nothing."""
    output = rollout_of_ids(prompts, trainer)
    completions, count = output["completion_ids"], len(prompts)
    size, first = count * trainer.accelerator.num_processes, trainer.accelerator.process_index * count
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(-1, 10, (size, 8), generator=generator).clamp(min=0)
    near = torch.rand(size, 8, VOCAB, generator=generator).argsort(-1)
    ids, offsets = [], []
    for row, tokens in enumerate(completions, first):
        sets = [
            sorted({token, *near[row, place, : sizes[row, place] - 1].tolist()}) if sizes[row, place] else []
            for place, token in enumerate(tokens)
        ]
        ids.append(None if row % 5 == 4 else list(itertools.chain(*sets)))
        offsets.append(None if row % 5 == 4 else [0, *itertools.accumulate(map(len, sets))])
    return {**output, "sampling_mask_ids": ids, "sampling_mask_offsets": offsets}


def rollout_with_tools(prompts: list[str], trainer: Any) -> dict[str, list]:
    """The same of an environment that writes some of the words."""
    output = rollout(prompts, trainer)
    return {**output, "env_mask": [[int(token % 3 > 0) for token in ids] for ids in output["completion_ids"]]}


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.steps.append({name: value.detach().clone() for name, value in model.named_parameters()})


def run(kind: type[GRPOTrainer], folder: Any, model: nn.Module | None = None, **options: Any) -> GRPOTrainer:
    """Train for three steps of plain gradient descent; options that no GRPOConfig has are the trainer's."""
    own = {name: options.pop(name) for name in set(options) - set(GRPOConfig.__dataclass_fields__)}
    given = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "optim": "sgd", "seed": 3,
        "learning_rate": 0.02, "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "max_steps": 3,
        "logging_steps": 1, "num_generations": GROUP, "per_device_train_batch_size": 2 * GROUP,
        "max_completion_length": 8,
    }  # fmt: skip
    before = own.pop("before", lambda trainer: None)
    weights = Weights()
    trainer = kind(
        model=make_model().train() if model is None else model,
        args=GRPOConfig(**given | options),
        callbacks=[weights],
        **{
            "train_dataset": prompts(),
            "processing_class": tokenizer(),
            "reward_funcs": even,
            "rollout_func": rollout_of_ids,
        }
        | own,
    )
    trainer.weights = weights.steps
    before(trainer)
    trainer.train()
    return trainer


def steps(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """What was logged of each step, and of each evaluation."""
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
