"""verl 0.9.1: the policy losses of its registry, and a loss for its engines."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels.api.logits import policy_loss
from egpo_kernels.config.fields import renamed
from egpo_kernels.config.settings import PolicyLossConfig

LOSSES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "egpo": ({}, ("clip_low", "clip_high", "dual_clip")),
    "egpo_gspo": ({"ratio": "sequence_token"}, ("clip_low", "clip_high")),
    "egpo_cispo": ({"surrogate": "cispo"}, ("clip_low", "clip_high")),
    "egpo_sapo": ({"surrogate": "sapo"}, ("tau_positive", "tau_negative")),
    "egpo_gmpo": ({"surrogate": "gmpo"}, ("clip_low", "clip_high")),
}
"""Values of ``loss_mode``: what each is called here, and the settings that it reads."""
KEYS = {
    "clip_low": "clip_ratio_low",
    "clip_high": "clip_ratio_high",
    "dual_clip": "clip_ratio_c",
    "tau_positive": "tau_pos",
    "tau_negative": "tau_neg",
    "norm_length": "loss_scale_factor",
    "kl_coef": "kl_loss_coef",
    "entropy_coef": "entropy_coeff",
}
"""What verl's actor calls our settings."""
MODES = {
    "token-mean": "token_mean",
    "token-sum": "sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
}
"""``loss_agg_mode``: our ``reduction``."""
KL_TYPES = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
MEANS = ("clip_low", "clip_high", "ratio", "approx_kl")


def registered_loss(
    loss_mode: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss of verl's registry, normalised by ``config.global_batch_info`` as verl's ``agg_loss`` does.

    Args:
        loss_mode: A key of `LOSSES`.
        old_log_prob: ``[B, R]`` floating, like all tensors here but the mask.
        log_prob: The same under the policy; the loss is differentiable in it.
        advantages: Per token.
        response_mask: Nonzero where a token is in the mask.
        loss_agg_mode: A key of `MODES`.
        config: verl's ``ActorConfig`` or a ``DictConfig`` with its keys.
        rollout_is_weights: Factors of the surrogate.

    Returns:
        The 0-d loss and verl's metrics, with ours under ``egpo/``.

    Raises:
        ValueError: A wrong setting, with verl's name for it; a missing count.
    """
    batch = {"old_log_probs": old_log_prob, "advantages": advantages, "rollout_is_weights": rollout_is_weights}
    settings = _settings(loss_mode, loss_agg_mode, config, config.global_batch_info, log_prob.shape[-1])
    loss, metrics = _loss(settings, config.global_batch_info, log_prob, response_mask, batch)
    del metrics["actor/pg_loss"]  # verl's ppo_loss adds it
    return loss, _numbers(metrics)


def engine_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """Replaces verl's ``ppo_loss`` (pass it to ``set_loss_fn``): surrogate, entropy bonus and KL in one call.

    Args:
        config: verl's ``ActorConfig``; ``policy_loss.loss_mode`` is a key of `LOSSES`.
        model_output: ``log_probs`` and, if computed, ``entropy``: nested tensors ``[B, j]`` or flat, as verl's engines
            return them.
        data: The micro-batch, a ``TensorDict``, nested or padded.
        dp_group: Unused, as in verl.

    Returns:
        The 0-d loss and the metrics of ``ppo_loss``, with ours under ``egpo/``.

    Raises:
        ValueError: A wrong setting, with verl's name for it; a missing count or entropy.
    """
    from verl.trainer.ppo.core_algos import agg_loss, kl_penalty
    from verl.utils.metric import Metric
    from verl.workers.utils.padding import no_padding_2_padding

    log_prob, entropy = no_padding_2_padding(model_output["log_probs"], data), model_output.get("entropy", None)
    entropy = None if entropy is None else no_padding_2_padding(entropy, data)
    if config.entropy_coeff and entropy is None:
        raise ValueError(
            f"actor.entropy_coeff is {config.entropy_coeff!r} and the model gives no entropy; the batch must have "
            "calculate_entropy=True, or the coefficient be 0"
        )
    info = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    info["loss_scale_factor"] = config.loss_scale_factor
    wanted = ("response_mask", "old_log_probs", "advantages", "rollout_is_weights", "ref_log_prob")
    batch = data.select(*(name for name in wanted if name in data)).to_padded_tensor()
    mask, mode = batch["response_mask"].to(bool), config.loss_agg_mode
    more: dict[str, Any] = {"entropy_coef": config.entropy_coeff}
    if config.use_kl_loss:
        if config.kl_loss_type not in KL_TYPES:
            raise ValueError(f"actor.kl_loss_type is {config.kl_loss_type!r}; it must be one of {', '.join(KL_TYPES)}")
        kl = KL_TYPES[config.kl_loss_type]
        more |= {"kl_coef": config.kl_loss_coef, "kl": kl, "kl_max": 10.0 if kl == "k3" else None}
    settings = _settings(config.policy_loss.get("loss_mode"), mode, config, info, log_prob.shape[-1], more)
    loss, metrics = _loss(settings, info, log_prob, mask, batch, entropy)
    with torch.no_grad():
        if entropy is not None:
            metrics["actor/entropy_loss"] = agg_loss(entropy, mask, mode, **info)
        if config.use_kl_loss:
            estimate = kl_penalty(log_prob, batch["ref_log_prob"], config.kl_loss_type)
            metrics["kl_loss"] = agg_loss(estimate, mask, mode, **info)
    # verl's rule: losses over global counts are parts of a sum.
    whole = info.pop("dp_size") > 1 or any(value is not None for value in info.values())
    kinds = {key: "sum" if whole and key.endswith("_loss") else "mean" for key in metrics}
    reported: dict[str, Any] = {key: Metric(kinds[key], value) for key, value in _numbers(metrics).items()}
    return loss, reported | ({"kl_coef": config.kl_loss_coef} if config.use_kl_loss else {})


def _settings(
    loss_mode: Any, mode: str, config: Any, info: Any, width: int, more: dict[str, Any] | None = None
) -> PolicyLossConfig:
    for key, value, allowed in (("loss_agg_mode", mode, MODES), ("policy_loss.loss_mode", loss_mode, LOSSES)):
        if value not in allowed:
            raise ValueError(f"actor.{key} is {value!r}; it must be one of {', '.join(allowed)}")
    fixed, names = LOSSES[loss_mode]
    given: dict[str, Any] = {**fixed, **{name: config.get(KEYS[name]) for name in names}, **(more or {})}
    given |= {name: config.clip_ratio for name in ("clip_low", "clip_high") if name in names and given[name] is None}
    if "dual_clip" in names:
        given["dual_clip"] = config.get("clip_ratio_c", 3.0)  # verl's default where a mapping lacks it
    given["reduction"] = MODES[mode]
    if mode == "seq-mean-token-sum-norm":
        factor = info.get("loss_scale_factor")
        given["norm_length"] = width if factor is None else factor
    # A sum needs no count.
    count = {"token-mean": "batch_num_tokens", "token-sum": "dp_size"}.get(mode, "global_batch_size")
    if info.get("dp_size", 1) > 1 and info.get(count) is None:
        raise ValueError(
            f"global_batch_info[{count!r}] is None with dp_size {info['dp_size']} and {mode}; it must be the "
            "number in the batches of all processes"
        )
    try:
        return PolicyLossConfig(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(renamed(error, {name: f"actor.{key}" for name, key in KEYS.items()})) from error


def _loss(
    settings: PolicyLossConfig, info: Any, log_prob: Tensor, mask: Tensor, batch: Any, entropy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    loss, found = policy_loss(
        log_prob,
        batch["old_log_probs"],
        batch["advantages"],
        mask,
        ref_log_probs=batch["ref_log_prob"] if settings.kl_coef else None,
        entropy=entropy if settings.entropy_coef else None,
        rollout_weights=batch.get("rollout_is_weights"),
        config=settings,
        num_tokens=info.get("batch_num_tokens"),
        num_sequences=info.get("global_batch_size"),
    )
    processes = info.get("dp_size", 1)  # gradients are averaged over them
    with torch.no_grad():
        counted = mask != 0
        tokens = counted.sum().clamp(min=1)  # as verl's means, ours are 0 where nothing counts
        log_ratio = torch.where(counted, log_prob - batch["old_log_probs"], 0.0).clamp(-20, 20)
        ratio = log_ratio.exp()
        dual = counted & (batch["advantages"] < 0) & (ratio > (settings.dual_clip or torch.inf))
        clipped = found["policy/clip_low/mean"] + found["policy/clip_high/mean"]
        if settings.surrogate == "cispo":  # verl counts whatever the advantage's sign
            outside = (ratio < 1 - settings.clip_low) | (ratio > 1 + settings.clip_high)
            clipped = (counted & outside).sum() / tokens
        means = {key: torch.where(counted.any(), found[f"policy/{key}/mean"], 0.0) for key in MEANS}
        metrics = {
            "actor/pg_clipfrac": torch.where(counted.any(), clipped, 0.0) - dual.sum() / tokens,
            "actor/ppo_kl": -log_ratio.sum() / tokens,
            "actor/pg_clipfrac_lower": dual.sum() / tokens,
            "actor/pg_loss": found["policy/loss/surrogate/sum"] * processes,
        }
    return loss * processes, metrics | {f"egpo/{key}": value for key, value in means.items()}


def _numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """In one transfer: verl would call ``item`` on each."""
    return dict(zip(metrics, torch.stack([*metrics.values()]).tolist(), strict=True))
