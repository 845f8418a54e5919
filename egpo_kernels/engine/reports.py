"""What is said of a result beside the loss: what a sampler kept, and whether ranks fitted one another."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config.results import LossOutput, Metrics
from egpo_kernels.engine import row_ops
from egpo_kernels.engine.calls import Call
from egpo_kernels.engine.rows import TOKENS
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.kept import kept_metrics
from egpo_kernels.formulas.lazy import merged
from egpo_kernels.inputs.segments import flat


def reported(call: Call, found: LossOutput, mode: Any) -> LossOutput:
    """A loss with the metrics of what was kept and of ranks, unless none are wanted; NaN where ranks do not fit."""
    loss, seen = found
    if call.support and mode != "none":
        seen = merged(seen, _of_support(call))
    if call.source is not None and call.source.statuses:
        status = _joined(call.source.statuses)
        loss = loss * status[1].to(loss.dtype)
        if mode != "none":
            seen = merged(seen, metrics.named(status[:1], metrics.RANKS))
    return LossOutput(loss, seen)


def _joined(statuses: list[Tensor]) -> Tensor:
    """The status of all exchanges."""
    if len(statuses) == 1:
        return statuses[0]
    wrong, poison = torch.stack(statuses, 1)
    return torch.stack([wrong.amax(), poison.prod()])


def _of_support(call: Call) -> Metrics:
    tokens, counted = flat(call.given.tensors[TOKENS]), flat(call.given.counted(call.layout))
    ids, offsets = call.support
    assert tokens is not None
    if call.backend == "reference":
        vector = metrics.finish(kept_metrics(ids, offsets, tokens.long(), counted, call.dtype), metrics.SUPPORT)
    else:
        vector = row_ops.support_metrics(ids, offsets, tokens, counted, call.dtype, call.backend)
    return metrics.named(vector, metrics.SUPPORT)
