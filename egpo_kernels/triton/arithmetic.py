"""Arithmetic that rounds alike on every target, for what is computed once a row, a token or a group.

Compiled for NVIDIA, ``/``, ``tl.sqrt`` and ``tl.exp`` of float32 are approximations: ``div.full`` (2 units in the last
place), ``sqrt.approx``, and ``ex2.approx`` of a rounded ``x log2(e)``, whose error grows with x. ``tl.log`` is not: it
is a polynomial, right to a unit. In float64 all of them are exact enough already.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts; whole numbers to +-151 times the first are exact.
LN_2_HIGH = tl.constexpr(0.693359375)
LN_2_LOW = tl.constexpr(-2.1219444005469057e-4)
# e to these is 0 and inf in float32.
LOWEST = tl.constexpr(-104.0)
HIGHEST = tl.constexpr(89.0)
SMALLEST_EXPONENT = tl.constexpr(-126)
EXPONENT_BIAS = tl.constexpr(127)
FRACTION_BITS = tl.constexpr(23)
# Where the result is subnormal its exponent is lifted by the first, and the result multiplied by the second.
LIFT = tl.constexpr(64)
DROP = tl.constexpr(2.0**-64)


@triton.jit
def divide(x, y):
    """``x / y``, correctly rounded; ``y`` decides the dtype, ``x`` may be a number."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """Square root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def power_of_two(exponent):
    """2 to ``exponent`` (int32) in float32, -126 to 127; 128 gives inf."""
    return ((exponent + EXPONENT_BIAS) << FRACTION_BITS).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """``e^x`` within 3 units in the last place however large ``x`` is; exactly 1 at 0, with subnormals, inf and NaN.

    ``x = n ln 2 + rest``: only ``rest``, less than ln 2, goes through the hardware's power of two.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        bounded = tl.minimum(tl.maximum(x, LOWEST), HIGHEST)
        whole = tl.floor(bounded * LOG2_E)
        rest = (bounded - whole * LN_2_HIGH) - whole * LN_2_LOW
        exponent = whole.to(tl.int32)
        subnormal = exponent < SMALLEST_EXPONENT
        result = tl.exp2(rest * LOG2_E) * power_of_two(tl.where(subnormal, exponent + LIFT, exponent))
        result = tl.where(subnormal, result * DROP, result)
        # On a GPU minimum and maximum drop NaN.
        return tl.where(x == x, result, x)
