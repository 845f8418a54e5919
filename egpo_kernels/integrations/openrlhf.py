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
        log_probs: Log-probs of the actions, ``[B, A]``, floating.
        old_log_probs: Those of the actor before the step, ``[B, A]``, floating.
        advantages: ``[B, A]``, floating; treated as constants.
        action_mask: ``[B, A]``, nonzero where a token is in the mask; None: everywhere.
        rollout_log_probs: Ignored: importance weights for the sampler are not supported.
        dp_size: Number of ranks over which gradients are averaged.
        batch_num_tokens: Tokens in the mask of the step over all ranks, for ``token_mean``.
        global_batch_size: Sequences of the step over all ranks, for the ``seq_mean`` reductions.
        config: Settings of the loss.

    Returns:
        ``(loss, share of clipped tokens, KL to the old policy, None, None)``, 0-d each. A dual-clipped token is
        clipped. The KL is estimated by k3, in OpenRLHF by k1.

    Raises:
        ValueError: A wrong shape, device or value; a KL or an entropy bonus, since OpenRLHF adds them.
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
        experiences: All of a rollout, with ``index`` (places in the rollout, ``group_size`` consecutive ones for each
            prompt), ``rewards [B]``, ``action_log_probs [B, A]`` and ``action_mask [B, A]``; A may differ.
        group_size: OpenRLHF's ``n_samples_per_prompt``.
        config: Settings of the advantages.

    Returns:
        Advantages ``[B, A]`` of each experience, 0 at masked positions.

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
