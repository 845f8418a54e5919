"""From checked groups and rewards to advantages: the uncertainty's source, the backend, the metrics."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels import reference
from egpo_kernels.config.fields import plain
from egpo_kernels.config.results import GroupAdvantages
from egpo_kernels.config.settings import AdvantageConfig
from egpo_kernels.engine import row_ops
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.advantages import collapse_tolerance, rewards_in
from egpo_kernels.formulas.rows import Measured
from egpo_kernels.inputs.layout import Layout, group_ids
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.inputs.validation import check_complete, check_tensor


class PerToken(NamedTuple):
    """What the group level may read per token: as the caller gave it, but for mask and tokens, which are checked."""

    old_log_probs: Any = None
    entropy: Any = None
    entropy_mask: Any = None
    mask: Tensor | None = None
    tokens: Tensor | None = None


def advantages_of_groups(
    groups: Any,
    rewards: Tensor,
    per_token: PerToken,
    correct: Any,
    layout: Layout | None,
    config: AdvantageConfig,
    group_size: Any,
    reported: bool,
    backend: str,
) -> GroupAdvantages:
    """Advantages ``[S]`` from groups as the caller gave them and checked rewards."""
    count, device = rewards.shape[0], rewards.device
    ids, members = group_ids(groups, count, device, group_size)
    group_size = plain(group_size)
    if correct is not None:
        correct = check_tensor("correct", correct, "bool", {"[S]": (count,)}, device)
    if config.scale == "batch_whiten" and layout is None:
        raise ValueError("mask is None with scale 'batch_whiten', which whitens over counted tokens; it must be given")
    measured = _measured(per_token, layout, config)
    segments = Segments(0, count) if layout is None else layout.segments
    in_float64 = torch.float64 in (rewards.dtype, None if measured.values is None else measured.values.dtype)
    tolerance, dtype = collapse_tolerance(rewards.dtype), torch.float64 if in_float64 else torch.float32
    rewards = rewards_in(dtype, rewards)
    if backend == "reference":
        if ids is not None:
            check_complete(ids, group_size)
        *results, vector = reference.group_advantages(
            ids, members, rewards, correct, measured, segments, tolerance, config, group_size, reported
        )
    else:
        *results, vector = row_ops.group_advantages(
            rewards,
            [ids, correct, *measured[:4], segments.offsets],
            members,
            segments.num_rows,
            measured.negated,
            tolerance,
            config.json,
            group_size,
            reported,
            backend,
        )
    advantages, weights, base, uncertainty = results
    if layout is not None:
        advantages = layout.poisoned(advantages)
    without = ("egpo/uncertainty", "egpo/empty") if measured.values is None else ()
    named = metrics.named(vector, metrics.GROUP, without) if reported else {}
    return GroupAdvantages(advantages, weights, base, uncertainty, named)


def _measured(per_token: PerToken, layout: Layout | None, config: AdvantageConfig) -> Measured:
    """The numbers whose mean is H, and where; raise where the weight needs what was not given."""
    given = {"old_log_probs": per_token.old_log_probs, "entropy": per_token.entropy}
    entropy_mask, values = None, {}
    if layout is not None:
        values = {name: layout.shaped(name, it, "floating") for name, it in given.items() if it is not None}
        if per_token.entropy_mask is not None:
            entropy_mask = layout.shaped("entropy_mask", per_token.entropy_mask, "real")
    name = "entropy" if config.statistic == "shannon" else "old_log_probs"
    if config.weight != "none" and name not in values:
        raise ValueError(
            f"{name} is None with weight {config.weight!r} and statistic {config.statistic!r}; it must be given, "
            "or use weight='none'"
        )
    found = values.get(name)
    found = found.detach() if found is not None and found.requires_grad else found
    return Measured(found, per_token.mask, per_token.tokens, entropy_mask, negated=name == "old_log_probs")
