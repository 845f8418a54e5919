"""Logits level: statistics, gradient, and both in one go, a cache-sized chunk of rows at a time."""

import torch
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows, compute_dtype
from egpo_kernels.formulas.rows import Material, token_rows
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.inputs.validation import check_rows
from egpo_kernels.portable.policy_loss import policy_loss, policy_loss_gradient
from egpo_kernels.portable.softmax import chunks, exponentials, heats, own_logits, read_off, softmax, write_gradient


def row_statistics(
    logits: Tensor, rows: Rows, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy (``[0]`` unless wanted), maximum, sum of exponentials ``[N]``; 0 outside the mask."""
    maximum, sum_exp, sum_x = (
        logits.new_zeros(rows.mask.shape[0], dtype=compute_dtype(logits.dtype)) for _ in range(3)
    )
    for chunk in chunks(logits, rows, rows.mask, temperature):
        maximum[chunk.place], sum_exp[chunk.place], weighted = exponentials(chunk, want_entropy)
        if weighted is not None:
            sum_x[chunk.place] = weighted
    # Once for all rows: a small operation on each chunk takes as long as some thousand logits.
    own, heat = own_logits(logits, rows)[1], heats(rows, temperature)
    found = read_off(own, heat, maximum, sum_exp, sum_x if want_entropy else None)
    empty = maximum.new_empty(0)
    log_probs, entropy, maximum, sum_exp = (
        empty if values is None else torch.where(rows.mask, values, 0.0) for values in found
    )
    return log_probs, entropy, maximum, sum_exp


def logits_gradient(
    logits: Tensor,
    rows: Rows,
    statistics: list[Tensor],
    upstream: list[Tensor | None],
    temperature: float,
    out: Tensor,
) -> None:
    """Write dL/dlogits to ``out`` (which may be ``logits``) from ``upstream`` (dL/dl, dL/dEnt), ``[N]`` each.

    All is made again, as in `logits_loss_gradient`, rather than from ``statistics``: same bits either way.
    """
    grad_log_probs, grad_entropy = upstream
    assert grad_log_probs is not None
    live = rows.mask & ((grad_log_probs != 0) if grad_entropy is None else (grad_log_probs != 0) | (grad_entropy != 0))
    for chunk in chunks(logits, rows, live, temperature, out):
        found = softmax(chunk, grad_entropy is not None)
        bonus = None if grad_entropy is None else grad_entropy[chunk.place]
        write_gradient(chunk, found, grad_log_probs[chunk.place], bonus)


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
    for chunk in chunks(logits, rows, rows.mask, temperature, out):
        found = softmax(chunk, want_entropy)
        flows, alone = config.entropy_coef != 0, Segments(found.log_probs.shape[0], 1)
        slope, bonus = policy_loss_gradient(found.log_probs, chunk.rows, alone, config, grad_scale, flows)
        log_probs[chunk.place] = torch.where(chunk.rows.mask, found.log_probs, 0.0)
        if found.entropy is not None:
            entropy[chunk.place] = torch.where(chunk.rows.mask, found.entropy, 0.0)
        write_gradient(chunk, found, slope, bonus if flows else None)
    return log_probs, entropy if want_entropy else None


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
