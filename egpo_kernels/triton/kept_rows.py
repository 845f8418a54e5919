"""Rows of kept tokens: their softmax, and its gradient; one program a row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.formulas.kept import Entries
from egpo_kernels.triton.arithmetic import LOG2_E
from egpo_kernels.triton.launcher import Launches, lie
from egpo_kernels.triton.settings import read_temperature, row_pointers, temperature_of, triton_dtype
from egpo_kernels.triton.softmax import (
    LOWEST,
    START,
    START_FLOAT64,
    RowStatistics,
    row_inverse_temperature,
    token_statistics,
)
from egpo_kernels.triton.softmax_gradient import gradient_of, levels

BLOCK, OPTIONS = 128, {"num_warps": 1}


class Kept(NamedTuple):
    """Kept logits and fields of `egpo_kernels.formulas.kept.Entries`, as pointers."""

    values_ptr: Any
    alive_ptr: Any
    offsets_ptr: Any
    broken_ptr: Any


@triton.jit
def load_kept(kept, offs, stop):
    """Kept logits and which of these are alive; -inf where they are not."""
    alive = tl.load(kept.alive_ptr + offs, mask=offs < stop, other=0) != 0
    return tl.load(kept.values_ptr + offs, mask=alive, other=float("-inf")), alive


@triton.jit
def kept_statistics_kernel(
    kept, rows, log_probs_ptr, entropy_ptr, maximum_ptr, sum_exp_ptr, numbers, DTYPE: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `row_statistics_kernel`, over the kept tokens of a row, the first of which is its own; a broken one is NaN."""
    row = tl.program_id(0)
    zero = tl.zeros((), DTYPE)
    lowest: tl.constexpr = START_FLOAT64 if DTYPE == tl.float64 else START
    maximum, sum_exp, weighted, log_prob, entropy = zero, zero, zero, zero, zero
    if tl.load(rows.mask_ptr + row) != 0:
        inverse_temperature = row_inverse_temperature(rows, row, read_temperature(numbers, DTYPE))
        scale = LOG2_E * inverse_temperature
        maximum = zero + lowest
        start, stop = tl.load(kept.offsets_ptr + row), tl.load(kept.offsets_ptr + row + 1)
        for first in range(start, stop, BLOCK):
            z, _ = load_kept(kept, first + tl.arange(0, BLOCK), stop)
            higher = tl.maximum(maximum, tl.max(z, 0))
            x = (z - higher) * scale
            e = tl.exp2(x)
            shift = tl.maximum((maximum - higher) * scale, LOWEST)
            decay = tl.exp2(shift)
            if ENTROPY:
                weighted = decay * (weighted + shift * sum_exp) + tl.sum(e * tl.maximum(x, LOWEST), 0)
            sum_exp = decay * sum_exp + tl.sum(e, 0)
            maximum = higher
        found = RowStatistics(maximum, sum_exp, weighted)
        log_prob, entropy = token_statistics(found, tl.load(kept.values_ptr + start), inverse_temperature)
        log_prob = tl.where(tl.load(kept.broken_ptr + row) != 0, float("nan"), log_prob)
    tl.store(log_probs_ptr + row, log_prob)
    tl.store(maximum_ptr + row, maximum)
    tl.store(sum_exp_ptr + row, sum_exp)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def kept_gradient_kernel(
    kept, gradient_ptr, rows, maximum_ptr, sum_exp_ptr, entropy_ptr, slope_ptr, bonus_ptr, numbers,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `logits_gradient_kernel`, by the kept tokens of a row; where nothing flows, what is there stays."""
    row = tl.program_id(0)
    TILTED: tl.constexpr = bonus_ptr is not None
    counted = (tl.load(rows.mask_ptr + row) != 0) & (tl.load(kept.broken_ptr + row) == 0)
    slope = tl.load(slope_ptr + row, mask=counted, other=0.0)
    bonus = slope * 0.0
    entropy = slope * 0.0
    if TILTED:
        bonus = tl.load(bonus_ptr + row, mask=counted, other=0.0)
        entropy = tl.load(entropy_ptr + row)
    start, stop = tl.load(kept.offsets_ptr + row), tl.load(kept.offsets_ptr + row + 1)
    logit = tl.load(kept.values_ptr + start)
    if counted & ((slope != 0) | (bonus != 0)) & (logit != float("-inf")):
        inverse_temperature = row_inverse_temperature(rows, row, read_temperature(numbers, DTYPE))
        found = RowStatistics(tl.load(maximum_ptr + row), tl.load(sum_exp_ptr + row), None)
        level, tilt = levels(found, entropy, slope, bonus, inverse_temperature, TILTED)
        for first in range(start, stop, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            z, alive = load_kept(kept, offs, stop)
            dz = gradient_of(z, found.maximum, LOG2_E * inverse_temperature, level, tilt, TILTED)
            dz = tl.where(offs == start, dz + slope * inverse_temperature, dz)
            tl.store(gradient_ptr + offs, dz, mask=alive)


def kept_statistics(
    values: Tensor, entries: Entries, rows: Rows, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-prob, entropy, maximum, sum of exponentials ``[N]`` of the ``values [E]`` of kept tokens."""
    num_rows = entries.mask.shape[0]
    results = tuple(values.new_empty(num_rows) if wanted else None for wanted in (True, want_entropy, True, True))
    log_probs, entropy, maximum, sum_exp = results
    assert log_probs is not None and maximum is not None and sum_exp is not None
    if num_rows:
        pointers, kept = row_pointers(rows), Kept(values, entries.alive, entries.offsets, entries.broken)
        launches = Launches(values.device, lie(pointers), lie(kept), want_entropy)
        constants = (triton_dtype(values.dtype), want_entropy, BLOCK)
        arguments = (kept, pointers, *results, temperature_of(temperature, values.dtype), *constants)
        launches(kept_statistics_kernel, num_rows, arguments, OPTIONS)
    return log_probs, entropy, maximum, sum_exp


def kept_gradient(
    values: Tensor,
    entries: Entries,
    rows: Rows,
    statistics: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    temperature: float,
) -> Tensor:
    """Gradient by ``values [E]`` from ``statistics`` (maximum, sum of exponentials, entropy) and ``upstream`` (dL/dl,
    dL/dEnt), ``[N]`` each; exactly 0 for what is not alive.
    """
    gradient, num_rows = torch.zeros_like(values), entries.mask.shape[0]
    if num_rows:
        pointers, kept = row_pointers(rows), Kept(values, entries.alive, entries.offsets, entries.broken)
        given = (*statistics, *upstream)
        launches = Launches(values.device, lie(pointers), lie(kept), lie(given))
        constants = (triton_dtype(values.dtype), BLOCK)
        arguments = (kept, gradient, pointers, *given, temperature_of(temperature, values.dtype), *constants)
        launches(kept_gradient_kernel, num_rows, arguments, OPTIONS)
    return gradient
