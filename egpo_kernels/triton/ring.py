"""The one-pass kernel for GPUs whose shared memory holds most of a row, in Gluon: a row is read once, or little more.

Blocks of a row pass through a ring of ``slots`` in shared memory, filled by copies that run by themselves. A row has at
least as many blocks as the ring has slots, and at most twice as many. The sweep for statistics drops those at its
beginning, one for each that is ``slots`` further on; the last ``slots`` stay. The sweep for the gradient begins with
these. Each slot it has used takes a dropped block again (which the cache still has), or one of the next row: so memory
is read while gradients are written, and the ring never runs dry.

Every step takes one block and makes one group of copies, be it empty: the block a step takes was asked for ``slots``
groups ago, so that every wait leaves ``slots - 1`` groups under way.

A thread copies into a slot the very bytes that it takes from there.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from egpo_kernels.triton.arithmetic import LOG2_E
from egpo_kernels.triton.logits_policy_loss import row_derivatives
from egpo_kernels.triton.settings import read_settings
from egpo_kernels.triton.softmax import (
    START,
    RowStatistics,
    even_row,
    load_token,
    merge_block,
    row_inverse_temperature,
    row_pointer,
    token_statistics,
)
from egpo_kernels.triton.softmax_gradient import gradient_of, levels, write_token

# Its name from triton 3.9 on, and before.
copy_block = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def block_layout(strips, threads, count):
    """A block ``[strips, threads, count]``, of which every thread holds its accesses of ``count``."""
    return gl.BlockedLayout([strips, 1, count], [1, 32, 1], [1, threads // 32, 1], [2, 1, 0])


@gluon.constexpr_function
def word_of(element):
    """What the ring holds: of bfloat16 words of two, which are taken apart as in `strips.load_block`."""
    return gl.int32 if element == gl.bfloat16 else element


@gluon.constexpr_function
def words_in(width, element):
    """Words in an access."""
    return width // 2 if element == gl.bfloat16 else width


@gluon.jit
def make_ring(launch, ELEMENT: tl.constexpr):
    """Shared memory ``[slots, strips, threads, words]``."""
    plain: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    count: tl.constexpr = words_in(launch.width, ELEMENT)
    return gl.allocate_shared_memory(word_of(ELEMENT), [launch.slots, launch.strips, launch.threads, count], plain)


@gluon.jit
def accesses(block, launch, LAYOUT: tl.constexpr):
    """Which accesses of a row a block has: ``[strips, threads, 1]``."""
    strip = gl.arange(0, launch.strips, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    thread = gl.arange(0, launch.threads, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    access = strip[:, None] * launch.threads + thread[None, :]
    return (access + block * (launch.strips * launch.threads))[:, :, None]


@gluon.jit
def offsets(access, COUNT: tl.constexpr, LAYOUT: tl.constexpr):
    """Where in a row accesses of ``COUNT`` have their elements or words."""
    return access * COUNT + gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]


@gluon.jit
def fill(ring, place, row_ptr, block, wanted, vocab, launch):
    """Ask for a block of a row if it is wanted: one group of copies, maybe an empty one."""
    # A branch, no mask: a masked copy writes zeros, here over a block still to be taken.
    if wanted:
        count: tl.constexpr = words_in(launch.width, row_ptr.dtype.element_ty)
        layout: tl.constexpr = block_layout(launch.strips, launch.threads, count)
        access = accesses(block, launch, layout)
        words_ptr = row_ptr.to(gl.pointer_type(word_of(row_ptr.dtype.element_ty)), bitcast=True)
        source_ptr = words_ptr + offsets(access, count, layout)
        copy_block(ring.index(place % launch.slots), source_ptr, mask=access * launch.width < vocab)
    async_copy.commit_group()


@gluon.jit
def take(ring, place, launch):
    """The block asked for ``slots`` groups ago, as float32 ``[strips, threads, width]``."""
    async_copy.wait_group(launch.slots - 1)
    slot = ring.index(place % launch.slots)
    if slot.dtype == gl.int32:
        words = slot.load(block_layout(launch.strips, launch.threads, launch.width // 2))
        low, high = (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)
        z = gl.reshape(gl.join(low, high), [launch.strips, launch.threads, launch.width])
        return gl.convert_layout(z, block_layout(launch.strips, launch.threads, launch.width), assert_trivial=True)
    else:
        return slot.load(block_layout(launch.strips, launch.threads, launch.width)).to(gl.float32)


@gluon.jit
def put(out_ptr, block, values, vocab, launch):
    """Store a block of a row of the gradient."""
    layout: tl.constexpr = block_layout(launch.strips, launch.threads, launch.width)
    access = accesses(block, launch, layout)
    target_ptr = out_ptr + offsets(access, launch.width, layout)
    inside = access * launch.width < vocab
    gl.store(target_ptr, values.to(out_ptr.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@gluon.jit
def fill_ring(ring, base, row_ptr, counted, vocab, launch):
    """Ask for the beginning of a row, where nothing of it is in the ring."""
    for i in range(0, launch.slots):
        fill(ring, base + i, row_ptr, i, counted, vocab, launch)


@gluon.jit
def number_of_blocks(extent, launch):
    """Blocks of a row, the last of which may be partly filled."""
    block: tl.constexpr = launch.strips * launch.threads * launch.width
    return (extent.vocab + (block - 1)) // block


@gluon.jit
def ring_statistics(ring, base, row_ptr, extent, scale, launch, ENTROPY: tl.constexpr):
    """Statistics of the row whose first block is at ``base``; its last ``slots`` blocks stay in the ring."""
    layout: tl.constexpr = block_layout(launch.strips, launch.threads, launch.width)
    of_thread: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    zeros = gl.full([launch.threads], 0.0, gl.float32, of_thread)
    found = RowStatistics(zeros + START, zeros, zeros)
    blocks = number_of_blocks(extent, launch)
    whole = extent.full // (launch.strips * launch.threads * launch.width)
    for i in range(0, whole):
        z = take(ring, base + i, launch)
        ahead = i + launch.slots
        fill(ring, base + i, row_ptr, ahead, ahead < blocks, extent.vocab, launch)
        found = merge_block(found, z, scale, launch, ENTROPY)
    if launch.end > 0:
        z = take(ring, base + whole, launch)
        z = gl.where(accesses(whole, launch, layout) * launch.width < extent.vocab, z, float("-inf"))
        found = merge_block(found, z, scale, launch, ENTROPY)
    return even_row(found, scale, ENTROPY)


@gluon.jit
def ring_gradient(
    ring, base, row_ptr, next_ptr, next_counted, out_ptr, extent, maximum, scale, level, tilt, launch,
    TILTED: tl.constexpr,
):  # fmt: skip
    """Write dz of a row whose last blocks are in the ring, and ask for the next row; returns where that begins."""
    blocks = number_of_blocks(extent, launch)
    dropped = blocks - launch.slots
    for j in range(0, blocks):
        place = base + dropped + j
        z = take(ring, place, launch)
        again = j < dropped
        source_ptr = tl.multiple_of(gl.where(again, row_ptr, next_ptr), 16)
        fill(ring, place, source_ptr, gl.where(again, j, j - dropped), again | next_counted, extent.vocab, launch)
        dz = gradient_of(z, maximum, scale, level, tilt, TILTED)
        put(out_ptr, gl.where(j < launch.slots, dropped + j, j - launch.slots), dz, extent.vocab, launch)
    return (base + 2 * dropped) % launch.slots


@gluon.jit
def put_zeros(out_ptr, extent, launch):
    """Write a row of zeros."""
    layout: tl.constexpr = block_layout(launch.strips, launch.threads, launch.width)
    zeros = gl.full([launch.strips, launch.threads, launch.width], 0.0, gl.float32, layout)
    for i in range(0, number_of_blocks(extent, launch)):
        put(out_ptr, i, zeros, extent.vocab, launch)


@gluon.jit(do_not_specialize=["length", "out_length", "num_rows"])
def ring_policy_loss_kernel(
    logits, out, rows, log_probs_ptr, entropy_ptr, numbers, choices: gl.constexpr, length, out_length,
    num_rows, extent, launch: gl.constexpr, SURROGATE: gl.constexpr, DTYPE: gl.constexpr, ENTROPY: gl.constexpr,
    TILTED: gl.constexpr,
):  # fmt: skip
    """`logits_policy_loss_kernel` for rows of 16 bits that are whole numbers of accesses and start one."""
    settings = read_settings(numbers, DTYPE)
    ring = make_ring(launch, logits.ptr.dtype.element_ty)
    vocab = extent.vocab
    row = gl.program_id(0)
    base = row * 0
    counted = gl.load(rows.mask_ptr + row) != 0
    row_ptr = row_pointer(logits, row, length, True)
    fill_ring(ring, base, row_ptr, counted, vocab, launch)
    while row < num_rows:
        after = row + gl.num_programs(0)
        next_counted = gl.load(rows.mask_ptr + after, mask=after < num_rows, other=0) != 0
        next_ptr = row_pointer(logits, after, length, True)
        row_ptr = row_pointer(logits, row, length, True)
        out_ptr = row_pointer(out, row, out_length, True)
        if counted:
            inverse_temperature = row_inverse_temperature(rows, row, settings)
            token, logit = load_token(rows, row, row_ptr, vocab, True, DTYPE)
            scale = LOG2_E * inverse_temperature
            found = ring_statistics(ring, base, row_ptr, extent, scale, launch, ENTROPY)
            log_prob, entropy = token_statistics(found, logit, inverse_temperature)
            gl.store(log_probs_ptr + row, log_prob)
            if ENTROPY:
                gl.store(entropy_ptr + row, entropy)
            slope, bonus = row_derivatives(rows, row, log_prob, settings, choices, SURROGATE)
            if (slope != 0) | (bonus != 0):
                level, tilt = levels(found, entropy, slope, bonus, inverse_temperature, TILTED)
                base = ring_gradient(
                    ring, base, row_ptr, next_ptr, next_counted, out_ptr, extent, found.maximum, scale, level, tilt,
                    launch, TILTED,
                )  # fmt: skip
                write_token(
                    out_ptr, vocab, token, logit, found.maximum, scale, level, tilt, slope * inverse_temperature, TILTED
                )
            else:
                fill_ring(ring, base, next_ptr, next_counted, vocab, launch)
                put_zeros(out_ptr, extent, launch)
        else:
            gl.store(log_probs_ptr + row, 0.0)
            if ENTROPY:
                gl.store(entropy_ptr + row, 0.0)
            fill_ring(ring, base, next_ptr, next_counted, vocab, launch)
            put_zeros(out_ptr, extent, launch)
        row, counted = after, next_counted
