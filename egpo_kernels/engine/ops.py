"""Opaque operators on the vocabulary and on log-probs: what torch.compile sees of the backends. None differentiates.

Checks of values live here, inside the operators, so that a traced call makes them too. Settings come as their JSON.
A trailing underscore marks an operator that writes into its first argument.
"""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.engine import kept, memory
from egpo_kernels.engine.dispatch import implementation, package_of
from egpo_kernels.engine.operator import (
    OptionalTensors,
    Tensors,
    Tensors2,
    Tensors3,
    Tensors5,
    fake_vector,
    operator,
    policy_config,
)
from egpo_kernels.engine.row_ops import material_of
from egpo_kernels.formulas import metrics
from egpo_kernels.inputs.segments import Segments, flat_rows
from egpo_kernels.inputs.values import check_rows
from egpo_kernels.parallel.sharded import Sharded

NUM_FIELDS, NUM_GIVEN = len(Rows._fields), len(Rows._fields) + 4


def support_of(fields: OptionalTensors, before: int = NUM_FIELDS) -> kept.Support | None:
    """What a sampler kept, its ids and offsets, which stand last in a list if they are there."""
    ids, offsets = fields[before:] or (None, None)
    return None if ids is None or offsets is None else (ids, offsets)


def read_rows(fields: OptionalTensors, backend: str) -> Rows:
    """Rows from the list that an operator takes; flat, but for kernels, which read memory whatever shape it has."""
    mask, *rest = fields[:NUM_FIELDS]
    assert mask is not None
    rows = Rows(mask, *rest)
    return rows if backend == "triton" else flat_rows(rows)


def checked_rows(fields: OptionalTensors, vocab: int, backend: str) -> Rows:
    """As `read_rows`, with the values looked at where that costs no sync."""
    rows = read_rows(fields, backend)
    check_rows(rows, vocab)
    return rows


def _fake_gradient(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_statistics(
    logits: Tensor, rows: OptionalTensors, temperature: float, want_entropy: bool, backend: str, shard: str
) -> Tensors5:
    count, dtype = logits.shape[0] * logits.shape[1], compute_dtype(logits.dtype)
    entropy = logits.new_empty(count if want_entropy else 0, dtype=dtype)
    log_probs, maximum, sum_exp = (logits.new_empty(count, dtype=dtype) for _ in range(3))
    return log_probs, entropy, maximum, sum_exp, logits.new_empty(2 if shard else 0, dtype=dtype)


@operator(_fake_statistics)
def row_statistics(
    logits: Tensor, rows: OptionalTensors, temperature: float, want_entropy: bool, backend: str, shard: str
) -> Tensors5:
    """Of each row of ``logits [B, T, V]``: log-prob, entropy (``[0]`` unless wanted), maximum, sum of exponentials.

    Last comes the status of a `Sharded`, ``[0]`` without a shard. With one, bad values raise only after the exchange:
    the other ranks wait for it.
    """
    read, package, support = read_rows(rows, backend), package_of(backend, shard), support_of(rows)
    vocab = logits.shape[-1]
    if not isinstance(package, Sharded):
        _check(read, support, vocab)
        found = _statistics(package, logits, read, support, temperature, want_entropy)
        return *found, found[0].new_empty(0)
    found = _statistics(package, logits, read, support, temperature, want_entropy)
    _check(read, support, package.shard.vocab)
    return *found, package.status(found[0])


def _check(rows: Rows, support: kept.Support | None, vocab: int) -> None:
    check_rows(rows, vocab)
    if support is not None:
        kept.check(flat_rows(rows), support, vocab)


def _statistics(
    package: Any, logits: Tensor, rows: Rows, support: kept.Support | None, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if support is None:
        return package.row_statistics(logits, rows, temperature, want_entropy)
    parts = kept.parted(package, rows, support, logits.shape[-1])
    return kept.row_statistics(package, logits, parts, temperature, want_entropy)


def _fake_scores(
    logits: Tensor, rows: OptionalTensors, temperature: float, want_entropy: bool, backend: str
) -> Tensors:
    count, dtype = logits.shape[0] * logits.shape[1], compute_dtype(logits.dtype)
    return [logits.new_empty(count, dtype=dtype) for _ in range(1 + want_entropy)]


@operator(_fake_scores)
def token_scores(
    logits: Tensor, rows: OptionalTensors, temperature: float, want_entropy: bool, backend: str
) -> Tensors:
    """As `row_statistics` where no gradient is asked for: log-prob and, if wanted, entropy ``[N]``."""
    if support_of(rows) is not None:
        return list(row_statistics.function(logits, rows, temperature, want_entropy, backend, "")[: 1 + want_entropy])
    read = checked_rows(rows, logits.shape[-1], backend)
    return implementation(backend).token_scores(logits, read, temperature, want_entropy)


def _write_gradient(
    logits: Tensor,
    rows: OptionalTensors,
    statistics: Tensors,
    upstream: OptionalTensors,
    temperature: float,
    backend: str,
    shard: str,
    gradient: Tensor,
) -> None:
    read, package, support = read_rows(rows, backend), package_of(backend, shard), support_of(rows)
    if support is None:
        package.logits_gradient(logits, read, statistics, upstream, temperature, gradient)
    else:
        parts = kept.parted(package, read, support, logits.shape[-1])
        kept.logits_gradient(package, logits, parts, statistics, upstream, temperature, gradient)


@operator(_fake_gradient)
def logits_gradient(
    logits: Tensor,
    rows: OptionalTensors,
    statistics: Tensors,
    upstream: OptionalTensors,
    temperature: float,
    backend: str,
    shard: str,
) -> Tensor:
    """Gradient ``[B, T, V]`` from statistics (maximum, sum of exponentials, entropy) and upstream (dL/dl, dL/dEnt)."""
    gradient = memory.new_gradient(logits)
    _write_gradient(logits, rows, statistics, upstream, temperature, backend, shard, gradient)
    return gradient


@operator(lambda *_: None, mutates="logits")
def logits_gradient_(
    logits: Tensor,
    rows: OptionalTensors,
    statistics: Tensors,
    upstream: OptionalTensors,
    temperature: float,
    backend: str,
    shard: str,
) -> None:
    """As `logits_gradient`, written over ``logits``."""
    _write_gradient(logits, rows, statistics, upstream, temperature, backend, shard, logits)


def _fake_loss(log_probs: Tensor, *others: Any) -> Tensors2:
    per_token, reported, _ = others[-3:]
    loss = torch.empty_like(log_probs) if per_token else log_probs.new_empty(())
    return loss, fake_vector(log_probs, metrics.TOKEN, reported)


@operator(_fake_loss)
def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: OptionalTensors,
    offsets: Tensor | None,
    num_sequences: int,
    config: str,
    vocab: int,
    per_token: bool,
    reported: bool,
    backend: str,
) -> Tensors2:
    """Loss (0-d, or reduced ``per_token [N]``), and the metrics vector where it is ``reported``."""
    segments = Segments(log_probs.shape[0], num_sequences, offsets)
    return implementation(backend).policy_loss(
        log_probs, entropy, read_rows(rows, backend), segments, policy_config(config), vocab, per_token, reported
    )


def _fake_slopes(log_probs: Tensor, *others: Any) -> Tensors2:
    want_bonus, _ = others[-2:]
    return torch.empty_like(log_probs), log_probs.new_empty(log_probs.shape[0] if want_bonus else 0)


@operator(_fake_slopes)
def policy_loss_gradient(
    log_probs: Tensor,
    rows: OptionalTensors,
    offsets: Tensor | None,
    num_sequences: int,
    config: str,
    upstream: Tensor,
    want_bonus: bool,
    backend: str,
) -> Tensors2:
    """Gradient of the token losses times ``upstream`` (0-d or ``[N]``) by ``log_probs [N]`` and, if wanted, entropy."""
    segments = Segments(log_probs.shape[0], num_sequences, offsets)
    return implementation(backend).policy_loss_gradient(
        log_probs, read_rows(rows, backend), segments, policy_config(config), upstream, want_bonus
    )


def _loss_and_gradient(
    logits: Tensor,
    given: OptionalTensors,
    kinds: list[int],
    size: list[int],
    numbers: list[float],
    config: str,
    only_active: bool,
    scalars: list[float],
    want_entropy: bool,
    reported: bool,
    backend: str,
    gradient: Tensor,
) -> Tensors2:
    dtype = compute_dtype(logits.dtype)
    material = material_of(given[:NUM_GIVEN], kinds, size, numbers, config, only_active, dtype)
    package, support, (temperature, scale) = implementation(backend), support_of(given, NUM_GIVEN), scalars
    others = (temperature, scale, want_entropy, reported, gradient)
    if support is None:
        return package.logits_policy_loss(logits, material, *others)
    return kept.logits_policy_loss(package, logits, material, support, *others)


def _fake_one_pass(logits: Tensor, *others: Any) -> Tensors2:
    loss = logits.new_empty((), dtype=compute_dtype(logits.dtype))
    return loss, fake_vector(logits, metrics.TOKEN, others[-2])


@operator(lambda *arguments: (*_fake_one_pass(*arguments), _fake_gradient(*arguments)))
def logits_policy_loss(
    logits: Tensor,
    given: OptionalTensors,
    kinds: list[int],
    size: list[int],
    numbers: list[float],
    config: str,
    only_active: bool,
    scalars: list[float],
    want_entropy: bool,
    reported: bool,
    backend: str,
) -> Tensors3:
    """Loss, metrics vector, gradient ``[B, T, V]``; ``scalars`` are temperature and grad_scale, for the others see
    `egpo_kernels.engine.row_ops.token_rows`.
    """
    gradient = memory.new_gradient(logits)
    arguments = (given, kinds, size, numbers, config, only_active, scalars, want_entropy, reported, backend)
    return *_loss_and_gradient(logits, *arguments, gradient), gradient


@operator(_fake_one_pass, mutates="logits")
def logits_policy_loss_(
    logits: Tensor,
    given: OptionalTensors,
    kinds: list[int],
    size: list[int],
    numbers: list[float],
    config: str,
    only_active: bool,
    scalars: list[float],
    want_entropy: bool,
    reported: bool,
    backend: str,
) -> Tensors2:
    """As `logits_policy_loss`, the gradient written over ``logits``."""
    arguments = (given, kinds, size, numbers, config, only_active, scalars, want_entropy, reported, backend)
    return _loss_and_gradient(logits, *arguments, logits)


@operator(lambda *_: None, mutates="gradient")
def rescale_(gradient: Tensor, upstream: Tensor, expected: float, backend: str) -> None:
    """Multiply ``gradient`` by ``upstream / expected`` in place; nothing is read or written when they are equal."""
    implementation(backend).rescale_(gradient, upstream, expected)
