"""Device functions over one row of logits: its gradient from its statistics, where the row was read a moment ago."""

import triton
import triton.language as tl

from egpo_kernels.triton.arithmetic import LOG2_E, divide
from egpo_kernels.triton.softmax import LN_2, LOWEST
from egpo_kernels.triton.strips import first_access, load_block, outer_places, store_block, whole_accesses


@triton.jit
def gradient_of(z, maximum, scale, level, tilt, TILTED: tl.constexpr):
    """``2^x (level + tilt x)``: the gradient away from the token, level and tilt already divided by sum_exp."""
    x = (z - maximum) * scale
    e = tl.exp2(x)
    if TILTED:
        return e * (level + tilt * tl.maximum(x, LOWEST))
    return e * level


@triton.jit
def levels(found, entropy, slope, bonus, inverse_temperature, TILTED: tl.constexpr):
    """Level and tilt of a row from slope = dL/dl and bonus = dL/dEnt.

    ``dz = (slope (onehot - p) - bonus p (log p + Ent)) / temperature`` with ``log p = x ln 2 - log sum_exp``.
    """
    share = divide(inverse_temperature, found.sum_exp)
    level = -slope * share
    tilt = level * 0.0
    if TILTED:
        level -= bonus * (entropy - tl.log(found.sum_exp)) * share
        tilt = -bonus * LN_2 * share
    return level, tilt


@triton.jit
def sweep_gradient(
    row_ptr, out_ptr, extent, token, logit, found, entropy, slope, bonus, inverse_temperature, launch,
    DTYPE: tl.constexpr, TILTED: tl.constexpr,
):  # fmt: skip
    """Write dz of a row; ``out_ptr`` may be ``row_ptr``. Backwards: what was read last is in the cache first."""
    scale = LOG2_E * inverse_temperature
    level, tilt = levels(found, entropy, slope, bonus, inverse_temperature, TILTED)
    first, start_ptr = first_access(row_ptr, launch)
    target_ptr = out_ptr + first
    if launch.odd and launch.agrees:
        target_ptr = tl.multiple_of(target_ptr, 16)
    whole = whole_accesses(first, extent.vocab, launch)
    strips: tl.constexpr = launch.gradient_strips
    vectors: tl.constexpr = launch.odd or launch.aligned
    block: tl.constexpr = strips * launch.threads * launch.width
    full = whole // block * block
    if full < whole:
        z = load_block(start_ptr + full, whole - full, launch, DTYPE, strips, vectors, "evict_first")
        dz = gradient_of(z, found.maximum, scale, level, tilt, TILTED)
        store_block(target_ptr + full, dz, whole - full, launch, strips)
    for back in range(0, full, block):
        # Down to 0 by its distance from the end: a range that runs downwards hides that it is a multiple of 16.
        start = full - block - back
        z = load_block(start_ptr + start, None, launch, DTYPE, strips, vectors, "evict_first")
        dz = gradient_of(z, found.maximum, scale, level, tilt, TILTED)
        store_block(target_ptr + start, dz, None, launch, strips)
    if launch.odd:
        offs, inside = outer_places(first, whole, extent.vocab, launch)
        z = tl.load(row_ptr + offs, mask=inside, other=float("-inf")).to(DTYPE)
        dz = gradient_of(z, found.maximum, scale, level, tilt, TILTED)
        tl.store(out_ptr + offs, dz.to(out_ptr.dtype.element_ty), mask=inside)
    write_token(
        out_ptr, extent.vocab, token, logit, found.maximum, scale, level, tilt, slope * inverse_temperature, TILTED
    )


@triton.jit
def write_token(out_ptr, vocab, token, logit, maximum, scale, level, tilt, own_slope, TILTED: tl.constexpr):
    """Write dz of a row's token, in the vocabulary or not, over what the sweep wrote there."""
    own = gradient_of(logit, maximum, scale, level, tilt, TILTED) + own_slope
    # Another thread may have written the token's place: order the two stores.
    tl.debug_barrier()
    inside = (token >= 0) & (token < vocab)
    tl.store(out_ptr + tl.where(inside, token, 0), own.to(out_ptr.dtype.element_ty), mask=inside)
