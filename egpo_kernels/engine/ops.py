"""Opaque operators: what torch.compile sees of the portable and triton backends. None of them differentiates.

Checks of values live here, inside the operators, so that a traced call makes them too. Settings come as their JSON.
A trailing underscore marks an operator that writes into its first argument.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op
from torch.multiprocessing.reductions import StorageWeakRef

from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Rows, compute_dtype
from egpo_kernels.engine.dispatch import implementation
from egpo_kernels.formulas import metrics
from egpo_kernels.inputs import validation

Tensors = list[Tensor]
OptionalTensors = list[Tensor | None]
Tensors2 = tuple[Tensor, Tensor]
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors5 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@functools.lru_cache(maxsize=256)
def advantage_config(text: str) -> AdvantageConfig:
    """Read settings back from ``AdvantageConfig.json``."""
    return AdvantageConfig.from_dict(json.loads(text))


@functools.lru_cache(maxsize=256)
def policy_config(text: str) -> PolicyLossConfig:
    """Read settings back from ``PolicyLossConfig.json``."""
    return PolicyLossConfig.from_dict(json.loads(text))


def operator(mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], CustomOpDef]:
    """Register a function under its name; it runs with its first tensor's GPU current, where kernels are launched."""

    def register(function: Callable) -> CustomOpDef:
        @functools.wraps(function)
        def on_device(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(args[0]):
                return function(*args, **kwargs)

        return custom_op(f"egpo_kernels::{function.__name__}", on_device, mutates_args=mutates_args)

    return register


def read_rows(fields: OptionalTensors) -> Rows:
    """Rows from the list that an operator takes."""
    mask, *rest = fields
    assert mask is not None
    return Rows(mask, *rest)


def checked_rows(fields: OptionalTensors, vocab: int) -> Rows:
    """As `read_rows`, with the values looked at where that costs no sync."""
    rows = read_rows(fields)
    validation.check_tokens(rows.tokens, rows.mask, vocab)
    validation.check_temperatures(rows.temperature, rows.mask)
    return rows


def _new_gradient(logits: Tensor) -> Tensor:
    if logits.device.type != "cpu" or logits.numel() == 0:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    # Touching new memory costs more than the arithmetic: take the last gradient's, once nothing holds it any more;
    # and where it must be new, numpy asks the system for huge pages.
    size = logits.numel() * logits.element_size()
    memory, holder = _last_gradient.pop(logits.device, (None, None))
    if memory is None or holder is None or memory.size != size or not holder.expired():
        memory = np.empty(size, np.uint8)
    gradient = torch.from_numpy(memory).view(logits.dtype).view(logits.shape)
    _last_gradient[logits.device] = (memory, StorageWeakRef(gradient.untyped_storage()))
    return gradient


_last_gradient: dict[torch.device, tuple[np.ndarray, StorageWeakRef]] = {}


def _fake_gradient(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_token_vector(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(len(metrics.TOKEN.keys), dtype=compute_dtype(logits.dtype))


@operator()
def sequence_offsets(cu_seqlens: Tensor, num_rows: int) -> Tensors2:
    """Offsets ``[S + 1]`` int64 that never leave ``[0, num_rows]``, and 1.0 or, where they had to be mended, NaN."""
    validation.check_cu_seqlens(cu_seqlens, num_rows)
    given = cu_seqlens.long()
    offsets = given.clamp(0, num_rows).cummax(0).values
    sound = (offsets == given).all() & (given[0] == 0)
    one = torch.ones((), dtype=torch.float32, device=cu_seqlens.device)
    return offsets, torch.where(sound, one, torch.nan)


@sequence_offsets.register_fake
def _(cu_seqlens: Tensor, num_rows: int) -> Tensors2:
    return torch.empty_like(cu_seqlens, dtype=torch.long), cu_seqlens.new_empty((), dtype=torch.float32)


@operator()
def read_either_way(by_sequence: Tensor, by_token: Tensor, inside: Tensor, name: str) -> Tensor:
    """1.0 where ``name``, with as many tokens as sequences, says the same of rows ``inside`` either way, else NaN."""
    same = (by_sequence == by_token) | (by_sequence.isnan() & by_token.isnan()) | ~inside
    validation.check_either_way(name, same)
    return torch.where(same.all(), 1.0, torch.nan)


@read_either_way.register_fake
def _(by_sequence: Tensor, *_: Any) -> Tensor:
    return by_sequence.new_empty((), dtype=torch.float32)


@operator()
def row_statistics(
    logits: Tensor, rows: OptionalTensors, temperature: float, want_entropy: bool, backend: str
) -> Tensors4:
    """Of each row of ``logits [B, T, V]``: log-prob, entropy (``[0]`` unless wanted), maximum, sum of exponentials."""
    checked = checked_rows(rows, logits.shape[-1])
    return implementation(backend).row_statistics(logits, checked, temperature, want_entropy)


@row_statistics.register_fake
def _(logits: Tensor, rows: OptionalTensors, temperature: float, want_entropy: bool, backend: str) -> Tensors4:
    count, dtype = logits.shape[0] * logits.shape[1], compute_dtype(logits.dtype)
    entropy = logits.new_empty(count if want_entropy else 0, dtype=dtype)
    log_probs, maximum, sum_exp = (logits.new_empty(count, dtype=dtype) for _ in range(3))
    return log_probs, entropy, maximum, sum_exp


@operator()
def logits_gradient(
    logits: Tensor,
    rows: OptionalTensors,
    statistics: Tensors,
    upstream: OptionalTensors,
    temperature: float,
    backend: str,
) -> Tensor:
    """Gradient ``[B, T, V]`` from statistics (maximum, sum of exponentials, entropy) and upstream (dL/dl, dL/dEnt)."""
    gradient = _new_gradient(logits)
    implementation(backend).logits_gradient(logits, read_rows(rows), statistics, upstream, temperature, gradient)
    return gradient


logits_gradient.register_fake(_fake_gradient)


@operator(mutates_args=("logits",))
def logits_gradient_(
    logits: Tensor,
    rows: OptionalTensors,
    statistics: Tensors,
    upstream: OptionalTensors,
    temperature: float,
    backend: str,
) -> None:
    """As `logits_gradient`, written over ``logits``."""
    implementation(backend).logits_gradient(logits, read_rows(rows), statistics, upstream, temperature, logits)


logits_gradient_.register_fake(lambda *_: None)


@operator()
def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: OptionalTensors,
    segments: Tensors,
    config: str,
    vocab: int,
    backend: str,
) -> Tensors2:
    """Reduced loss of each token ``[N]`` and the metrics vector; ``segments`` are offsets, sequence of each row."""
    losses, raw = implementation(backend).policy_loss(
        log_probs, entropy, read_rows(rows), segments, policy_config(config), vocab
    )
    return losses, metrics.finish(raw, metrics.TOKEN)


@policy_loss.register_fake
def _(log_probs: Tensor, *_: Any) -> Tensors2:
    return torch.empty_like(log_probs), _fake_token_vector(log_probs)


@operator()
def policy_loss_gradient(
    log_probs: Tensor, entropy: Tensor | None, rows: OptionalTensors, segments: Tensors, config: str, backend: str
) -> Tensors2:
    """Gradient of the summed token losses with respect to ``log_probs`` and entropy, ``[N]`` each."""
    return implementation(backend).policy_loss_gradient(
        log_probs, entropy, read_rows(rows), segments, policy_config(config)
    )


@policy_loss_gradient.register_fake
def _(log_probs: Tensor, *_: Any) -> Tensors2:
    return torch.empty_like(log_probs), torch.empty_like(log_probs)


def _loss_and_gradient(
    logits: Tensor,
    rows: OptionalTensors,
    segments: Tensors,
    config: str,
    scalars: list[float],
    want_entropy: bool,
    backend: str,
    gradient: Tensor,
) -> Tensor:
    package, settings, checked = implementation(backend), policy_config(config), checked_rows(rows, logits.shape[-1])
    log_probs, entropy = package.logits_loss_gradient(logits, checked, settings, *scalars, want_entropy, gradient)
    _, raw = package.policy_loss(log_probs, entropy, checked, segments, settings, logits.shape[-1])
    return metrics.finish(raw, metrics.TOKEN)


@operator()
def logits_policy_loss(
    logits: Tensor,
    rows: OptionalTensors,
    segments: Tensors,
    config: str,
    scalars: list[float],
    want_entropy: bool,
    backend: str,
) -> Tensors2:
    """Metrics vector (the loss among them) and gradient ``[B, T, V]``; ``scalars`` are temperature and grad_scale."""
    gradient = _new_gradient(logits)
    return _loss_and_gradient(logits, rows, segments, config, scalars, want_entropy, backend, gradient), gradient


@logits_policy_loss.register_fake
def _(logits: Tensor, *_: Any) -> Tensors2:
    return _fake_token_vector(logits), _fake_gradient(logits)


@operator(mutates_args=("logits",))
def logits_policy_loss_(
    logits: Tensor,
    rows: OptionalTensors,
    segments: Tensors,
    config: str,
    scalars: list[float],
    want_entropy: bool,
    backend: str,
) -> Tensor:
    """As `logits_policy_loss`, the gradient written over ``logits``."""
    return _loss_and_gradient(logits, rows, segments, config, scalars, want_entropy, backend, logits)


logits_policy_loss_.register_fake(_fake_token_vector)


@operator()
def group_advantages(
    ids: Tensor,
    rewards: Tensor,
    rows: OptionalTensors,
    offsets: Tensor,
    tolerance: float,
    config: str,
    group_size: int | None,
    backend: str,
) -> Tensors5:
    """Advantages, weights, base, uncertainty ``[S]``, metrics.

    ``rows``: correct ``[S]``, values and mask ``[N]``, counted tokens ``[S]``. ``tolerance``: see `collapse_tolerance`.
    """
    validation.check_complete(ids, group_size)
    advantages, weights, base, uncertainty, raw = implementation(backend).group_advantages(
        ids, rewards, *rows, offsets, tolerance, advantage_config(config), group_size
    )
    return advantages, weights, base, uncertainty, metrics.finish(raw, metrics.GROUP)


@group_advantages.register_fake
def _(ids: Tensor, rewards: Tensor, *_: Any) -> Tensors5:
    advantages, weights, base, uncertainty = (torch.empty_like(rewards) for _ in range(4))
    return advantages, weights, base, uncertainty, rewards.new_empty(len(metrics.GROUP.keys))


@operator(mutates_args=("gradient",))
def rescale_(gradient: Tensor, upstream: Tensor, expected: float, backend: str) -> None:
    """Multiply ``gradient`` by ``upstream / expected`` in place; nothing is read or written when they are equal."""
    implementation(backend).rescale_(gradient, upstream, expected)


rescale_.register_fake(lambda *_: None)
