"""Logits level: statistics, gradient, and both in one go, a cache-sized chunk of rows at a time."""

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig, compute_dtype
from egpo_kernels.formulas.rows import Material, token_rows
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.inputs.values import check_rows
from egpo_kernels.portable.chunks import Chunk, chunk_rows, chunks, step_rows
from egpo_kernels.portable.policy_loss import policy_loss, policy_loss_gradient
from egpo_kernels.portable.softmax import (
    Sums,
    exponentials,
    exponentials_again,
    heats,
    own_logits,
    read_off,
    slopes,
    write_gradient,
)


def row_statistics(
    logits: Tensor, rows: Rows, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy (``[0]`` unless wanted), maximum, sum of exponentials ``[N]``; the first two are 0 outside the
    mask.
    """
    heat, sums = heats(rows, temperature), sums_of(logits, rows, temperature, want_entropy)
    # Once for all rows: a small operation on each chunk takes as long as some thousand logits.
    log_probs, entropy = read_off(own_logits(logits, rows)[1], heat, sums)
    log_probs = torch.where(rows.mask, log_probs, 0.0)
    entropy = log_probs.new_empty(0) if entropy is None else torch.where(rows.mask, entropy, 0.0)
    return log_probs, entropy, sums.maximum, sums.sum_exp


def sums_of(logits: Tensor, rows: Rows, temperature: float, want_entropy: bool) -> Sums:
    """Maximum and sums of rows ``[N]``; of those outside the mask they may be anything."""
    heat, sums = heats(rows, temperature), Sums.nothing(rows.mask.shape[0], logits, want_entropy)
    for chunk in chunks(logits, rows.mask, (chunk_rows if want_entropy else step_rows)(logits), want_entropy):
        exponentials(chunk, _heat_at(heat, chunk.place), sums)
    return sums


def token_scores(logits: Tensor, rows: Rows, temperature: float, want_entropy: bool) -> list[Tensor]:
    """Log-prob and, if wanted, entropy ``[N]``; 0 outside the mask."""
    return list(row_statistics(logits, rows, temperature, want_entropy)[: 1 + want_entropy])


def logits_gradient(
    logits: Tensor,
    rows: Rows,
    statistics: list[Tensor],
    upstream: list[Tensor | None],
    temperature: float,
    out: Tensor,
) -> None:
    """Write dL/dlogits to ``out`` (which may be ``logits``) from ``upstream`` (dL/dl, dL/dEnt), ``[N]`` each.

    ``statistics`` are maximum, sum of exponentials and entropy, as `row_statistics` gave them.
    """
    (grad_log_probs, grad_entropy), (maximum, sum_exp, entropy) = upstream, statistics
    assert grad_log_probs is not None
    live = rows.mask & ((grad_log_probs != 0) if grad_entropy is None else (grad_log_probs != 0) | (grad_entropy != 0))
    heat, (column, own) = heats(rows, temperature), own_logits(logits, rows)
    slope = slopes(own, sum_exp, entropy, rows.mask, heat, grad_log_probs, grad_entropy)
    size = (step_rows if grad_entropy is None else chunk_rows)(logits)
    for chunk in chunks(logits, live, size, grad_entropy is not None, out):
        exponentials_again(chunk, _heat_at(heat, chunk.place), maximum[chunk.place], grad_entropy is not None)
        write_gradient(chunk, column[chunk.place], slope.at(chunk.place))


def logits_loss_gradient(
    logits: Tensor,
    rows: Rows,
    config: PolicyLossConfig,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy ``[N]`` of each row, and its gradient written to ``out`` while the row is in cache."""
    log_probs, entropy = (logits.new_zeros(rows.mask.shape[0], dtype=compute_dtype(logits.dtype)) for _ in range(2))
    heat, (column, own) = heats(rows, temperature), own_logits(logits, rows)
    flows = config.has_bonus
    for chunk in chunks(logits, rows.mask, chunk_rows(logits), want_entropy, out):
        place, heat_here = chunk.place, _heat_at(heat, chunk.place)
        scored, spread, sum_exp = _softmax(chunk, own[place], heat_here, want_entropy)
        here = Rows(rows.mask[place], *(None if field is None else field[place] for field in rows[1:]))
        slope, bonus = policy_loss_gradient(scored, here, Segments(len(scored), 1), config, grad_scale, flows)
        log_probs[place] = torch.where(here.mask, scored, 0.0)
        if spread is not None:
            entropy[place] = torch.where(here.mask, spread, 0.0)
        given = (here.mask, heat_here, slope, bonus if flows else None)
        write_gradient(chunk, column[place], slopes(own[place], sum_exp, spread, *given))
    return log_probs, entropy if want_entropy else None


def _softmax(
    chunk: Chunk, own: Tensor, heat: Tensor | float, want_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob, entropy, sum of exponentials of the chunk's rows, with `exponentials` left in its memory."""
    sums = Sums.nothing(chunk.logits.shape[0], chunk.logits, want_entropy)
    exponentials(chunk._replace(place=slice(0, own.shape[0])), heat, sums)
    return *read_off(own, heat, sums), sums.sum_exp


def _heat_at(heat: Tensor | float, place: slice) -> Tensor | float:
    return heat[place] if isinstance(heat, Tensor) else heat


def logits_policy_loss(
    logits: Tensor,
    material: Material,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    reported: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss, 0-d, and the metrics vector, empty unless ``reported``; the gradient goes to ``out``, maybe ``logits``.

    Rows are made on the way, of a loss's ``material``.
    """
    rows, config, vocab = token_rows(material), material.purpose.config, logits.shape[-1]
    assert config is not None
    check_rows(rows, vocab)
    log_probs, entropy = logits_loss_gradient(logits, rows, config, temperature, grad_scale, want_entropy, out)
    # No token's loss depends on its sequence here.
    segments = Segments(log_probs.shape[0], 1)
    return policy_loss(log_probs, entropy, rows, segments, config, vocab, False, reported)
