"""OpenRLHF: a loss in place of its `PolicyLoss`, and advantages of a whole rollout."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from egpo_kernels.api.groups import group_advantages
from egpo_kernels.api.logits import policy_loss
from egpo_kernels.config import recipes
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig
from egpo_kernels.inputs.validation import check_instance


def actor_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    *,
    config: PolicyLossConfig = recipes.EGPO.loss,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """`policy_loss` with the arguments and results of ``openrlhf.models.PolicyLoss.forward`` (OpenRLHF 0.11.2).

    Args:
        log_probs: ``[B, A]``, floating; old_log_probs and advantages too.
        old_log_probs: The actor's before the step.
        advantages: Treated as constants.
        action_mask: ``[B, A]``, nonzero counts; None counts every position.
        rollout_log_probs: Not looked at: there is no correction for the sampler here.
        dp_size: Ranks over which gradients are averaged.
        batch_num_tokens: Counted tokens of the step over all ranks, for ``token_mean``.
        global_batch_size: Sequences of the step over all ranks, for the ``seq_mean`` reductions.
        config: The settings.

    Returns:
        ``(loss, share of clipped tokens, KL to the old policy, None, None)``, 0-d each; dual clip counts as clipped,
        and the KL is k3, where OpenRLHF has k1.

    Raises:
        ValueError: A wrong shape, device or value; a KL or an entropy bonus, which OpenRLHF adds itself.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, PolicyLossConfig)
    for name, option in (("kl_coef", "algo.kl.use_loss"), ("entropy_coef", "actor.entropy_coef")):
        if value := getattr(config, name):
            raise ValueError(f"config.{name} is {value}; it must be 0, as OpenRLHF adds that term itself: set {option}")
    tokens, sequences = (None if count is None else count / dp_size for count in (batch_num_tokens, global_batch_size))
    counts: dict[str, Any] = {"num_tokens": tokens, "num_sequences": sequences}
    loss, metrics = policy_loss(log_probs, old_log_probs, advantages, action_mask, config=config, **counts)
    clipped = metrics["policy/clip_low/mean"] + metrics["policy/clip_high/mean"]
    return loss, clipped, metrics["policy/approx_kl/mean"], None, None


def rollout_advantages(
    experiences: Sequence[Any], group_size: int, config: AdvantageConfig = recipes.EGPO.advantage
) -> list[Tensor]:
    """Advantages of a rollout that OpenRLHF has cut into ``Experience`` objects, in any order.

    Args:
        experiences: All of a rollout, with ``index`` (places in the rollout, ``group_size`` consecutive ones a prompt),
            ``rewards [B]``, ``action_log_probs [B, A]`` and ``action_mask [B, A]``; A may differ.
        group_size: ``n_samples_per_prompt``.
        config: The settings.

    Returns:
        Advantages ``[B, A]`` of each, 0 where the mask is.

    Raises:
        ValueError: A prompt without all its samples, an experience without log-probs, or a wrong shape.
        TypeError: A wrong type or dtype.
    """
    bare = [place for place, each in enumerate(experiences) if each.action_log_probs is None]
    if bare:
        raise ValueError(
            f"experiences[{bare[0]}].action_log_probs is None; it must be [B, A]: ask the actor for it first"
        )
    masks = [experience.action_mask.bool() for experience in experiences]
    lengths = torch.cat([mask.sum(-1) for mask in masks])
    found = group_advantages(
        torch.tensor([place // group_size for experience in experiences for place in experience.index]),
        torch.cat([experience.rewards for experience in experiences]),
        torch.cat([experience.action_log_probs[mask] for experience, mask in zip(experiences, masks, strict=True)]),
        cu_seqlens=pad(lengths.cumsum(0), (1, 0)),
        config=config,
        group_size=group_size,
    )
    parts = found.advantages.split([len(mask) for mask in masks])
    return [part[:, None] * mask for part, mask in zip(parts, masks, strict=True)]
