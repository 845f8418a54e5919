"""The public group level: validate, find the source of the uncertainty, choose a backend, call it, report."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels import reference
from egpo_kernels.config import recipes
from egpo_kernels.config.fields import plain
from egpo_kernels.config.settings import AdvantageConfig, GroupAdvantages
from egpo_kernels.engine.dispatch import choose_backend
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.advantages import collapse_tolerance, rewards_in
from egpo_kernels.formulas.reduction import counts_per_sequence
from egpo_kernels.inputs.layout import Layout, counted, group_ids, make_layout
from egpo_kernels.inputs.validation import check_complete, check_instance, check_rewards, check_tensor


def group_advantages(
    groups: Any,
    rewards: Tensor,
    old_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    correct: Tensor | None = None,
    config: AdvantageConfig = recipes.EGPO.advantage,
    group_size: int | None = None,
    backend: str = "auto",
) -> GroupAdvantages:
    """Advantages of whole groups (EGPO, arXiv 2602.22751, Eq. 2, 5-11, 13); call it before any micro-batching.

    Args:
        groups: Group of each sequence: integer tensor ``[S]`` (any ids, any order), list of names, numpy array, or an
            int G for G consecutive sequences.
        rewards: ``[S]``; a non-finite one gives advantage 0 and stays out of its group's reward statistics.
        old_log_probs: Log-probs of the sampled tokens in nats, ``[S, T]`` or packed ``[N]``; the uncertainty's source.
        mask: Shaped like them, nonzero counts; None counts every position. ``scale="batch_whiten"`` needs it where
            there are no log-probs: it whitens over counted tokens.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        entropy: Shannon entropy of each position in nats, for ``statistic="shannon"``.
        entropy_mask: Which counted tokens the uncertainty averages over; None: all of them.
        correct: ``[S]`` bool; None: ``reward > config.correct_threshold``.
        config: The settings.
        group_size: Members every group must have. Where ids are on the host (list, numpy, int, CPU tensor) others
            raise; where they are on a device their advantages are NaN and a metric counts them.
        backend: ``auto``, ``triton``, ``portable`` or ``reference``.

    Returns:
        ``(advantages, weights, base, uncertainty, metrics)``, ``[S]`` each, float32 (float64), without gradient.

    Raises:
        ValueError: A wrong shape, device, value or combination; a weight asked for without its source.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, AdvantageConfig)
    rewards = check_rewards(rewards)
    sequences, device = rewards.shape[0], rewards.device
    layout = counts = None
    per_token = {"old_log_probs": old_log_probs, "entropy": entropy, "mask": mask}
    name = next((name for name, given in per_token.items() if given is not None), None)
    if name is not None:
        shaped = check_tensor(name, per_token[name], "real" if name == "mask" else "floating", {}, device)
        layout = make_layout(name, tuple(shaped.shape), cu_seqlens, device)
        if layout.num_sequences != sequences:
            raise ValueError(
                f"rewards has {sequences} entries; {name} holds {layout.num_sequences} sequences; they must be as many"
            )
        counts = counted(mask, None, layout)
    for name, given in (("entropy_mask", entropy_mask), ("cu_seqlens", cu_seqlens)):
        if given is not None:
            check_instance(name, given, Tensor)
    ids = group_ids(groups, sequences, device, group_size)
    return advantages_of_groups(
        ids,
        rewards,
        old_log_probs,
        entropy,
        counts,
        entropy_mask,
        correct,
        layout,
        config,
        group_size,
        choose_backend(backend, device),
    )


def advantages_of_groups(
    ids: Tensor,
    rewards: Tensor,
    old_log_probs: Any,
    entropy: Any,
    mask: Tensor | None,
    entropy_mask: Any,
    correct: Any,
    layout: Layout | None,
    config: AdvantageConfig,
    group_size: Any,
    backend: str,
) -> GroupAdvantages:
    """Advantages ``[S]`` from ids ``[S]`` on the device, checked rewards and the counted rows ``mask [N]``."""
    group_size = plain(group_size)
    if correct is not None:
        check_tensor("correct", correct, "bool", {"[S]": tuple(rewards.shape)}, rewards.device)
    values = _uncertainty_source(old_log_probs, entropy, layout, config)
    in_float64 = torch.float64 in (rewards.dtype, None if values is None else values.dtype)
    tolerance, dtype = collapse_tolerance(rewards.dtype), torch.float64 if in_float64 else torch.float32
    offsets, lengths = ids.new_zeros(ids.shape[0] + 1), None
    if config.scale == "batch_whiten":
        if layout is None or mask is None:
            raise ValueError(
                "mask is None with scale 'batch_whiten', which whitens over counted tokens; it must be given"
            )
        lengths = counts_per_sequence(mask, layout.offsets)
    if layout is not None:
        offsets = layout.offsets
        if entropy_mask is not None and mask is not None:
            mask = mask & (layout.per_token("entropy_mask", entropy_mask, "real") != 0)
    if values is None:
        mask = None
    else:
        values = values.detach().to(dtype)
    rewards = rewards_in(dtype, rewards)
    if backend == "reference":
        check_complete(ids, group_size)
        *results, raw = reference.group_advantages(
            ids, rewards, correct, values, mask, lengths, offsets, tolerance, config, group_size
        )
        vector = metrics.finish(raw, metrics.GROUP)
    else:
        *results, vector = torch.ops.egpo_kernels.group_advantages(
            ids, rewards, [correct, values, mask, lengths], offsets, tolerance, config.json, group_size, backend
        )
    advantages, weights, base, uncertainty = results
    if layout is not None:
        advantages = advantages * layout.poison
    without = ("egpo/uncertainty", "egpo/empty") if values is None else ()
    return GroupAdvantages(advantages, weights, base, uncertainty, metrics.named(vector, metrics.GROUP, without))


def _uncertainty_source(
    old_log_probs: Any, entropy: Any, layout: Layout | None, config: AdvantageConfig
) -> Tensor | None:
    """Return the per-token numbers ``[N]`` whose mean is H; raise where the weight needs what was not given."""
    given = {"old_log_probs": old_log_probs, "entropy": entropy}
    values: dict[str, Tensor] = {}
    if layout is not None:
        values = {name: layout.per_token(name, it, "floating") for name, it in given.items() if it is not None}
    name = "entropy" if config.statistic == "shannon" else "old_log_probs"
    if name in values:
        return values[name] if name == "entropy" else -values[name]
    if config.weight != "none":
        raise ValueError(
            f"{name} is None with weight {config.weight!r} and statistic {config.statistic!r}; it must be given, "
            "or use weight='none'"
        )
    return None
