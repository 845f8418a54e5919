"""Settings as a kernel sees them: arguments by value, so that nothing lies on a device for another stream or a graph to
find unwritten or gone; no value recompiles a kernel, and float64 stays exact.
"""

import functools
import json
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig


class Settings(NamedTuple):
    """The numbers of a policy loss, in the order of the argument; where the log-ratio is trimmed, ``ratio_low`` and
    ``ratio_high`` are bounds of that.
    """

    ratio_low: Any
    ratio_high: Any
    dual_clip: Any
    tau_positive: Any
    tau_negative: Any
    max_log_ratio: Any
    kl_coef: Any
    kl_max: Any
    entropy_coef: Any
    inverse_temperature: Any
    grad_scale: Any


class Temperature(NamedTuple):
    """What log-probs need of `Settings`."""

    inverse_temperature: Any


class Choices(NamedTuple):
    """What of a policy loss is known when a kernel is compiled, beside its surrogate."""

    kl: Any
    kl_times_ratio: Any
    trims: Any


def choices_of(config: PolicyLossConfig) -> Choices:
    """Choices as a kernel argument."""
    return Choices(config.kl, config.kl_times_ratio, config.trims)


class RowPointers(NamedTuple):
    """`egpo_kernels.config.results.Rows` inside a kernel: a pointer per field, None (at compile time) where absent."""

    mask_ptr: Any
    tokens_ptr: Any
    temperature_ptr: Any
    advantages_ptr: Any
    factor_ptr: Any
    old_log_probs_ptr: Any
    ref_log_probs_ptr: Any
    rollout_weights_ptr: Any


def dense(tensor: Tensor | None) -> Tensor | None:
    """A contiguous tensor, as kernels without strides read it."""
    return None if tensor is None else tensor.contiguous()


def blocks_of(count: int, size: int) -> int:
    """How many blocks of a size hold so many; as `triton.cdiv`, which is slow on the host."""
    return -(-count // size)


def row_pointers(rows: Rows) -> RowPointers:
    """Row tensors as kernel arguments."""
    return RowPointers(*[None if each is None else each.contiguous() for each in rows])


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """What kernels compute in for ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def as_arguments(values: Iterable[float], dtype: torch.dtype) -> tuple[float, ...]:
    """Numbers as a kernel argument: one float each, or three for ``dtype`` float64, which `read_number` puts together.

    Triton passes floats by value, as float32, and compiles no kernel anew for another value. The bits of a float64
    travel as whole numbers of 21 or 22 bits, which float32 holds.
    """
    if dtype != torch.float64:
        return tuple([float(value) for value in values])
    words = (struct.unpack("<q", struct.pack("<d", value))[0] for value in values)
    return tuple(float(part) for word in words for part in (word >> 42, word >> 21 & 0x1FFFFF, word & 0x1FFFFF))


def settings_of(
    config: PolicyLossConfig, temperature: float, grad_scale: float, dtype: torch.dtype
) -> tuple[float, ...]:
    """The numbers of ``config`` as a kernel argument for `read_settings`."""
    # By its JSON, which is quicker to look up than all its fields.
    return _settings_of(config.json, temperature, grad_scale, dtype)


@functools.lru_cache(maxsize=256)
def _settings_of(text: str, temperature: float, grad_scale: float, dtype: torch.dtype) -> tuple[float, ...]:
    config = PolicyLossConfig.from_dict(json.loads(text))
    inf, one = float("inf"), 0 if config.trims else 1
    values = Settings(
        ratio_low=one - config.clip_low,
        ratio_high=one + config.clip_high if config.ratio_cap is None else config.ratio_cap,
        dual_clip=inf if config.dual_clip is None else config.dual_clip,
        tau_positive=config.tau_positive,
        tau_negative=config.tau_negative,
        max_log_ratio=config.max_log_ratio,
        kl_coef=config.kl_coef,
        kl_max=inf if config.kl_max is None else config.kl_max,
        entropy_coef=config.entropy_coef,
        inverse_temperature=1 / temperature,
        grad_scale=grad_scale,
    )
    return as_arguments(values, dtype)


def temperature_of(temperature: float, dtype: torch.dtype) -> tuple[float, ...]:
    """What log-probs need of `settings_of`, as a kernel argument for `read_temperature`."""
    return as_arguments([1 / temperature], dtype)


@triton.jit
def read_number(numbers, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """One of the numbers that `as_arguments` made, to the last bit of ``DTYPE``."""
    if DTYPE == tl.float64:
        # By way of int32, which is one instruction.
        high = tl.cast(tl.cast(numbers[3 * PLACE], tl.int32), tl.int64) << 42
        middle = tl.cast(tl.cast(numbers[3 * PLACE + 1], tl.int32), tl.int64) << 21
        low = tl.cast(tl.cast(numbers[3 * PLACE + 2], tl.int32), tl.int64)
        return tl.cast(high | middle | low, tl.float64, bitcast=True)
    else:
        return tl.cast(numbers[PLACE], tl.float32)


@triton.jit
def read_settings(numbers, DTYPE: tl.constexpr):
    """Settings from the argument that `settings_of` made for ``DTYPE``."""
    return Settings(
        read_number(numbers, 0, DTYPE),
        read_number(numbers, 1, DTYPE),
        read_number(numbers, 2, DTYPE),
        read_number(numbers, 3, DTYPE),
        read_number(numbers, 4, DTYPE),
        read_number(numbers, 5, DTYPE),
        read_number(numbers, 6, DTYPE),
        read_number(numbers, 7, DTYPE),
        read_number(numbers, 8, DTYPE),
        read_number(numbers, 9, DTYPE),
        read_number(numbers, 10, DTYPE),
    )


@triton.jit
def read_temperature(numbers, DTYPE: tl.constexpr):
    """Inverse temperature from the argument that `temperature_of` made for ``DTYPE``."""
    return Temperature(read_number(numbers, 0, DTYPE))
