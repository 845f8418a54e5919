"""From checked groups and rewards to advantages: the uncertainty's source, the backend, the metrics."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels import reference
from egpo_kernels.config.fields import plain
from egpo_kernels.config.settings import AdvantageConfig, GroupAdvantages
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.advantages import collapse_tolerance, rewards_in
from egpo_kernels.inputs.layout import Layout
from egpo_kernels.inputs.segments import counts_per_sequence
from egpo_kernels.inputs.validation import check_complete, check_tensor


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
