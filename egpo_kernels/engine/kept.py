"""Paths over logits some of whose rows keep only a sampler's tokens: those rows apart from the others, in one call.

Kept logits are read before anything is written, so that a gradient may lie over the logits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas.kept import Entries, row_of_id
from egpo_kernels.formulas.rows import Material
from egpo_kernels.inputs import validation
from egpo_kernels.inputs.segments import Segments, flat, flat_rows
from egpo_kernels.inputs.values import check_kept, check_rows

Support = tuple[Tensor, Tensor]
"""Ids ``[M]`` and sound offsets ``[N + 1]``."""


class Parts(NamedTuple):
    """Rows ``[N]`` as they are, without those that have a record, and those alone; and their entries."""

    rows: Rows
    others: Rows
    recorded: Rows
    entries: Entries


def parted(package: Any, rows: Rows, support: Support, vocab: int) -> Parts:
    """Tell rows with a record from rows without."""
    rows = flat_rows(rows)
    assert rows.tokens is not None
    ids, offsets = support
    if not rows.tokens.numel():
        ids = ids[:0]  # of no row
    entries = package.kept_entries(ids, offsets, rows.tokens, rows.mask, vocab)
    return Parts(rows, rows._replace(mask=rows.mask & ~entries.mask), rows._replace(mask=entries.mask), entries)


def checked(package: Any, rows: Rows, support: Support, vocab: int) -> Parts:
    """As `parted`, with the values looked at where that costs no sync."""
    check(rows, support, vocab)
    return parted(package, rows, support, vocab)


def check(rows: Rows, support: Support, vocab: int) -> None:
    """Raise where a row that counts recorded what cannot be, where looking costs no sync."""
    ids, offsets = support
    if validation.checks_values(ids.device):
        row = row_of_id(offsets, ids.shape[0])
        counts = torch.nn.functional.pad(flat(rows.mask), (0, 1))
        check_kept(ids.long(), row, counts[row], vocab)


class Softmax(NamedTuple):
    """Log-prob, entropy, maximum and sum of exponentials ``[N]`` of rows with a record."""

    log_probs: Tensor
    entropy: Tensor | None
    maximum: Tensor
    sum_exp: Tensor


def loss_gradient(
    package: Any,
    parts: Parts,
    values: Tensor,
    config: PolicyLossConfig,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
) -> tuple[Softmax, Tensor]:
    """Softmax over kept tokens, and the gradient ``[E]`` of a loss none of whose tokens depends on its sequence."""
    found = Softmax(*package.kept_statistics(values, parts.entries, parts.recorded, temperature, want_entropy))
    segments, scale = Segments(found.log_probs.shape[0], 1), found.log_probs.new_full((), grad_scale)
    slope, bonus = package.policy_loss_gradient(
        found.log_probs, parts.recorded, segments, config, scale, config.has_bonus
    )
    statistics, upstream = [found.maximum, found.sum_exp, found.entropy], [slope, bonus if config.has_bonus else None]
    return found, package.kept_gradient(values, parts.entries, parts.recorded, statistics, upstream, temperature)


def merged(parts: Parts, of_recorded: Tensor, of_others: Tensor) -> Tensor:
    """Numbers ``[N]`` of both kinds of rows; as they were of the others, which are 0 where a row does not count."""
    return torch.where(parts.entries.mask, of_recorded, of_others)


def row_statistics(
    package: Any, logits: Tensor, parts: Parts, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As a backend's own: log-prob, entropy (``[0]`` unless wanted), maximum, sum of exponentials ``[N]``."""
    values = package.kept_logits(logits, parts.entries)
    found = Softmax(*package.kept_statistics(values, parts.entries, parts.recorded, temperature, want_entropy))
    log_probs, entropy, maximum, sum_exp = package.row_statistics(logits, parts.others, temperature, want_entropy)
    if found.entropy is not None:
        entropy = merged(parts, found.entropy, entropy)
    return (
        merged(parts, found.log_probs, log_probs),
        entropy,
        merged(parts, found.maximum, maximum),
        merged(parts, found.sum_exp, sum_exp),
    )


def logits_gradient(
    package: Any,
    logits: Tensor,
    parts: Parts,
    statistics: list[Tensor],
    upstream: list[Tensor | None],
    temperature: float,
    out: Tensor,
) -> None:
    """As a backend's own: dL/dlogits to ``out``, maybe ``logits``."""
    values = package.kept_logits(logits, parts.entries)
    gradient = package.kept_gradient(values, parts.entries, parts.recorded, statistics, upstream, temperature)
    package.logits_gradient(logits, parts.others, statistics, upstream, temperature, out)
    package.put_kept_(out, parts.entries, gradient)


def logits_policy_loss(
    package: Any,
    logits: Tensor,
    material: Material,
    support: Support,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    reported: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """As a backend's own: loss and metrics vector, the gradient to ``out``, maybe ``logits``."""
    rows, config, vocab = package.token_rows(material), material.purpose.config, logits.shape[-1]
    assert config is not None
    check_rows(rows, vocab)
    parts = checked(package, rows, support, vocab)
    values = package.kept_logits(logits, parts.entries)
    found, gradient = loss_gradient(package, parts, values, config, temperature, grad_scale, want_entropy)
    log_probs, entropy = package.logits_loss_gradient(
        logits, parts.others, config, temperature, grad_scale, want_entropy, out
    )
    package.put_kept_(out, parts.entries, gradient)
    if entropy is not None and found.entropy is not None:
        entropy = merged(parts, found.entropy, entropy)
    log_probs, segments = merged(parts, found.log_probs, log_probs), Segments(log_probs.shape[0], 1)
    return package.policy_loss(log_probs, entropy, parts.rows, segments, config, vocab, False, reported)
