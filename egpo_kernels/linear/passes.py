"""Passes over the rows: log-probs, gradients, or both from one product, by the kernels of a backend."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig, compute_dtype
from egpo_kernels.inputs.segments import accumulation_dtype
from egpo_kernels.linear.chunks import Chunk, Plan, active_rows, chunk_rows, chunks
from egpo_kernels.linear.head import Head, HeadGradients, Wanted

ONE_EACH = PolicyLossConfig(reduction="sum")
"""On-policy, with every advantage -1: the derivative of this loss by each log-prob is 1."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Layer(NamedTuple):
    """Hidden states ``[B, T, H]`` and the head they meet, the kernels, and how many rows are multiplied at a time."""

    hidden: Tensor
    head: Head
    package: ModuleType
    host_mask: Tensor | None
    num_active: int | None
    max_chunk_bytes: int | None

    def plan(self, rows: Rows, wanted: Wanted) -> Plan:
        """The rows that count, and how many of them go together."""
        places = active_rows(rows.mask, self.host_mask, self.num_active)
        total = (rows.mask if places is None else places).shape[0]
        scratch = self.package.scratch_bytes(self.hidden)
        return Plan(places, total, chunk_rows(self.head, wanted, self.max_chunk_bytes, scratch, total))

    def chunks(self, rows: Rows, plan: Plan) -> Iterator[Chunk]:
        """Walk over the planned rows, with their logits."""
        return chunks(self.hidden, self.head, rows, plan)

    def zeros(self, rows: Rows, count: int) -> list[Tensor]:
        """Results per row ``[N]``, 0 where rows do not count."""
        return [self.hidden.new_zeros(rows.mask.shape, dtype=compute_dtype(self.hidden.dtype)) for _ in range(count)]


class Gradients:
    """Gradients of hidden states and head, gathered chunk by chunk."""

    def __init__(self, layer: Layer, wanted: Wanted, once: bool) -> None:
        self.head = layer.head
        self.hidden = layer.hidden.new_zeros(layer.hidden.shape) if wanted.hidden else None
        self.of_head = HeadGradients(layer.head, wanted, once)

    def add(self, chunk: Chunk) -> None:
        """Take what flows back from ``chunk.gradient``."""
        self.head.uncap_(chunk.gradient, chunk.logits)
        gradient = chunk.gradient.to(self.head.weight.dtype)
        if self.hidden is not None:
            flat = self.hidden.flatten(0, 1)
            if isinstance(chunk.place, slice) and flat.dtype == chunk.hidden.dtype:
                self.head.hidden_gradient(gradient, flat[chunk.place])
            else:
                found = torch.empty_like(chunk.hidden)
                self.head.hidden_gradient(gradient, found)
                flat[chunk.place] = found.to(flat.dtype)
        self.of_head.add(gradient, chunk.hidden)

    def tensors(self) -> list[Tensor]:
        """Of hidden states, weight, bias and both adapters; empty where none was asked for."""
        hidden = self.head.weight.new_empty(0) if self.hidden is None else self.hidden
        return [hidden, *self.of_head.rounded()]


def row_statistics(layer: Layer, rows: Rows, temperature: float, want_entropy: bool) -> list[Tensor]:
    """Log-prob, entropy (``[0]`` unless wanted), maximum and sum of exponentials ``[N]``: one product."""
    results = layer.zeros(rows, 4)
    for chunk in layer.chunks(rows, layer.plan(rows, Wanted.nothing())):
        found = layer.package.row_statistics(chunk.logits[None], chunk.rows, temperature, want_entropy)
        for result, values in zip(results, found, strict=True):
            if values.shape[0]:
                result[chunk.place] = values
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
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-prob and entropy ``[N]``, and the gradients: one product for logits, one for each gradient that is wanted."""
    log_probs, entropy = layer.zeros(rows, 2)
    plan = layer.plan(rows, wanted)
    gradients = Gradients(layer, wanted, plan.once)
    for chunk in layer.chunks(rows, plan):
        own, own_entropy = layer.package.logits_loss_gradient(
            chunk.logits[None], chunk.rows, config, temperature, grad_scale, want_entropy, chunk.gradient[None]
        )
        log_probs[chunk.place] = own
        if own_entropy is not None:
            entropy[chunk.place] = own_entropy
        gradients.add(chunk)
        del chunk  # its memory must be free when the sums are rounded
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
    return loss_gradient(layer, bare, ONE_EACH, temperature, 1.0, want_entropy, Wanted.only_hidden())


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
    plan = layer.plan(rows, wanted)
    gradients = Gradients(layer, wanted, plan.once)
    for chunk in layer.chunks(rows, plan):
        if statistics[0].shape[0]:
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
    return gradients.tensors()
