"""Device functions over one row of logits: statistics in one sweep, gradient (or zeros) in another.

Exponents are kept in powers of two: ``x = (z - m) log2(e) / temperature``, so that an exponential is one instruction.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of this is 0 in float64 too, and 0 times it is 0, where 0 times -inf would be NaN.
LOWEST = tl.constexpr(-1e4)
# Below every logit but -inf: a leading block of -inf leaves a finite maximum.
START = tl.constexpr(-3.4028234663852886e38)
START_FLOAT64 = tl.constexpr(-1.7976931348623157e308)


class Matrix(NamedTuple):
    """Logits or their gradient: row r is row ``r % length`` of batch ``r // length``."""

    ptr: Any
    batch_stride: Any
    row_stride: Any


class RowStatistics(NamedTuple):
    """Of one row: maximum m, ``sum_exp = sum 2^x``, and ``weighted = sum 2^x x`` (0 unless entropy is wanted)."""

    maximum: Any
    sum_exp: Any
    weighted: Any


def matrix(tensor: torch.Tensor) -> tuple[Matrix, int]:
    """Describe ``[B, T, V]`` where it lies, and the rows in a batch; rows in equal steps count as one batch."""
    batch, length, _ = tensor.shape
    if length == 1:
        return Matrix(tensor, 0, tensor.stride(0)), batch
    if batch <= 1 or tensor.stride(0) == length * tensor.stride(1):
        return Matrix(tensor, 0, tensor.stride(1)), batch * length
    return Matrix(tensor, tensor.stride(0), tensor.stride(1)), length


def scratch_bytes(logits: torch.Tensor) -> int:
    """What a launch over rows holds beside logits and gradient: nothing."""
    return 0


def launch_options(vocab: int, dtype: torch.dtype) -> dict[str, int]:
    """Block and warps from vocabulary and dtype alone, so that a row's bits do not depend on the rows beside it."""
    # 32 elements a thread share the cost of a block's maximum and of the loop. Where a row starts anywhere each element
    # is loaded by itself, which takes more registers than there are for so many.
    largest = 1024 if dtype == torch.float64 else 16384 if vocab % 16 == 0 else 8192
    block = min(max(triton.next_power_of_2(vocab), 2), largest)
    return {"BLOCK_V": block, "num_warps": max(1, min(16, block // 256))}


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    properties = torch.get_device_module(device).get_device_properties(device)
    name = "multi_processor_count" if hasattr(properties, "multi_processor_count") else "max_compute_units"
    return int(getattr(properties, name))


def num_programs(num_rows: int, device: torch.device) -> int:
    """Programs of a persistent launch; one a processor keeps a row in cache between its two sweeps."""
    return min(num_rows, _processors(device))


@triton.jit
def row_pointer(matrix, row, length):
    """Pointer to the first logit of a row, in 64-bit arithmetic but for the division, which is slow there."""
    batch, place = tl.cast(row // length, tl.int64), tl.cast(row % length, tl.int64)
    return matrix.ptr + batch * matrix.batch_stride + place * matrix.row_stride


@triton.jit
def row_inverse_temperature(rows, row, settings):
    """1 / temperature of a row, NaN where it is not positive."""
    inverse = settings.inverse_temperature
    if rows.temperature_ptr is not None:
        heat = tl.load(rows.temperature_ptr + row)
        inverse = tl.where(heat > 0, 1.0 / heat, float("nan"))
    return inverse


@triton.jit
def load_token(rows, row, row_ptr, vocab, live, DTYPE: tl.constexpr):
    """The token of a row and its logit; outside the vocabulary, or in no ``live`` row, that is NaN and not read."""
    token = tl.load(rows.tokens_ptr + row)
    valid = (token >= 0) & (token < vocab)
    logit = tl.load(row_ptr + tl.where(valid, token, 0), mask=valid & live, other=float("nan"))
    return token, logit.to(DTYPE)


@triton.jit
def merge_block(found, z, scale, ENTROPY: tl.constexpr):
    """Add a block of logits to running per-lane sums, with one maximum per block."""
    maximum = tl.maximum(found.maximum, tl.max(z, 0))
    x = (z - maximum) * scale
    e = tl.exp2(x)
    shift = tl.maximum((found.maximum - maximum) * scale, LOWEST)
    decay = tl.exp2(shift)
    weighted = found.weighted
    if ENTROPY:
        weighted = decay * (weighted + shift * found.sum_exp) + e * tl.maximum(x, LOWEST)
    return RowStatistics(maximum, decay * found.sum_exp + e, weighted)


@triton.jit
def sweep_statistics(row_ptr, vocab, scale, DTYPE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr):
    """Statistics of a row in one read; the last, partial block is apart so that the others need no mask."""
    offs_v = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), DTYPE)
    lowest: tl.constexpr = START_FLOAT64 if DTYPE == tl.float64 else START
    found = RowStatistics(tl.full((), lowest, DTYPE), zeros, zeros)
    full = vocab // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        z = tl.load(row_ptr + start + offs_v).to(DTYPE)
        found = merge_block(found, z, scale, ENTROPY)
    if full < vocab:
        valid_v = full + offs_v < vocab
        z = tl.load(row_ptr + full + offs_v, mask=valid_v, other=float("-inf")).to(DTYPE)
        found = merge_block(found, z, scale, ENTROPY)
    return RowStatistics(found.maximum, tl.sum(found.sum_exp, 0), tl.sum(found.weighted, 0))


@triton.jit
def token_statistics(found, logit, inverse_temperature):
    """Log-prob of the token (-inf where its logit is) and entropy (0 where every logit is -inf), in nats."""
    log_sum = tl.log(found.sum_exp)
    log_prob = (logit - found.maximum) * inverse_temperature - log_sum
    log_prob = tl.where(logit == float("-inf"), float("-inf"), log_prob)
    entropy = tl.where(found.sum_exp == 0, 0.0, log_sum - LN_2 * found.weighted / found.sum_exp)
    return log_prob, entropy


@triton.jit
def gradient_block(z, maximum, scale, level, tilt, TILTED: tl.constexpr):
    """``2^x (level + tilt x)``: the gradient away from the token, level and tilt already divided by sum_exp."""
    x = (z - maximum) * scale
    e = tl.exp2(x)
    if TILTED:
        return e * (level + tilt * tl.maximum(x, LOWEST))
    return e * level


@triton.jit
def sweep_gradient(
    row_ptr, out_ptr, vocab, token, logit, maximum, sum_exp, entropy, slope, bonus, inverse_temperature,
    DTYPE: tl.constexpr, TILTED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dz of a row from slope = dL/dl and bonus = dL/dEnt; ``out_ptr`` may be ``row_ptr``.

    ``dz = (slope (onehot - p) - bonus p (log p + Ent)) / temperature`` with ``log p = x ln 2 - log sum_exp``.
    """
    # Half a block at a time: a whole one does not fit in the registers beside its gradient.
    HALF: tl.constexpr = BLOCK_V // 2
    offs_v = tl.arange(0, HALF)
    scale = LOG2_E * inverse_temperature
    level = -slope * inverse_temperature / sum_exp
    tilt = level * 0.0
    if TILTED:
        level -= bonus * inverse_temperature * (entropy - tl.log(sum_exp)) / sum_exp
        tilt = -bonus * inverse_temperature * LN_2 / sum_exp
    full = vocab // HALF * HALF
    for start in range(0, full, HALF):
        z = tl.load(row_ptr + start + offs_v, eviction_policy="evict_first").to(DTYPE)
        dz = gradient_block(z, maximum, scale, level, tilt, TILTED).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + offs_v, dz, eviction_policy="evict_first")
    if full < vocab:
        valid_v = full + offs_v < vocab
        z = tl.load(row_ptr + full + offs_v, mask=valid_v, other=float("-inf")).to(DTYPE)
        dz = gradient_block(z, maximum, scale, level, tilt, TILTED).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + full + offs_v, dz, mask=valid_v)
    own = gradient_block(logit, maximum, scale, level, tilt, TILTED) + slope * inverse_temperature
    # Another thread may have written the token's place: order the two stores.
    tl.debug_barrier()
    inside = (token >= 0) & (token < vocab)
    tl.store(out_ptr + tl.where(inside, token, 0), own.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def write_zeros(out_ptr, vocab, BLOCK_V: tl.constexpr):
    """Write a row of zeros without reading one."""
    offs_v = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
    full = vocab // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        tl.store(out_ptr + start + offs_v, zeros, eviction_policy="evict_first")
    if full < vocab:
        tl.store(out_ptr + full + offs_v, zeros, mask=full + offs_v < vocab)
