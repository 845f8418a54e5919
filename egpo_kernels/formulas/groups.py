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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `egpo_kernels.formulas.advantages.group_advantages`; without ids so many ``members`` in a row are a group."""
    if ids is None:
        ids = consecutive_ids(rewards.shape[0], members, rewards.device)
    values = mask = lengths = None
    if measured.values is not None or config.scale == "batch_whiten":
        counted = measured.counted(segments, rewards.device)
        lengths = segments.counts(counted) if config.scale == "batch_whiten" else None
        values, mask = measured.rows(segments, rewards.dtype, counted)
    values, mask = (None if x is None else x.reshape(-1) for x in (values, mask))
    *found, raw = advantages.group_advantages(
        ids, rewards, correct, values, mask, lengths, segments.bounds(ids.device), tolerance, config, group_size
    )
    from egpo_kernels.formulas import metrics

    return *found, metrics.finish(raw, metrics.GROUP) if reported else rewards.new_empty(0)
