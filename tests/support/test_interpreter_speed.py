"""What the tests' interpreter makes once is what Triton's makes each time."""

import pytest
import triton
import triton.language as tl

from tests.support import interpreter_speed as quick

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="compiled kernels are left as they are")

DTYPES = (tl.int1, tl.uint8, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64, tl.pointer_type(tl.float32))
SHAPES = ([1], [128], [tl.constexpr(4), 8], tl.core.tuple([tl.constexpr(2), tl.constexpr(2)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_types(dtype, shape):
    own = object.__new__(tl.block_type)
    quick.make_block_type(own, dtype, shape)
    # The second is one that was made before.
    for made in (tl.block_type(dtype, shape), tl.block_type(dtype, shape)):
        assert made == own and made.numel == own.numel and made.name == own.name and made.scalar is dtype
        assert quick.numpy_dtype_once(made) == quick.numpy_dtype(made) == quick.numpy_dtype_once(dtype)
        slow, fast = object.__new__(tl.tensor), tl.tensor(None, made)
        quick.make_tensor(slow, None, made)
        assert fast.shape == slow.shape and fast.numel == slow.numel and fast.dtype == slow.dtype and fast.type is made


def test_a_type_that_is_changed_afterwards_changes_no_other():
    tl.block_type(tl.int32, [64]).name = "another"
    assert tl.block_type(tl.int32, [64]).name != "another"


@pytest.mark.parametrize("shape", [[], [3], [2.5]], ids=str)
def test_what_is_no_shape_is_refused_each_time(shape):
    tl.block_type(tl.float32, [2])
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            tl.block_type(tl.float32, shape)
