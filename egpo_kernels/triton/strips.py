"""Rows taken 16 bytes a thread at a time: a strip is one access of every thread, a block some strips.

A block is ``[strips, threads, width]``, loaded as ``[strips * threads, width]``: so each thread has the ``width``
neighbours of every strip, and reductions over the first and the last axis stay inside it.
"""

import triton
import triton.language as tl

# Two bfloat16 -inf.
TWO_NOTHINGS = tl.constexpr(-8323200)


@triton.jit
def lead(row_ptr):
    """Elements of a row before the first that starts an access."""
    address = row_ptr.to(tl.int64)
    return (((16 - (address & 15)) & 15) // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)).to(tl.int32)


@triton.jit
def first_access(row_ptr, launch):
    """How many elements of a row lie before the first whole access, and the pointer there."""
    if launch.odd:
        first = lead(row_ptr)
        return first, tl.multiple_of(row_ptr + first, 16)
    else:
        return 0, row_ptr


@triton.jit
def strip_offsets(launch, STRIPS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets ``[STRIPS * threads, WIDTH]`` of a block's elements, ``WIDTH`` of them to an access."""
    strip = tl.arange(0, STRIPS)[:, None] * (launch.threads * WIDTH)
    access = tl.reshape(strip + tl.arange(0, launch.threads)[None, :] * WIDTH, (STRIPS * launch.threads,))
    return tl.multiple_of(access, WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def block_places(launch, STRIPS: tl.constexpr):
    """Offsets of a block's elements in the shape of a block."""
    threads: tl.constexpr = launch.threads
    width: tl.constexpr = launch.width
    return tl.reshape(strip_offsets(launch, STRIPS, width), (STRIPS, threads, width))


@triton.jit
def load_block(
    ptr, limit, launch, DTYPE: tl.constexpr, STRIPS: tl.constexpr, ALIGNED: tl.constexpr, EVICT: tl.constexpr
):
    """A block ``[STRIPS, threads, width]`` from ``ptr`` on; accesses that pass ``limit`` (None: none does) give -inf.

    Bfloat16 is loaded as words of two and taken apart by one instruction a number, where the compiler needs two.
    """
    threads: tl.constexpr = launch.threads
    width: tl.constexpr = launch.width
    whole = None
    if limit is not None:
        whole = (tl.arange(0, STRIPS * threads) * width + width <= limit)[:, None]
    if ALIGNED and ptr.dtype.element_ty == tl.bfloat16:
        words_ptr = ptr.to(tl.pointer_type(tl.int32)) + strip_offsets(launch, STRIPS, width // 2)
        other: tl.constexpr = None if limit is None else TWO_NOTHINGS
        words = tl.load(words_ptr, mask=whole, other=other, eviction_policy=EVICT)
        low, high = words << 16, words & -65536
        z = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    else:
        nothing: tl.constexpr = None if limit is None else float("-inf")
        z = tl.load(ptr + strip_offsets(launch, STRIPS, width), mask=whole, other=nothing, eviction_policy=EVICT)
        z = z.to(DTYPE)
    return tl.reshape(z, (STRIPS, threads, width))


@triton.jit
def store_block(ptr, values, limit, launch, STRIPS: tl.constexpr):
    """Store a block from ``ptr`` on, but for accesses that pass ``limit`` (None: none does)."""
    threads: tl.constexpr = launch.threads
    width: tl.constexpr = launch.width
    flat = tl.reshape(values.to(ptr.dtype.element_ty), (STRIPS * threads, width))
    whole = None
    if limit is not None:
        whole = (tl.arange(0, STRIPS * threads) * width + width <= limit)[:, None]
    tl.store(ptr + strip_offsets(launch, STRIPS, width), flat, mask=whole, eviction_policy="evict_first")


@triton.jit
def outer_places(first, whole, vocab, launch):
    """Elements of an odd row before its first whole access and behind its last, and which lanes hold one."""
    lane = tl.arange(0, 2 * launch.width)
    offs = tl.where(lane < launch.width, lane, first + whole + lane - launch.width)
    return offs, tl.where(lane < launch.width, lane < tl.minimum(first, vocab), offs < vocab)


@triton.jit
def whole_accesses(first, vocab, launch):
    """Elements of a row in whole accesses."""
    if launch.odd:
        return tl.maximum(vocab - first, 0) // launch.width * launch.width
    else:
        return vocab


@triton.jit
def write_zeros(out_ptr, vocab, launch):
    """Write a row of zeros without reading one."""
    first, start_ptr = first_access(out_ptr, launch)
    whole = whole_accesses(first, vocab, launch)
    strips: tl.constexpr = launch.gradient_strips
    threads: tl.constexpr = launch.threads
    width: tl.constexpr = launch.width
    block: tl.constexpr = strips * threads * width
    zeros = tl.zeros((strips, threads, width), out_ptr.dtype.element_ty)
    full = whole // block * block
    for start in range(0, full, block):
        store_block(start_ptr + start, zeros, None, launch, strips)
    if full < whole:
        store_block(start_ptr + full, zeros, whole - full, launch, strips)
    if launch.odd:
        offs, inside = outer_places(first, whole, vocab, launch)
        tl.store(out_ptr + offs, tl.zeros_like(offs).to(out_ptr.dtype.element_ty), mask=inside)
