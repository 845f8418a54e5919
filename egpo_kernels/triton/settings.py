"""Settings as a kernel sees them: one small tensor, so that no value recompiles a kernel and float64 stays exact."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from egpo_kernels.types import PolicyLossConfig, Rows


class Settings(NamedTuple):
    """The numbers of a policy loss, in the order they lie in the settings tensor; where the
    log-ratio is trimmed, ``ratio_low`` and ``ratio_high`` are bounds of that.
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


class Choices(NamedTuple):
    """What of a policy loss is known when a kernel is compiled, beside its surrogate."""

    kl: Any
    kl_times_ratio: Any
    trims: Any


@functools.lru_cache(maxsize=256)
def choices_of(config: PolicyLossConfig) -> Choices:
    """Choices as a kernel argument, made once for each config."""
    values = (config.kl, config.kl_times_ratio, config.trims)
    return Choices(*(tl.constexpr(value) for value in values))


class RowPointers(NamedTuple):
    """`egpo_kernels.types.Rows` inside a kernel: a pointer per field, None (at compile time) where absent."""

    mask_ptr: Any
    tokens_ptr: Any
    temperature_ptr: Any
    advantages_ptr: Any
    factor_ptr: Any
    old_log_probs_ptr: Any
    ref_log_probs_ptr: Any
    rollout_weights_ptr: Any


def row_pointers(rows: Rows) -> RowPointers:
    """Row tensors as kernel arguments: contiguous, the mask as bytes."""
    dense = [None if field is None else field.contiguous() for field in rows]
    return RowPointers(rows.mask.contiguous().view(torch.uint8), *dense[1:])


@functools.lru_cache(maxsize=256)
def settings_tensor(
    config: PolicyLossConfig, temperature: float, grad_scale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Put the numbers of ``config`` on ``device``, once for each set of values."""
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
    return on_device(values, dtype, device)


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as a tensor on ``device``, copied without blocking."""
    made = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


@triton.jit
def load_settings(settings_ptr):
    """Read the settings tensor; every program reads the same few bytes, which stay in cache."""
    return Settings(
        tl.load(settings_ptr),
        tl.load(settings_ptr + 1),
        tl.load(settings_ptr + 2),
        tl.load(settings_ptr + 3),
        tl.load(settings_ptr + 4),
        tl.load(settings_ptr + 5),
        tl.load(settings_ptr + 6),
        tl.load(settings_ptr + 7),
        tl.load(settings_ptr + 8),
        tl.load(settings_ptr + 9),
        tl.load(settings_ptr + 10),
    )
