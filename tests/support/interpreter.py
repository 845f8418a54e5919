"""The Triton interpreter, mended where it differs from every GPU: bfloat16 rounds to nearest even, not towards zero.

Its arithmetic is exact where NVIDIA's is not; `hardware_arithmetic` lets it err as far as that may.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_original = interpreter._convert_float


def _convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Convert between float32 and bfloat16 (held as uint16 by the interpreter) as the hardware does."""
    if (source, target) == (tl.float32, tl.bfloat16):
        values = torch.from_numpy(np.ascontiguousarray(data.view(np.float32)))
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    if (source, target) == (tl.bfloat16, tl.float32):
        values = torch.from_numpy(np.ascontiguousarray(data.view(np.int16))).view(torch.bfloat16)
        return values.float().view(torch.int32).numpy().view(np.uint32).reshape(data.shape)
    return _original(data, source, target, rounding_mode)


def round_bfloat16_to_nearest() -> None:
    """Replace the interpreter's conversion."""
    interpreter._convert_float = _convert_float


LOG2_E = np.float32(1.4426950408889634)


def _coin(*operands: np.ndarray) -> np.ndarray:
    """+1 or -1 for each element, from the bits of its operands."""
    mixed = np.uint64(0x9E3779B97F4A7C15)
    for operand in np.broadcast_arrays(*operands):
        bits = np.ascontiguousarray(operand).view(f"u{operand.itemsize}").astype(np.uint64)
        mixed = (mixed ^ bits) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = mixed ^ (mixed >> np.uint64(29))
    return np.where(mixed & np.uint64(1), 1.0, -1.0)


def _flushed(values: np.ndarray) -> np.ndarray:
    """Subnormal numbers as 0, as `.ftz` has them."""
    return np.where(np.abs(values) < np.finfo(values.dtype).tiny, np.copysign(values.dtype.type(0), values), values)


def _off_by(units: float, exact: Callable[..., np.ndarray], *operands: np.ndarray) -> np.ndarray:
    """`exact` of the operands, wrong by `units` in the last place; zero, infinity and NaN are right."""
    dtype = operands[-1].dtype
    wide = np.longdouble if dtype == np.float64 else np.float64
    value = np.asarray(exact(*(operand.astype(wide) for operand in operands)))
    rounded = value.astype(dtype)
    # Rounding adds the other half of a unit.
    moved = (value + _coin(*operands) * (units - 0.5) * np.spacing(np.abs(rounded)).astype(wide)).astype(dtype)
    return np.where(np.isfinite(rounded) & (rounded != 0), moved, rounded)


@np.errstate(all="ignore")
def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _off_by(2, np.divide, x, y) if y.dtype == np.float32 else np.divide(x, y)  # div.full.f32, div.rn.f64


@np.errstate(all="ignore")
def _square_root(x: np.ndarray) -> np.ndarray:
    return _off_by(1, np.sqrt, _flushed(x)) if x.dtype == np.float32 else np.sqrt(x)  # sqrt.approx.ftz, sqrt.rn.f64


@np.errstate(all="ignore")
def _exp2(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.float32:
        return _flushed(_power(2, np.exp2, _flushed(x)))  # ex2.approx.ftz.f32
    return _power(1, np.exp2, x)


@np.errstate(all="ignore")
def _exp(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.float32:
        return _power(2, np.exp2, x * LOG2_E)  # mul.f32, ex2.approx.f32
    return _power(1, np.exp, x)


def _power(units: float, exact: Callable[..., np.ndarray], x: np.ndarray) -> np.ndarray:
    """A power, off by `units`, but not that to 0."""
    return np.where(x == 0, x.dtype.type(1), _off_by(units, exact, x))


@np.errstate(all="ignore")
def _log(x: np.ndarray) -> np.ndarray:
    return _off_by(1, np.log, x)  # a polynomial of libdevice


@np.errstate(all="ignore")
def _log2(x: np.ndarray) -> np.ndarray:
    return _off_by(1, np.log2, x)


def _unary(function: Callable) -> Callable:
    return lambda self, arg: self.unary_op(arg, function)


@contextlib.contextmanager
def hardware_arithmetic() -> Iterator[None]:
    """Inside, what Triton compiles to an approximation on NVIDIA (read from its PTX) errs by all that it may.

    The bounds are those of the CUDA programming guide and the PTX manual; the sign of an error hangs on the operands.
    Correctly rounded division and square root stay exact.
    """
    made = {
        "create_fdiv": lambda self, lhs, rhs: self.binary_op(lhs, rhs, _divide),
        "create_sqrt": _unary(_square_root),
        "create_exp": _unary(_exp),
        "create_exp2": _unary(_exp2),
        "create_log": _unary(_log),
        "create_log2": _unary(_log2),
    }
    with mock.patch.multiple(interpreter.InterpreterBuilder, **made):
        yield
