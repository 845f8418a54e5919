"""How many logits an H200 can take each clock: what its instruction issue, its exponentials and its memory allow; and
how many programs of a kernel a multiprocessor holds.

The numbers below are the only hardware figures that the counts use.
"""

from typing import NamedTuple

# NVIDIA H200 (SXM): multiprocessors and boost clock. The data sheet promises 4.8 TB/s, of which a large copy is taken
# to reach 4.3: a working figure until it is measured.
PROCESSORS = 132
CLOCK = 1.98e9
BANDWIDTH = 4.3e12

# A multiprocessor issues four warps of 32 lanes a clock and finishes 16 special-function operations.
LANES = 128
SPECIAL_LANES = 16


# What programs share (NVIDIA's tables for compute capability 9.0): warps, registers, shared memory, of which each
# program takes one KiB more than it asks for.
WARPS = 64
REGISTERS = 65536
REGISTER_UNIT = 8
SHARED = 228 << 10
RESERVED = 1 << 10


class Ceilings(NamedTuple):
    """Elements a clock and multiprocessor; the lowest of them is what limits a kernel."""

    issue: float
    special: float
    bandwidth: float


def ceilings(instructions: float, special: float, moved_bytes: float) -> Ceilings:
    """From instructions, special-function operations and bytes of memory traffic an element."""
    return Ceilings(LANES / instructions, SPECIAL_LANES / special, BANDWIDTH / (PROCESSORS * CLOCK * moved_bytes))


def resident(registers: int, warps: int, shared: int) -> int:
    """Programs that fit on a multiprocessor at a time, from registers a thread, warps and bytes of shared memory."""
    rounded = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(WARPS // warps, REGISTERS // (rounded * 32 * warps), SHARED // (shared + RESERVED))
