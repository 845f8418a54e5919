"""Groups met by blocks of sequences: sizes, sums and extremes, without a sort or an atomic, ids in any order.

All members of a group add the same numbers in the same order, so they hold bitwise the same statistics.
"""

from collections import namedtuple

import triton
import triton.language as tl

from egpo_kernels.triton.arithmetic import divide
from egpo_kernels.triton.settings import read_number

NO_SEQUENCE = tl.constexpr(2**31 - 1)
NO_REWARD = tl.constexpr(float("inf"))

# The numbers of the group level, in the order of the argument.
Settings = namedtuple(
    "Settings",
    "correct_threshold collapsed std_eps nsr_scale uncertainty_eps weight_low weight_high"
    " positive_scale negative_scale",
)
# Sequences [S], in and out; correct_ptr may be None, counts_ptr is without tokens, batch_ptr without a batch's scale.
Pointers = namedtuple(
    "Pointers",
    "ids_ptr rewards_ptr correct_ptr uncertainty_ptr counts_ptr batch_ptr advantages_ptr weights_ptr base_ptr",
)
# A block of sequences; reward is 0 where not usable, uncertainty 0 where not known.
Sequences = namedtuple("Sequences", "offs valid ids reward usable correct uncertainty known")
# A group: first member, member counts, sum and extremes of usable rewards, sum of known uncertainties.
Group = namedtuple("Group", "first size usable correct known reward high low uncertainty")


@triton.jit
def read_settings(numbers, DTYPE: tl.constexpr):
    """Settings from the numbers of the group level as a kernel argument."""
    return Settings(
        read_number(numbers, 0, DTYPE), read_number(numbers, 1, DTYPE), read_number(numbers, 2, DTYPE),
        read_number(numbers, 3, DTYPE), read_number(numbers, 4, DTYPE), read_number(numbers, 5, DTYPE),
        read_number(numbers, 6, DTYPE), read_number(numbers, 7, DTYPE), read_number(numbers, 8, DTYPE),
    )  # fmt: skip


@triton.jit
def load_ids(pointers, offs, num_sequences, members):
    """Group ids of a block of sequences; without any so many ``members`` in a row are a group."""
    if pointers.ids_ptr is None:
        return offs // members
    else:
        return tl.load(pointers.ids_ptr + offs, mask=offs < num_sequences, other=0)


@triton.jit
def load_sequences(pointers, offs, num_sequences, members, settings):
    """Read a block of sequences; those past the end are not valid, usable, correct or known."""
    valid = offs < num_sequences
    reward = tl.load(pointers.rewards_ptr + offs, mask=valid, other=float("nan"))
    usable = tl.abs(reward) < float("inf")
    if pointers.correct_ptr is None:
        correct = reward > settings.correct_threshold
    else:
        correct = tl.load(pointers.correct_ptr + offs, mask=valid, other=0) != 0
    if pointers.uncertainty_ptr is None:
        uncertainty = reward * 0.0 + float("nan")
    else:
        uncertainty = tl.load(pointers.uncertainty_ptr + offs, mask=valid, other=float("nan"))
    known = uncertainty == uncertainty
    # Last: a quotient made before takes registers that the rest needs.
    ids = load_ids(pointers, offs, num_sequences, members)
    reward, uncertainty = tl.where(usable, reward, 0.0), tl.where(known, uncertainty, 0.0)
    return Sequences(offs, valid, ids, reward, usable, correct, uncertainty, known)


@triton.jit
def number(flags):
    """How many flags are set in each row."""
    return tl.sum(flags.to(tl.int32), axis=1)


@triton.jit
def meet(pointers, ids, first, num_sequences, members, settings, BLOCK_J: tl.constexpr):
    """Return sequences from ``first`` on, which pairs ``[ids, others]`` share a group, whether any does."""
    others = load_sequences(pointers, first + tl.arange(0, BLOCK_J), num_sequences, members, settings)
    same = (ids[:, None] == others.ids[None, :]) & others.valid[None, :]
    return others, same, tl.sum(number(same), axis=0) > 0


@triton.jit
def joined(group, same, others):
    """Return each group with those of ``others`` added that are the ``same`` group."""
    usable = same & others.usable[None, :]
    reward = others.reward[None, :]
    high = tl.max(tl.where(usable, reward, -NO_REWARD), axis=1)
    low = tl.min(tl.where(usable, reward, NO_REWARD), axis=1)
    return Group(
        first=tl.minimum(group.first, tl.min(tl.where(same, others.offs[None, :], NO_SEQUENCE), axis=1)),
        size=group.size + number(same),
        usable=group.usable + number(usable),
        correct=group.correct + number(usable & others.correct[None, :]),
        known=group.known + number(same & others.known[None, :]),
        reward=group.reward + tl.sum(tl.where(usable, reward, 0.0), axis=1),
        high=tl.maximum(group.high, high),
        low=tl.minimum(group.low, low),
        uncertainty=group.uncertainty + tl.sum(tl.where(same, others.uncertainty[None, :], 0.0), axis=1),
    )


@triton.jit
def gather_groups(pointers, ids, num_sequences, members, settings, BLOCK_J: tl.constexpr):
    """First round of meetings: everything that needs no mean."""
    none, zero = tl.zeros(ids.shape, tl.int32), tl.zeros(ids.shape, pointers.rewards_ptr.dtype.element_ty)
    group = Group(none + NO_SEQUENCE, none, none, none, none, zero, zero - NO_REWARD, zero + NO_REWARD, zero)
    for first in range(0, num_sequences, BLOCK_J):
        others, same, any_same = meet(pointers, ids, first, num_sequences, members, settings, BLOCK_J)
        # Most blocks hold no sequence of these groups; adding nothing would change no bit.
        if any_same:
            group = joined(group, same, others)
    return group


@triton.jit
def means(group):
    """Mean reward and mean uncertainty of each group."""
    dtype = group.reward.dtype
    reward = divide(group.reward, tl.maximum(group.usable, 1).to(dtype))
    return reward, divide(group.uncertainty, tl.maximum(group.known, 1).to(dtype))
