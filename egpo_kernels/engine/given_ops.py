"""Opaque operators from log-probs and what the caller gave beside them to a loss, with the rows made on the way.

What a row is made of is read where it lies: on a CPU spreading a number over its sequence takes as long as using it.
Only `portable` can do that; kernels read rows that `egpo_kernels.engine.row_ops.token_rows` made.
"""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels import portable
from egpo_kernels.engine.operator import OptionalTensors, Tensors, Tensors5, fake_vector, operator, policy_config
from egpo_kernels.engine.row_ops import material_of
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.rows import broad_rows


def _fake_loss(log_probs: Tensor, *others: Any) -> Tensors5:
    want_slope, want_bonus, reported = others[-3:]
    loss, vector = log_probs.new_empty(()), fake_vector(log_probs, metrics.TOKEN, reported)
    shape = log_probs.shape
    slope, bonus = (log_probs.new_empty(shape if wanted else 0) for wanted in (want_slope, want_bonus))
    return loss, vector, slope, bonus, log_probs.new_empty(shape if want_slope else 0, dtype=torch.bool)


@operator(_fake_loss)
def given_policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    given: OptionalTensors,
    kinds: list[int],
    size: list[int],
    numbers: list[float],
    config: str,
    only_active: bool,
    want_slope: bool,
    want_bonus: bool,
    reported: bool,
) -> Tensors5:
    """Loss 0-d of ``log_probs``, the metrics vector where it is ``reported``, and gradients for an upstream of 1.

    ``log_probs`` and ``entropy`` are ``[S, T]`` or packed ``[N]``. The gradients by them, and which rows they reach,
    are so too, or ``[0]`` where not wanted; whoever wants the second wants the first. ``given`` to ``only_active``: see
    `egpo_kernels.engine.row_ops.token_rows`.
    """
    material = material_of(given, kinds, size, numbers, config, only_active, log_probs.dtype)
    settings, segments, rows = policy_config(config), material.segments, broad_rows(material)
    shape, log_probs = log_probs.shape, segments.laid(log_probs.contiguous())
    entropy = None if entropy is None else segments.laid(entropy.contiguous())
    if not want_slope:
        loss, vector = portable.policy_loss(log_probs, entropy, rows, segments, settings, 0, False, reported)
        return loss, vector, log_probs.new_empty(0), log_probs.new_empty(0), rows.mask.new_empty(0)
    loss, vector, slope, bonus, live = portable.policy_loss_and_gradient(
        log_probs, entropy, rows, segments, settings, reported, want_bonus
    )
    # Live rows may be the mask itself, and no operator may return what it was given.
    live = live.clone(memory_format=torch.contiguous_format).view(shape)
    slope, bonus = (it.contiguous().view(shape if wanted else 0) for it, wanted in ((slope, True), (bonus, want_bonus)))
    return loss, vector, slope, bonus, live


@operator(lambda gradients, live, upstream: [torch.empty_like(gradient) for gradient in gradients])
def scaled_gradients(gradients: Tensors, live: Tensor, upstream: Tensor) -> Tensors:
    """Gradients from upstream 0-d, of those for an upstream of 1; rows that are not ``live`` get 0."""
    return portable.scaled_gradients(gradients, live, upstream)
