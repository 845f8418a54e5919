"""TRL's own GRPOTrainer without a model: its methods run as they are, on log-probs that are given."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tests.parity.batch import Answer, Batch, differentiated

COPIED = (
    "beta", "importance_sampling_level", "loss_type", "mask_truncated_completions", "max_completion_length",
    "multi_objective_aggregation", "num_generations", "num_iterations", "off_policy_mask_threshold", "scale_rewards",
    "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max",
)  # fmt: skip


class Alone:
    """An accelerator of one process among ``num_processes``: what is gathered is what was given."""

    device = torch.device("cpu")
    process_index = 0
    sync_gradients = True

    def __init__(self, num_processes: int):
        self.num_processes = num_processes

    def same(self, value: Any, *_: Any, **__: Any) -> Any:
        return value

    gather = gather_for_metrics = reduce = pad_across_processes = same


class Trainer(GRPOTrainer):
    """Everything but how it is made and where log-probs come from is TRL's."""

    def __init__(self, batch: Batch, log_probs: Tensor, num_processes: int = 1, **options: Any):
        size, _ = batch.mask.shape
        self.args = GRPOConfig(
            output_dir="unused", report_to=[], use_cpu=True, bf16=False, **{
                "per_device_train_batch_size": size, "num_generations": size // 2, **options,
            }
        )  # fmt: skip
        for name in COPIED:
            setattr(self, name, getattr(self.args, name))
        self.epsilon_low = self.args.epsilon
        self.epsilon_high = self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high
        self.use_vllm = options.get("use_vllm", False)
        self.batch, self.log_probs = batch, log_probs
        self.accelerator = Alone(num_processes)
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self.aux_loss_enabled, self._entropy_bonus_enabled = False, self.entropy_coef != 0
        self._metrics = {"train": defaultdict(list)}
        self._rollout_attributes()

    def _rollout_attributes(self) -> None:
        self.environment_factories = self.environments = self.pad_to_multiple_of = None
        self.tools = []
        self._tokenizer, self.ref_model = SimpleNamespace(pad_token_id=0), "not looked at"
        self._pending_extra_logs, self._pending_metrics = {}, {}
        lists = {name: [] for name in ("prompt", "completion", "advantages")}
        self._logs = {**lists, "rewards": defaultdict(list), "extra": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model: Any, *_: Any, **__: Any) -> tuple:
        return (self.log_probs if torch.is_grad_enabled() else self.batch.old_log_probs), self.batch.entropy, None


def inputs(batch: Batch, num_items_in_batch: Tensor, **more: Any) -> dict[str, Any]:
    """A micro-batch as TRL hands it to its loss; holes are a tool's output."""
    ids = torch.ones_like(batch.mask, dtype=torch.long)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": ids,
        "tool_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_log_probs,
        "ref_per_token_logps": batch.ref_log_probs,
        "sampling_per_token_logps": batch.sampler_log_probs,
        "num_items_in_batch": num_items_in_batch,
    } | more


def loss(batch: Batch, num_processes: int = 1, num_items_in_batch: Tensor | None = None, **options: Any) -> Answer:
    """`GRPOTrainer._compute_loss` of a micro-batch; an option that is an input of it (a tensor or None) goes there."""
    items = batch.mask.sum() if num_items_in_batch is None else num_items_in_batch
    given = inputs(batch, items)
    for name in [name for name in options if name in given]:
        given[name] = options.pop(name)
    if options.get("use_vllm"):
        given["importance_sampling_ratio"] = rollout(batch, **options)["importance_sampling_ratio"]

    def function(log_probs: Tensor) -> Tensor:
        return Trainer(batch, log_probs, num_processes, **options)._compute_loss(None, given)

    return differentiated(function, batch.log_probs)


def rollout(batch: Batch, rewards: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """`GRPOTrainer._generate_and_score_completions` of responses that are already there."""
    trainer = Trainer(batch, batch.log_probs, **options)
    size, length = batch.mask.shape
    ids = [[1] * length] * size
    masks, sampled = batch.mask.long().tolist(), batch.sampler_log_probs.tolist()
    trainer._generate = lambda prompts: (ids, ids, masks, [""] * size, sampled, {}, None, None)
    given = torch.zeros(size) if rewards is None else rewards
    given = given.reshape(size, -1)
    trainer._calculate_rewards = lambda *_: given.clone()
    trainer.reward_funcs = trainer.reward_func_names = [f"reward {i}" for i in range(given.shape[1])]
    trainer.reward_weights = torch.ones(given.shape[1])
    return trainer._generate_and_score_completions([{"prompt": ""}] * size)
