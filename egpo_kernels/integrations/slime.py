"""Slime: a policy loss from per-sample lists, reduced by slime, and advantages of a whole rollout."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from egpo_kernels import recipes
from egpo_kernels.api import policy_loss
from egpo_kernels.groups import group_advantages
from egpo_kernels.types import AdvantageConfig, PolicyLossConfig


def samples_policy_loss(
    log_probs: Sequence[Tensor],
    old_log_probs: Sequence[Tensor] | None,
    batch: Mapping[str, Any],
    sum_of_sample_mean: Callable[[Tensor], Tensor],
    config: PolicyLossConfig = recipes.EGPO.loss,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of a slime micro-batch; returns what ``--custom-loss-function-path`` has to.

    Args:
        log_probs: One ``[response_length]`` for each sample, floating.
        old_log_probs: The same at sampling time; None or empty: on-policy.
        batch: Slime's, with ``advantages``, ``loss_masks`` and, for a KL, ``ref_log_probs``: lists like log_probs.
        sum_of_sample_mean: Slime's reducer of a per-token vector; it stands in for ``config.reduction``.
        config: The settings, without an entropy bonus.

    Returns:
        ``(loss, {"loss": loss})``, 0-d, the second detached.

    Raises:
        ValueError: A wrong length, device or value: context parallelism cuts log-probs, not masks.
        TypeError: A wrong type or dtype.
    """
    flat = torch.cat(list(log_probs))
    ref = batch["ref_log_probs"] if config.kl_coef > 0 else None
    per_token = policy_loss(
        flat,
        torch.cat(list(old_log_probs)) if old_log_probs else None,
        torch.cat(batch["advantages"]),
        torch.cat(batch["loss_masks"]),
        ref_log_probs=None if ref is None else torch.cat(ref),
        cu_seqlens=torch.tensor([0, *accumulate(len(each) for each in log_probs)], device=flat.device),
        config=dataclasses.replace(config, reduction="none", norm_length=None),
    ).loss
    loss = sum_of_sample_mean(per_token)
    return loss, {"loss": loss.detach()}


def samples_advantages(
    samples: Sequence[Any], rewards: Sequence[float], config: AdvantageConfig = recipes.EGPO.advantage
) -> Tensor:
    """Advantages ``[S]`` of all samples of a rollout, float32 on the CPU.

    Args:
        samples: Slime's ``Sample`` objects with ``group_index``, ``response_length``, ``loss_mask`` (None counts every
            token) and ``rollout_log_probs``.
        rewards: One for each sample.
        config: The settings.

    Raises:
        ValueError: Samples without ``rollout_log_probs`` where the settings need them, or a wrong length.
        TypeError: A wrong type.
    """
    scored = [sample.rollout_log_probs for sample in samples]
    masks = [[1] * each.response_length if each.loss_mask is None else each.loss_mask for each in samples]
    return group_advantages(
        torch.tensor([sample.group_index for sample in samples]),
        torch.tensor(rewards, dtype=torch.float32),
        None if None in scored else torch.tensor([each for row in scored for each in row], dtype=torch.float32),
        torch.tensor([each for row in masks for each in row]),
        cu_seqlens=torch.tensor([0, *accumulate(sample.response_length for sample in samples)]),
        config=config,
    ).advantages
