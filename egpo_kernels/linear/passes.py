"""Passes over the rows: log-probs, gradients, or both from one product, by the kernels of a backend."""

import math

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig, compute_dtype
from egpo_kernels.engine import kept
from egpo_kernels.inputs.segments import accumulation_dtype
from egpo_kernels.linear.head import Wanted
from egpo_kernels.linear.kept import KeptColumns
from egpo_kernels.linear.layer import Gradients, Layer

ONE_EACH = PolicyLossConfig(reduction="sum")
"""On-policy, with every advantage -1: the derivative of this loss by each log-prob is 1."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def row_statistics(layer: Layer, rows: Rows, temperature: float, want_entropy: bool) -> list[Tensor]:
    """Log-prob, entropy (``[0]`` unless wanted), maximum and sum of exponentials ``[N]``: one product."""
    results, parts = layer.zeros(rows, 4), layer.parted(rows)
    others = rows if parts is None else parts.others
    for chunk in layer.scored(others, layer.plan(others, Wanted.nothing()), temperature, want_entropy):
        found = layer.package.row_statistics(chunk.logits[None], chunk.rows, temperature, want_entropy)
        for result, values in zip(results, found, strict=True):
            if values.shape[0]:
                result[chunk.place] = values
    if parts is not None:
        columns = KeptColumns(layer, parts)
        found = layer.package.kept_statistics(columns.logits, parts.entries, parts.recorded, temperature, want_entropy)
        for place, values in enumerate(found):
            if values is not None:
                results[place] = kept.merged(parts, values, results[place])
    log_probs, entropy, maximum, sum_exp = results
    return [log_probs, entropy if want_entropy else entropy[:0].clone(), maximum, sum_exp]


def loss_gradient(
    layer: Layer,
    rows: Rows,
    config: PolicyLossConfig,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    wanted: Wanted,
    alike: Rows | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-prob and entropy ``[N]``, and the gradients: one product for logits, one for each gradient that is wanted."""
    (log_probs, entropy), parts = layer.zeros(rows, 2), layer.parted(rows)
    others = rows if parts is None else parts.others
    plan = layer.plan(others, wanted)
    gradients = Gradients(layer, wanted, plan, parts is not None)
    for chunk in layer.scored(others, plan, temperature, want_entropy, alike):
        own, own_entropy = layer.package.logits_loss_gradient(
            chunk.logits[None], chunk.rows, config, temperature, grad_scale, want_entropy, chunk.gradient[None]
        )
        log_probs[chunk.place] = own
        if own_entropy is not None:
            entropy[chunk.place] = own_entropy
        gradients.add(chunk)
        del chunk  # its memory must be free when the sums are rounded
    if parts is not None:
        columns = KeptColumns(layer, parts)
        scored, slopes = kept.loss_gradient(
            layer.package, parts, columns.logits, config, temperature, grad_scale, want_entropy
        )
        columns.add(slopes, gradients)
        log_probs = kept.merged(parts, scored.log_probs, log_probs)
        entropy = entropy if scored.entropy is None else kept.merged(parts, scored.entropy, entropy)
    return log_probs, entropy, gradients.tensors()


def coefficients(count: int, like: Tensor) -> Tensor:
    """What each row's gradient is multiplied by while its own coefficient is not known: numbers all over [1, 2).

    With the same for all, ``onehot - p`` would be rounded alike in every row, and the errors would add up.
    """
    rows = torch.arange(count, dtype=accumulation_dtype(like.device), device=like.device)
    return (1 + (rows * GOLDEN_RATIO).frac()).to(like.dtype)


def log_prob_gradient(
    layer: Layer, rows: Rows, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-prob, entropy, and the gradient of each row's log-prob by its hidden states, times `coefficients`."""
    ones = torch.ones_like(rows.mask, dtype=compute_dtype(layer.hidden.dtype))
    bare = Rows(rows.mask, rows.tokens, rows.temperature, -ones, coefficients(ones.shape[0], ones))
    return loss_gradient(layer, bare, ONE_EACH, temperature, 1.0, want_entropy, Wanted.only_hidden(), rows)


def gradient(
    layer: Layer,
    rows: Rows,
    statistics: list[Tensor],
    upstream: list[Tensor | None],
    temperature: float,
    wanted: Wanted,
) -> list[Tensor]:
    """Gradients from ``upstream`` (dL/dl, dL/dEnt): the logits are made once more.

    ``statistics`` are maximum, sum of exponentials and entropy; where they are empty they are made again too.
    """
    grad_log_probs, grad_entropy = upstream
    assert grad_log_probs is not None
    flows = grad_log_probs != 0 if grad_entropy is None else (grad_log_probs != 0) | (grad_entropy != 0)
    rows = rows._replace(mask=rows.mask & flows)
    parts = layer.parted(rows)
    others = rows if parts is None else parts.others
    plan = layer.plan(others, wanted)
    gradients, again = Gradients(layer, wanted, plan, parts is not None), not statistics[0].shape[0]
    walk = layer.scored(others, plan, temperature, grad_entropy is not None) if again else layer.chunks(others, plan)
    for chunk in walk:
        if not again:
            known = [values[chunk.place] if values.shape[0] else values for values in statistics]
        else:
            _, entropy, *known = layer.package.row_statistics(
                chunk.logits[None], chunk.rows, temperature, grad_entropy is not None
            )
            known.append(entropy)
        given = [None if values is None else values[chunk.place] for values in upstream]
        layer.package.logits_gradient(chunk.logits[None], chunk.rows, known, given, temperature, chunk.gradient[None])
        gradients.add(chunk)
        del chunk  # its memory must be free when the sums are rounded
    if parts is not None:
        columns = KeptColumns(layer, parts)
        known_of = (columns.logits, parts.entries, parts.recorded)
        if again:
            _, entropies, *found = layer.package.kept_statistics(*known_of, temperature, grad_entropy is not None)
            statistics = [*found, entropies]
        slopes = layer.package.kept_gradient(*known_of, statistics, upstream, temperature)
        columns.add(slopes, gradients)
    return gradients.tensors()
