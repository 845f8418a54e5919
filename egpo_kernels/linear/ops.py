"""Opaque operators of `egpo_kernels.linear`: what torch.compile sees of it. None of them differentiates.

Everywhere ``head`` is weight, bias and both adapters; ``scalars`` are temperature, the adapters' scale, the logits'
scale and softcap; ``wanted`` says which gradients are asked for, of hidden states and of ``head`` in this order.

``shard`` says which columns of a vocabulary the head has, see `egpo_kernels.engine.dispatch.package_of`, ``adds_up``
whether gradients of hidden states are summed over ranks; the status of exchanges comes last, ``[0]`` without a shard.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.engine.dispatch import implementation, package_of
from egpo_kernels.engine.kept import Support
from egpo_kernels.engine.operator import OptionalTensors, Tensors, fake_vector, operator, policy_config
from egpo_kernels.engine.ops import NUM_GIVEN, read_rows, support_of
from egpo_kernels.engine.row_ops import material_of
from egpo_kernels.formulas import metrics
from egpo_kernels.inputs.segments import Segments, flat_rows
from egpo_kernels.linear import flops, passes
from egpo_kernels.linear.chunks import too_many
from egpo_kernels.linear.head import Head, Wanted
from egpo_kernels.linear.layer import Layer

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
LossAndGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _without_autocast(function: Callable) -> Callable:
    """Have products of the dtypes that they are given: autocast had its say before."""

    @functools.wraps(function)
    def run(hidden: Tensor, *args: Any) -> Any:
        kind = hidden.device.type
        has_autocast = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if has_autocast else contextlib.nullcontext():
            return function(hidden, *args)

    return run


def _read(
    hidden: Tensor,
    head: OptionalTensors,
    rows: Rows,
    host_mask: Tensor | None,
    scalars: list[float],
    num_active: int | None,
    max_chunk_bytes: int | None,
    logits_dtype: torch.dtype,
    shard: str,
    adds_up: bool,
    support: Support | None,
    backend: str,
) -> tuple[Layer, Rows, float]:
    weight, bias, lora_a, lora_b = head
    assert weight is not None
    temperature, lora_scale, logit_scale, softcap = scalars
    layer = Layer(
        hidden,
        Head(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, logits_dtype),
        package_of(backend, shard),
        host_mask,
        num_active,
        max_chunk_bytes,
        support,
        adds_up,
    )
    rows = flat_rows(rows)
    if layer.shard is None:
        layer.check(rows)
    cooled, temperature = layer.head.cooled(rows, temperature)
    return layer, cooled, temperature


def _status(layer: Layer, rows: Rows) -> Tensor:
    """The status of all exchanges. Only now bad values raise: other ranks would have waited for the exchanges."""
    nothing = layer.hidden.new_empty(0, dtype=compute_dtype(layer.hidden.dtype))
    if layer.shard is None:
        return nothing
    layer.check(flat_rows(rows))
    return layer.package.status(nothing)


def _fake_gradients(hidden: Tensor, head: OptionalTensors, wanted: list[bool]) -> Any:
    weight = head[0]
    assert weight is not None
    return tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if asked and tensor is not None
        else weight.new_empty(0)
        for tensor, asked in zip((hidden, *head), wanted, strict=True)
    )


def _fake_statistics(hidden: Tensor, *others: Any) -> Statistics:
    want_entropy, with_gradient, _ = others[-3:]
    count, dtype, shard = hidden.shape[0] * hidden.shape[1], compute_dtype(hidden.dtype), others[-5]
    sizes = (count, count if want_entropy else 0, *[0 if with_gradient else count] * 2)
    log_probs, entropy, maximum, sum_exp = (hidden.new_empty(size, dtype=dtype) for size in sizes)
    gradient = hidden.new_empty(hidden.shape if with_gradient else (0,))
    return log_probs, entropy, maximum, sum_exp, gradient, log_probs.new_empty(2 if shard else 0)


@operator(_fake_statistics)
@_without_autocast
def linear_row_statistics(
    hidden: Tensor,
    head: OptionalTensors,
    rows: OptionalTensors,
    host_mask: Tensor | None,
    scalars: list[float],
    num_active: int | None,
    max_chunk_bytes: int | None,
    logits_dtype: torch.dtype,
    shard: str,
    adds_up: bool,
    want_entropy: bool,
    with_gradient: bool,
    backend: str,
) -> Statistics:
    """Log-prob, entropy (``[0]`` unless wanted), maximum, sum of exponentials, and ``dl/dhidden [B, T, H]``.

    Maximum and sum are ``[0]`` where the gradient is made, which is empty unless ``with_gradient``.
    """
    read = read_rows(rows, backend)
    layer, cooled, temperature = _read(
        hidden, head, read, host_mask, scalars, num_active, max_chunk_bytes, logits_dtype,
        shard, adds_up, support_of(rows), backend,
    )  # fmt: skip
    surplus = too_many(cooled.mask, host_mask, num_active)
    if with_gradient:
        log_probs, entropy, gradients = passes.log_prob_gradient(layer, cooled, temperature, want_entropy)
        entropy = entropy if want_entropy else entropy[:0].clone()
        maximum, sum_exp, gradient = log_probs.new_empty(0), log_probs.new_empty(0), gradients[0]
    else:
        log_probs, entropy, maximum, sum_exp = passes.row_statistics(layer, cooled, temperature, want_entropy)
        gradient = hidden.new_empty(0)
    if surplus is not None:
        log_probs = torch.where(cooled.mask & surplus, torch.nan, log_probs)
    status = _status(layer, read)
    if layer.shard is not None:
        log_probs = log_probs * status[1]  # of rows that do not count too
    return log_probs, entropy, maximum, sum_exp, gradient, status


def _fake_linear_gradient(hidden: Tensor, head: OptionalTensors, *others: Any) -> Gradients:
    return _fake_gradients(hidden, head, others[-2])


@operator(_fake_linear_gradient)
@_without_autocast
def linear_gradient(
    hidden: Tensor,
    head: OptionalTensors,
    rows: OptionalTensors,
    host_mask: Tensor | None,
    scalars: list[float],
    num_active: int | None,
    max_chunk_bytes: int | None,
    logits_dtype: torch.dtype,
    shard: str,
    adds_up: bool,
    statistics: Tensors,
    upstream: OptionalTensors,
    wanted: list[bool],
    backend: str,
) -> Gradients:
    """Gradients from statistics (maximum, sum of exponentials, entropy; or empty) and upstream (dL/dl, dL/dEnt)."""
    layer, cooled, temperature = _read(
        hidden, head, read_rows(rows, backend), host_mask, scalars, num_active, max_chunk_bytes, logits_dtype,
        shard, adds_up, support_of(rows), backend,
    )  # fmt: skip
    found = passes.gradient(layer, cooled, statistics, upstream, temperature, Wanted(*wanted))
    hidden_gradient, weight, bias, lora_a, lora_b = found
    return hidden_gradient, weight, bias, lora_a, lora_b


def _fake_linear_loss(hidden: Tensor, head: OptionalTensors, *others: Any) -> LossAndGradients:
    reported, wanted, _ = others[-3:]
    loss = hidden.new_empty((), dtype=compute_dtype(hidden.dtype))
    status = loss.new_empty(2 if others[-7] else 0)
    return loss, fake_vector(hidden, metrics.TOKEN, reported), *_fake_gradients(hidden, head, wanted), status


@operator(_fake_linear_loss)
@_without_autocast
def linear_policy_loss(
    hidden: Tensor,
    head: OptionalTensors,
    given: OptionalTensors,
    kinds: list[int],
    size: list[int],
    numbers: list[float],
    config: str,
    only_active: bool,
    host_mask: Tensor | None,
    scalars: list[float],
    num_active: int | None,
    max_chunk_bytes: int | None,
    logits_dtype: torch.dtype,
    shard: str,
    adds_up: bool,
    grad_scale: float,
    want_entropy: bool,
    reported: bool,
    wanted: list[bool],
    backend: str,
) -> LossAndGradients:
    """Loss, metrics vector and gradients, times ``grad_scale`` before they are rounded.

    ``given`` to ``only_active``: see `egpo_kernels.engine.row_ops.token_rows`.
    """
    material = material_of(given[:NUM_GIVEN], kinds, size, numbers, config, only_active, compute_dtype(hidden.dtype))
    settings, rows = policy_config(config), implementation(backend).token_rows(material)
    layer, cooled, temperature = _read(
        hidden, head, rows, host_mask, scalars, num_active, max_chunk_bytes, logits_dtype,
        shard, adds_up, support_of(given, NUM_GIVEN), backend,
    )  # fmt: skip
    surplus = too_many(cooled.mask, host_mask, num_active)
    if surplus is not None:
        assert cooled.factor is not None
        cooled = cooled._replace(factor=torch.where(surplus, torch.nan, cooled.factor))
    log_probs, entropy, found = passes.loss_gradient(
        layer, cooled, settings, temperature, grad_scale, want_entropy, Wanted(*wanted)
    )
    # No token's loss depends on its sequence here.
    segments = Segments(log_probs.shape[0], 1)
    bonus = entropy if want_entropy else None
    loss, vector = layer.package.policy_loss(log_probs, bonus, cooled, segments, settings, layer.vocab, False, reported)
    hidden_gradient, weight, bias, lora_a, lora_b = found
    return loss, vector, hidden_gradient, weight, bias, lora_a, lora_b, _status(layer, rows)


flops.register_when_imported()
