"""Division, square root and exponential of `triton.arithmetic`: in the interpreter, as hardware may err, on a GPU."""

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
import triton
import triton.language as tl

from egpo_kernels.triton.arithmetic import divide, exponential, square_root
from tests.support.accuracy import assert_bits
from tests.support.device import DEVICE, ON_GPU
from tests.support.interpreter import hardware_arithmetic

pytestmark = pytest.mark.gpu

BLOCK = 8192
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 88.72, 88.73, -87.4, -103.0, -104.0, 1e30, -1e30, 1e-40]


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, divide(x, y))
    tl.store(out_ptr + BLOCK + offs, square_root(x))
    tl.store(out_ptr + 2 * BLOCK + offs, exponential(y))
    # A number over a single value.
    tl.store(out_ptr + 3 * BLOCK, divide(1.0, tl.load(y_ptr)))


@triton.jit
def plain_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x / y)
    tl.store(out_ptr + BLOCK + offs, tl.sqrt(x))
    tl.store(out_ptr + 2 * BLOCK + offs, tl.exp(y))


@pytest.fixture(params=["exact", pytest.param("hardware", marks=pytest.mark.skipif(ON_GPU, reason="has its own"))])
def arithmetic(request):
    """In the interpreter both its own arithmetic and what hardware may make of it."""
    if request.param == "exact":
        yield
    else:
        with hardware_arithmetic():
            yield


def computed(kernel, dtype):
    """x, y and what the kernel makes of them: quotients, roots, exponentials."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BLOCK, generator=generator, dtype=torch.float64).exp().to(dtype).to(DEVICE)
    y = 200 * torch.rand(BLOCK, generator=generator, dtype=torch.float64) - 105
    y[1 : 1 + BLOCK // 4] *= 1e-3
    y[-len(SPECIAL) :] = torch.tensor(SPECIAL, dtype=torch.float64)
    y = y.to(dtype).to(DEVICE)
    out = torch.zeros(4, BLOCK, dtype=dtype, device=DEVICE)
    kernel[(1,)](x, y, out, BLOCK)
    return x, y, out


def units(found, exact):
    """Distances in units of the last place of what should have been found; none where it is no finite number."""
    rounded = exact.to(found.dtype)
    finite = rounded.isfinite()
    assert_bits(found[~finite], rounded[~finite], "special values")
    info = torch.finfo(found.dtype)
    _, exponent = torch.frexp(rounded)
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1).clamp(min=info.smallest_normal * info.eps)
    return torch.where(finite, (found.double() - exact).abs() / unit, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_quotients_and_roots_are_correctly_rounded(arithmetic, dtype):
    x, y, (quotients, roots, _, single) = computed(arithmetic_kernel, dtype)
    assert_bits(quotients, x / y, "quotients")
    # numpy's, which rounds correctly; torch's need not in float64.
    assert_bits(roots, torch.from_numpy(np.sqrt(x.cpu().numpy())).to(DEVICE), "roots")
    assert_bits(single[0], 1 / y[0], "a number over a scalar")


def test_exponentials_are_right_however_large_the_exponent(arithmetic):
    _, y, out = computed(arithmetic_kernel, torch.float32)
    assert units(out[2], y.double().exp()).max() <= 3
    assert (out[2][y == 0] == 1).all()


@pytest.mark.cpu
@pytest.mark.skipif(ON_GPU, reason="the hardware has its own")
def test_hardware_errs_by_what_it_may():
    """Else nothing would be witnessed: each approximation is off by all of its bound, and more for the exponential."""
    with hardware_arithmetic():
        x, y, (quotients, roots, powers, _) = computed(plain_kernel, torch.float32)
    for found, exact, bound in ((quotients, x.double() / y.double(), 2), (roots, x.double().sqrt(), 1)):
        assert bound / 2 <= units(found, exact).max() <= bound
    assert units(powers, y.double().exp()).max() > 40
    x, y, (quotients, _, _, _) = computed(plain_kernel, torch.float32)
    assert_bits(quotients, x / y, "afterwards")
