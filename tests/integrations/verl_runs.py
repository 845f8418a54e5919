"""verl's registry, trainers and engines on one small batch, with our names in them."""

import dataclasses
import warnings

import numpy as np
import torch
from omegaconf import OmegaConf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # verl warns of engines that are not installed
    from verl.trainer.ppo import ray_trainer
    from verl.trainer.ppo.v1 import utils as v1

from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

import egpo_kernels as ek
import egpo_kernels.integrations.verl
from tests.parity.batch import Answer, Batch, differentiated, make_batch

BATCH = make_batch(empty=True)
SETTINGS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5, "tau_pos": 1.2, "tau_neg": 1.3}
# What verl divides by, in a batch that is everything, and in a part of a larger one.
WHOLE, PART = {}, {"dp_size": 2, "batch_num_tokens": 400, "global_batch_size": 32, "loss_scale_factor": 32}


def actor(kind=FSDPActorConfig, loss_mode="egpo", info=None, **options):
    return kind(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=8,
        global_batch_info=dict(info or {}),
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        **{**SETTINGS, **options},
    )


def sized(function, batch: Batch) -> Answer:
    """A loss and its gradient, with about the sum of the loss's terms, all of one sign."""
    found = differentiated(function, batch.log_probs)
    return found._replace(size=(found.gradient.abs() * (1 + batch.log_probs.abs())).sum())


def registered(batch: Batch, loss_mode: str, loss_agg_mode: str, config, weights=None):
    """Loss, gradient and metrics, through verl's registry."""
    seen = {}

    def function(log_probs):
        loss, metrics = get_policy_loss_fn(loss_mode)(
            old_log_prob=batch.old_log_probs,
            log_prob=log_probs,
            advantages=batch.advantages[:, None].expand(batch.mask.shape),
            response_mask=batch.mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=weights,
        )
        seen.update(metrics)
        return loss

    return sized(function, batch), seen


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(batch: Batch, padded: bool, counts=WHOLE, weights=True, ref=True):
    """What an engine hands to a loss: a `TensorDict` and a function of ``[B, R]`` to the model's output."""
    generator = torch.Generator().manual_seed(1)
    width, prompts = batch.mask.shape[1], [1 + row % 3 for row in range(len(batch.mask))]
    lengths = [max(1, int(row.nonzero()[-1]) + 1) if row.any() else 1 for row in batch.mask]
    per_token = {"response_mask": batch.mask.long(), "old_log_probs": batch.old_log_probs}
    per_token["advantages"] = batch.advantages[:, None] * batch.mask
    per_token |= {"rollout_is_weights": batch.weights} if weights else {}
    per_token |= {"ref_log_prob": batch.ref_log_probs} if ref else {}
    tensors = {"prompts": torch.zeros(len(prompts), 3).long(), "responses": torch.zeros(len(prompts), width).long()}
    if padded:
        before = torch.arange(3) >= 3 - torch.tensor(prompts)[:, None]
        after = torch.arange(width) < torch.tensor(lengths)[:, None]
        tensors |= per_token | {"attention_mask": torch.cat([before, after], 1).long()}
    else:
        tensors["prompts"] = nested([row[:length] for row, length in zip(tensors["prompts"], prompts, strict=True)])
        for name, values in {"responses": tensors["responses"], **per_token}.items():
            tensors[name] = nested([row[:length] for row, length in zip(values, lengths, strict=True)])
    info = {name: counts.get(name) for name in ("batch_num_tokens", "global_batch_size")}
    data = tu.get_tensordict(tensors, info | {"dp_size": counts.get("dp_size", 1)})

    def output(values):
        rows = []
        for row, before, length in zip(values, prompts, lengths, strict=True):
            # Position t scores token t + 1; the last position scores nothing.
            noise = torch.randn(before, generator=generator)
            rows.append(torch.cat([noise[1:], row[:length], noise[:1]]))
        return nested(rows)

    return data, output


def engine(loss, batch, config, padded, counts=WHOLE, entropy=True, **more):
    """Loss and gradient, gradient of the entropies, and metrics, of a loss in an engine."""
    data, output = micro_batch(batch, padded, counts, **more)
    seen, bonus = {}, batch.entropy.clone().requires_grad_()

    def function(log_probs):
        given = {"log_probs": output(log_probs)} | ({"entropy": output(bonus)} if entropy else {})
        value, metrics = loss(config, model_output=given, data=data, dp_group=None)
        seen.update(metrics)
        return value

    found = sized(function, batch)
    return found, torch.zeros(8, 24) if bonus.grad is None else bonus.grad, seen


UID = np.array(["b", "a", "b", "c", "a", "b", "a", "c"], dtype=object)
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])


def rollout(rewards=REWARDS, uid=UID, log_probs="old_log_probs", scores=None):
    token_rewards = torch.zeros(BATCH.mask.shape)
    token_rewards[:, 0], token_rewards[:, 1] = rewards - 0.25, 0.25
    tensors = {"token_level_rewards": token_rewards, "response_mask": BATCH.mask.long()}
    tensors |= {"token_level_scores": token_rewards if scores is None else scores[:, None] * (torch.arange(24) == 5)}
    tensors |= {log_probs: BATCH.old_log_probs} if log_probs else {}
    return DataProto.from_dict(tensors, {"uid": uid})


def algorithm(adv_estimator="egpo", kind="hydra", **settings):
    """``config.algorithm`` of the trainers (in struct mode, as hydra makes it), or verl's dataclass."""
    if kind == "dataclass":
        config = AlgoConfig(adv_estimator=adv_estimator)
        if settings:
            config.egpo = settings
        return config
    config = OmegaConf.create(dataclasses.asdict(AlgoConfig(adv_estimator=adv_estimator)))
    if settings:
        config.egpo = settings
    OmegaConf.set_struct(config, True)
    return config


def advantages(data, config, through="ray_trainer", **more):
    named = {"adv_estimator": config.adv_estimator, "gamma": 1.0, "lam": 1.0, "num_repeat": 4, "config": config, **more}
    if through == "ray_trainer":
        return ray_trainer.compute_advantage(data, **named)
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(data.non_tensor_batch["uid"])]
    return v1.compute_advantage_for_multi_trajectories(data, batch_keys=keys, **named)


def expected_advantages(rewards=REWARDS, uid=UID, config=ek.recipes.EGPO.advantage, correct=None, rows=slice(None)):
    found = ek.group_advantages(
        list(uid[rows]), rewards[rows], BATCH.old_log_probs[rows], BATCH.mask[rows], config=config, correct=correct
    )
    return found.advantages[:, None] * BATCH.mask[rows]
