"""verl's own functions in the order in which its `ppo_loss` calls them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig
from verl.workers.reward_manager.dapo import DAPORewardManager

from tests.parity.batch import Answer, Batch, differentiated

GLOBAL = ("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")


def loss(batch: Batch, **options: Any) -> Answer:
    """Policy loss, entropy bonus and KL of a micro-batch; ``options`` are those of `ActorConfig` and of its loss."""
    mask, mode = batch.mask, options.pop("loss_mode")
    counts = {name: options.pop(name) for name in GLOBAL if name in options}
    correction = {name: options.pop(name) for name in ("rollout_is", "rollout_is_threshold") if name in options}
    weights = options.pop("rollout_is_weights", None)
    if correction:
        weights = rollout_is_weights(batch, **correction)
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=8, global_batch_info=counts, **options
    )

    def aggregated(values: Tensor) -> Tensor:
        return core_algos.agg_loss(values, mask, config.loss_agg_mode, **counts)

    def function(log_probs: Tensor) -> Tensor:
        found, _ = core_algos.get_policy_loss_fn(mode)(
            old_log_prob=batch.old_log_probs,
            log_prob=log_probs,
            advantages=batch.advantages[:, None].expand(mask.shape),
            response_mask=mask,
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=weights,
        )
        if config.entropy_coeff:
            found = found - config.entropy_coeff * aggregated(batch.entropy)
        if "kl_loss_coef" in options:
            kl = core_algos.kl_penalty(log_probs, batch.ref_log_probs, config.kl_loss_type)
            found = found + config.kl_loss_coef * aggregated(kl)
        return found

    return differentiated(function, batch.log_probs)


def rollout_is_weights(batch: Batch, rollout_is: str, rollout_is_threshold: float) -> Tensor:
    """verl's correction for the sampler; what the sampler did not score is what it would have been."""
    ratio = (batch.old_log_probs - batch.sampler_log_probs).nan_to_num(0.0)
    return compute_rollout_correction_weights(ratio, batch.mask, rollout_is, rollout_is_threshold)[0]


def advantages(
    groups: list[int], rewards: Tensor, mask: Tensor, adv_estimator: str, gamma: float = 1.0, **options: Any
) -> Tensor:
    """Advantages ``[S, T]`` of rewards that stand at each response's last counted position."""
    last = mask.long().cumsum(-1).argmax(-1, keepdim=True)
    token_rewards = torch.zeros(mask.shape).scatter(-1, last, rewards[:, None])
    function, config = core_algos.get_adv_estimator_fn(adv_estimator), AlgoConfig(gamma=gamma)
    return function(token_rewards, mask.long(), index=np.array(groups, dtype=object), config=config, **options)[0]


class Responses(list):
    """As much of a `DataProto` of responses of 128 positions as a reward manager looks at."""

    def __init__(self, lengths: Tensor):
        found = {"source": "", "reward_model": {"ground_truth": ""}}
        tokens = torch.zeros(128, dtype=torch.long)
        for length in lengths:
            attended = torch.cat([torch.ones(1, dtype=torch.long), torch.arange(128) < length])
            batch = {"prompts": tokens[:1], "responses": tokens, "attention_mask": attended}
            self.append(SimpleNamespace(batch=batch, non_tensor_batch=found))
        self.batch = {"responses": tokens.expand(len(lengths), -1)}


def overlong(lengths: Tensor, overlong_buffer_cfg: dict[str, Any], **options: Any) -> Tensor:
    """What verl's DAPO reward manager adds to a score of 0."""
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "", eos_token="end")
    manager = DAPORewardManager(
        tokenizer,
        num_examine=0,
        compute_score=lambda **_: 0.0,
        reward_fn_key="source",
        overlong_buffer_cfg=SimpleNamespace(**overlong_buffer_cfg),
        **options,
    )
    return manager(Responses(lengths)).sum(-1)
