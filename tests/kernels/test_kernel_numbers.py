"""Numbers that travel to a kernel by value: each arrives as the dtype has it, and every setting in its own place."""

import math
import struct

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
import triton
import triton.language as tl

from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.triton.settings import Settings, as_arguments, read_number, read_settings, settings_of
from tests.support.accuracy import assert_bits
from tests.support.device import DEVICE

pytestmark = pytest.mark.gpu

NUMBERS = (
    0.0,
    -0.0,
    1.0,
    1 / 3,
    -1e-5,
    1 + 2.0**-52,
    math.pi * 2.0**-300,
    -1.7e308,
    5e-324,
    2.0**-126,
    math.inf,
    -math.inf,
)


@triton.jit
def numbers_kernel(numbers, out_ptr, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    for place in tl.static_range(COUNT):
        tl.store(out_ptr + place, read_number(numbers, place, DTYPE))


@triton.jit
def settings_kernel(numbers, out_ptr, DTYPE: tl.constexpr):
    settings = read_settings(numbers, DTYPE)
    for place in tl.static_range(len(settings)):
        tl.store(out_ptr + place, settings[place])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_arrive_to_the_last_bit(dtype):
    rng = np.random.default_rng(0)
    drawn = (rng.normal(size=30) * 10.0 ** rng.integers(-300, 300, 30)).tolist()
    for first in range(0, 30, 10):
        values = (*NUMBERS, *drawn[first : first + 10])
        out = torch.empty(len(values), dtype=dtype, device=DEVICE)
        numbers_kernel[(1,)](as_arguments(values, dtype), out, triton_dtype(dtype), len(values))
        with np.errstate(over="ignore"):
            wanted = np.array(values).astype(np.float32 if dtype == torch.float32 else np.float64)
        assert_bits(out.cpu(), torch.from_numpy(wanted), "numbers")


def test_a_number_is_whole_parts_that_float32_holds():
    """Triton passes an argument as float32, whatever it is for."""
    for value in (*NUMBERS, math.nan):
        for part in as_arguments([value], torch.float64):
            assert struct.unpack("<f", struct.pack("<f", part))[0] == part and part == int(part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_settings_arrive_in_their_places(dtype):
    config = PolicyLossConfig(
        clip_low=0.3, clip_high=0.4, dual_clip=3.0, max_log_ratio=7.0, kl_coef=0.1, kl_max=9.0, entropy_coef=-0.02
    )
    wanted = Settings(
        ratio_low=0.7, ratio_high=1.4, dual_clip=3.0, tau_positive=1.0, tau_negative=1.05, max_log_ratio=7.0,
        kl_coef=0.1, kl_max=9.0, entropy_coef=-0.02, inverse_temperature=1 / 0.8, grad_scale=0.5,
    )  # fmt: skip
    out = torch.empty(len(wanted), dtype=dtype, device=DEVICE)
    settings_kernel[(1,)](settings_of(config, 0.8, 0.5, dtype), out, triton_dtype(dtype))
    assert torch.equal(out.cpu(), torch.tensor(wanted, dtype=dtype))


def triton_dtype(dtype):
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]
