"""From what the caller gave per token to the advantages of whole groups, in torch."""

from torch import Tensor

from egpo_kernels.config.settings import AdvantageConfig
from egpo_kernels.formulas import advantages
from egpo_kernels.formulas.rows import Measured
from egpo_kernels.inputs.layout import consecutive_ids
from egpo_kernels.inputs.segments import Segments


def group_advantages(
    ids: Tensor | None,
    members: int,
    rewards: Tensor,
    correct: Tensor | None,
    measured: Measured,
    segments: Segments,
    tolerance: float,
    config: AdvantageConfig,
    group_size: int | None,
    reported: bool,
    look: bool = True,
) -> advantages.Advantages:
    """See `egpo_kernels.formulas.advantages.group_advantages`; without ids so many ``members`` in a row are a group."""
    if ids is None:
        ids = consecutive_ids(rewards.shape[0], members, rewards.device)
    values, mask = measured.values, None
    if values is not None or config.scale == "batch_whiten":
        mask = measured.counted(segments, rewards.device)
    lengths = segments.counts(mask) if config.scale == "batch_whiten" and mask is not None else None
    if values is not None and mask is not None:
        values, mask = measured.rows(values, mask, segments, rewards.dtype)
    return advantages.group_advantages(
        ids,
        rewards,
        correct,
        values,
        mask,
        lengths,
        segments.offsets,
        tolerance,
        config,
        group_size,
        reported,
        look,
        measured.negated,
    )
