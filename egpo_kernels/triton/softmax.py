"""Device functions over one row of logits: its statistics in one sweep.

Exponents are kept in powers of two: ``x = (z - m) log2(e) / temperature``, so that an exponential is one instruction.
The maximum is subtracted before anything is rounded: one instruction more than ``z scale - m scale``, and a row's
results do not depend on where its logits lie.
"""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from egpo_kernels.triton.arithmetic import divide
from egpo_kernels.triton.launch import ACCESS_BYTES
from egpo_kernels.triton.launcher import ON_AMD, size
from egpo_kernels.triton.strips import block_places, first_access, load_block

LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of this is 0 in float64 too, and 0 times it is 0, where 0 times -inf would be NaN.
LOWEST = tl.constexpr(-1e4)
# Below every logit but -inf: a leading block of -inf leaves a finite maximum.
START = tl.constexpr(-3.4028234663852886e38)
START_FLOAT64 = tl.constexpr(-1.7976931348623157e308)
# Of float32: where its exponent stands, and a power of two below which no sum matters beside 1.
EXPONENT = tl.constexpr(0x7F800000)
SMALLEST = tl.constexpr(2.0**-80)
UNITS, UNIT = tl.constexpr(2.0**38), tl.constexpr(2.0**-38)


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


def matrix(tensor: torch.Tensor) -> tuple[Matrix, int, Hashable]:
    """Describe ``[B, T, V]`` where it lies, and the rows in a batch; rows in equal steps count as one batch.

    Last comes what a launch over it is chosen and compiled for.
    """
    batch_stride, row_stride, length, key = _steps(tensor.shape, tensor.stride())
    memory = tensor.untyped_storage().size() if ON_AMD else 0
    key = (key, tensor.dtype, tensor.data_ptr() % ACCESS_BYTES, memory >> 31)
    return Matrix(tensor, batch_stride, row_stride), length, key


@functools.lru_cache(maxsize=256)
def _steps(shape: torch.Size, strides: tuple[int, int, int]) -> tuple[int, int, int, Hashable]:
    (batch, length, vocab), (batch_stride, row_stride, _) = shape, strides
    shifts, num_rows = (batch_stride % ACCESS_BYTES, row_stride % ACCESS_BYTES), batch * length
    if length == 1:
        batch_stride, row_stride, length = 0, batch_stride, batch
    elif batch <= 1 or batch_stride == length * row_stride:
        batch_stride, length = 0, num_rows
    key = (vocab, shifts, size(batch_stride), size(row_stride), length >> 31, num_rows >> 31)
    return batch_stride, row_stride, length, key


def scratch_bytes(logits: torch.Tensor) -> int:
    """What a launch over rows holds beside logits and gradient: nothing."""
    return 0


@triton.jit
def row_pointer(matrix, row, length, ALIGNED: tl.constexpr):
    """Pointer to the first logit of a row, in 64-bit arithmetic but for the division, which is slow there."""
    batch, place = tl.cast(row // length, tl.int64), tl.cast(row % length, tl.int64)
    pointer = matrix.ptr + batch * matrix.batch_stride + place * matrix.row_stride
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def row_inverse_temperature(rows, row, settings):
    """1 / temperature of a row, NaN where it is not positive."""
    inverse = settings.inverse_temperature
    if rows.temperature_ptr is not None:
        heat = tl.load(rows.temperature_ptr + row)
        inverse = tl.where(heat > 0, divide(1.0, heat), float("nan"))
    return inverse


@triton.jit
def load_token(rows, row, row_ptr, vocab, live, DTYPE: tl.constexpr):
    """The token of a row and its logit; outside the vocabulary, or in no ``live`` row, that is NaN and not read."""
    token = tl.load(rows.tokens_ptr + row)
    valid = (token >= 0) & (token < vocab)
    logit = tl.load(row_ptr + tl.where(valid, token, 0), mask=valid & live, other=float("nan"))
    return token, logit.to(DTYPE)


@triton.jit
def start_statistics(launch, DTYPE: tl.constexpr):
    """Statistics of nothing: a number for each thread, in an odd row for each of its elements in a strip."""
    lowest: tl.constexpr = START_FLOAT64 if DTYPE == tl.float64 else START
    threads: tl.constexpr = launch.threads
    width: tl.constexpr = launch.width
    if launch.odd:
        zeros = tl.zeros((threads, width), DTYPE)
    else:
        zeros = tl.zeros((threads,), DTYPE)
    return RowStatistics(zeros + lowest, zeros, zeros)


@triton.jit
def within(block, launch):
    """Sum of a block's strips; also of a thread's neighbours, but in an odd row, which may start anywhere."""
    if launch.odd:
        return tl.sum(block, 0)
    else:
        return tl.sum(tl.sum(block, 2), 0)


@triton.jit
def merge_block(found, z, scale, launch, ENTROPY: tl.constexpr):
    """Add a block ``[strips, threads, width]`` of logits to running statistics, with one maximum each."""
    if launch.odd:
        maximum = tl.maximum(found.maximum, tl.max(z, 0))
        x = (z - maximum[None, :, :]) * scale
    else:
        maximum = tl.maximum(found.maximum, tl.max(tl.max(z, 2), 0))
        x = (z - maximum[None, :, None]) * scale
    e = tl.exp2(x)
    shift = tl.maximum((found.maximum - maximum) * scale, LOWEST)
    decay = tl.exp2(shift)
    weighted = found.weighted
    if ENTROPY:
        weighted = decay * (weighted + shift * found.sum_exp) + within(e * tl.maximum(x, LOWEST), launch)
    return RowStatistics(maximum, decay * found.sum_exp + within(e, launch), weighted)


@triton.jit
def sweep_statistics(row_ptr, extent, scale, launch, DTYPE: tl.constexpr, ENTROPY: tl.constexpr):
    """Statistics of a row in one read, several blocks of which are on their way at a time.

    The end of the row, which needs a mask, is asked for first and used last.
    """
    vectors: tl.constexpr = launch.odd or launch.aligned
    first, start_ptr = first_access(row_ptr, launch)
    if launch.end > 0:
        left = extent.vocab - first - extent.full
        end = load_block(start_ptr + extent.full, left, launch, DTYPE, launch.end, vectors, "")
    found = start_statistics(launch, DTYPE)
    block: tl.constexpr = launch.strips * launch.threads * launch.width
    for start in tl.range(0, extent.full, block, num_stages=launch.stages):
        z = load_block(start_ptr + start, None, launch, DTYPE, launch.strips, vectors, "")
        found = merge_block(found, z, scale, launch, ENTROPY)
    if launch.end > 0:
        if launch.odd:
            # What lies behind the inner part is among the edges.
            place = extent.full + first + block_places(launch, launch.end)
            end = tl.where(place < extent.inner, end, float("-inf"))
        found = merge_block(found, end, scale, launch, ENTROPY)
    if launch.odd:
        return odd_row(found, row_ptr, first, extent, scale, launch, ENTROPY)
    else:
        return even_row(found, scale, ENTROPY)


@triton.jit
def even_row(found, scale, ENTROPY: tl.constexpr):
    """Statistics of a row from those of its threads."""
    maximum = tl.max(found.maximum, 0)
    shift = tl.maximum((found.maximum - maximum) * scale, LOWEST)
    decay = tl.exp2(shift)
    weighted = maximum * 0.0
    if ENTROPY:
        weighted = tl.sum(decay * (found.weighted + shift * found.sum_exp), 0)
    return RowStatistics(maximum, tl.sum(decay * found.sum_exp, 0), weighted)


@triton.jit
def exact_sum(values, counted):
    """Sum of float32 numbers, the same bits in whatever order they lie; NaN if any is.

    In whole numbers: units of 2^-38 of the largest's power of two.
    """
    broken = tl.sum(tl.sum((counted & (values != values)).to(tl.int32), 1), 0)
    values = tl.where(counted & (values == values), values, 0.0)
    largest = tl.max(tl.max(tl.abs(values), 1), 0)
    power = tl.maximum((largest.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True), SMALLEST)
    whole = values * divide(UNITS, power)
    whole = (whole + tl.where(whole < 0, -0.5, 0.5)).to(tl.int64)
    total = tl.sum(tl.sum(whole, 1), 0).to(tl.float32) * (power * UNIT)
    return tl.where(broken > 0, float("nan"), total)


@triton.jit
def odd_row(found, row_ptr, first, extent, scale, launch, ENTROPY: tl.constexpr):
    """Statistics of a row that starts anywhere in its 16 bytes, the same bits wherever that is.

    A thread's places hold different elements as the row starts elsewhere, so each place has a number of its own, and
    they are added up in whole numbers. The first ``width`` elements of each strip, which a place may share with the
    strip before, are left to the edges.
    """
    place = tl.arange(0, launch.threads)[:, None] * launch.width + tl.arange(0, launch.width)[None, :] + first
    counted = (place >= launch.width) & (place < launch.threads * launch.width)
    z, edge = load_edges(row_ptr, extent, launch)
    maximum = tl.max(tl.max(tl.where(counted, found.maximum, START), 1), 0)
    maximum = tl.maximum(maximum, tl.max(tl.where(edge, z, START), 0))
    shift = tl.maximum((found.maximum - maximum) * scale, LOWEST)
    decay = tl.exp2(shift)
    x = (z - maximum) * scale
    e = tl.exp2(x)
    sum_exp = exact_sum(decay * found.sum_exp, counted) + tl.sum(e, 0)
    weighted = maximum * 0.0
    if ENTROPY:
        weighted = exact_sum(decay * (found.weighted + shift * found.sum_exp), counted)
        weighted += tl.sum(e * tl.maximum(x, LOWEST), 0)
    return RowStatistics(maximum, sum_exp, weighted)


@triton.jit
def load_edges(row_ptr, extent, launch):
    """Logits ``[edges]`` that no place of an odd row has to itself, and which of these lanes hold one."""
    strip: tl.constexpr = launch.threads * launch.width
    lane = tl.arange(0, launch.edges)
    heads = tl.cdiv(extent.inner, strip) * launch.width
    head = lane // launch.width * strip + lane % launch.width
    offs = tl.where(lane < heads, head, extent.inner + lane - heads)
    inside = tl.where(lane < heads, head < extent.inner, offs < extent.vocab)
    return tl.load(row_ptr + offs, mask=inside, other=float("-inf")).to(tl.float32), inside


@triton.jit
def token_statistics(found, logit, inverse_temperature):
    """Log-prob of the token (-inf where its logit is) and entropy (0 where every logit is -inf), in nats."""
    log_sum = tl.log(found.sum_exp)
    log_prob = (logit - found.maximum) * inverse_temperature - log_sum
    log_prob = tl.where(logit == float("-inf"), float("-inf"), log_prob)
    entropy = tl.where(found.sum_exp == 0, 0.0, log_sum - LN_2 * divide(found.weighted, found.sum_exp))
    return log_prob, entropy
