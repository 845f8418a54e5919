"""Slime: a policy loss from per-sample lists, reduced by slime, and advantages of a whole rollout."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.api.groups import group_advantages
from egpo_kernels.api.logits import policy_loss
from egpo_kernels.config import recipes
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig
from egpo_kernels.inputs.validation import check_instance


def samples_policy_loss(
    log_probs: Sequence[Tensor],
    old_log_probs: Sequence[Tensor] | None,
    batch: Mapping[str, Any],
    sum_of_sample_mean: Callable[[Tensor], Tensor],
    config: PolicyLossConfig = recipes.EGPO.loss,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of a slime micro-batch, for a function named by ``--custom-loss-function-path``.

    Args:
        log_probs: Log-probs, a tensor ``[response_length]`` for each sample, floating.
        old_log_probs: Those at sampling time, a list like log_probs; None or empty: on-policy.
        batch: Slime's micro-batch, with ``advantages``, ``loss_masks`` and, for a KL, ``ref_log_probs``: lists like
            log_probs.
        sum_of_sample_mean: Slime's function that reduces a per-token vector; it replaces ``config.reduction``.
        config: Settings of the loss, without an entropy bonus.

    Returns:
        ``(loss, {"loss": loss})``, 0-d, the second detached.

    Raises:
        ValueError: A wrong length, device or value (context parallelism splits log-probs but not masks); a missing
            input.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, PolicyLossConfig)
    if config.has_bonus:
        raise ValueError(
            f"config.entropy_coef is {config.entropy_coef}; it must be 0, as a batch has no entropies: subtract the "
            "bonus from the loss, with those of get_log_probs_and_entropy(with_entropy=True)"
        )
    ref = batch.get("ref_log_probs") if config.kl_coef else None
    if config.kl_coef and ref is None:
        raise ValueError(
            f"batch['ref_log_probs'] is None with config.kl_coef {config.kl_coef}; it must be a list like log_probs: "
            "start slime with --use-kl-loss and --ref-load, or set kl_coef to 0"
        )
    flat = torch.cat(list(log_probs))
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
        samples: Slime's ``Sample`` objects with ``group_index``, ``response_length``, ``loss_mask`` (None: every token)
            and ``rollout_log_probs``.
        rewards: One for each sample.
        config: Settings of the advantages.

    Raises:
        ValueError: Samples without ``group_index``, or without ``rollout_log_probs`` if the settings need them; a wrong
            length.
        TypeError: A wrong type.
    """
    groups = [sample.group_index for sample in samples]
    if None in groups:
        raise ValueError(
            f"samples[{groups.index(None)}].group_index is None; it must be the number of its prompt: "
            "set it where your rollout function makes samples itself, as slime's data source does"
        )
    scored = [sample.rollout_log_probs for sample in samples]
    masks = [[1] * each.response_length if each.loss_mask is None else each.loss_mask for each in samples]
    return group_advantages(
        torch.tensor(groups),
        torch.tensor(rewards, dtype=torch.float32),
        None if None in scored else torch.tensor([each for row in scored for each in row], dtype=torch.float32),
        torch.tensor([each for row in masks for each in row]),
        cu_seqlens=torch.tensor([0, *accumulate(sample.response_length for sample in samples)]),
        config=config,
    ).advantages
