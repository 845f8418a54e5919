"""Group level behind the public functions: which source the uncertainty has, which backend answers."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels import metrics, reference
from egpo_kernels.layout import Layout
from egpo_kernels.types import AdvantageConfig, GroupAdvantages
from egpo_kernels.validation import check_complete, check_tensor


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
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size is {group_size!r}; it must be an int >= 1 or None")
    if correct is not None:
        check_tensor("correct", correct, "bool", {"[S]": tuple(rewards.shape)}, rewards.device)
    values = _uncertainty_source(old_log_probs, entropy, layout, config)
    dtype = torch.float32
    for tensor in (rewards, values):
        if tensor is not None and tensor.dtype == torch.float64:
            dtype = torch.float64
    offsets = ids.new_zeros(ids.shape[0] + 1)
    if layout is not None:
        offsets = layout.offsets
        if entropy_mask is not None and mask is not None:
            mask = mask & (layout.per_token("entropy_mask", entropy_mask, "real") != 0)
    if values is None:
        mask = None
    else:
        values = values.detach().to(dtype)
    rewards = rewards.detach().to(dtype)
    if backend == "reference":
        check_complete(ids, group_size)
        *results, raw = reference.group_advantages(ids, rewards, correct, values, mask, offsets, config, group_size)
        vector = metrics.finish(raw, metrics.GROUP)
    else:
        *results, vector = torch.ops.egpo_kernels.group_advantages(
            ids, rewards, [correct, values, mask], offsets, config.json, group_size, backend
        )
    advantages, weights, base, uncertainty = results
    if layout is not None:
        advantages = advantages * layout.poison
    without = ("egpo/uncertainty", "egpo/empty") if values is None else ()
    return GroupAdvantages(
        advantages, weights, base, uncertainty, metrics.named(vector, metrics.GROUP, without)
    )


def _uncertainty_source(
    old_log_probs: Any, entropy: Any, layout: Layout | None, config: AdvantageConfig
) -> Tensor | None:
    """Return the per-token numbers ``[N]`` whose mean is H; raise where the weight needs what was not given."""
    name, given = ("entropy", entropy) if config.statistic == "shannon" else ("old_log_probs", old_log_probs)
    if given is None or layout is None:
        if config.weight != "none":
            raise ValueError(
                f"{name} is None with weight {config.weight!r} and statistic {config.statistic!r}; it must be given, "
                "or use weight='none'"
            )
        return None
    values = layout.per_token(name, given, "floating")
    return values if name == "entropy" else -values
