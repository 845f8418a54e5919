"""The kernel that keeps rows in shared memory, switched on: no rule of `egpo_kernels.triton.launch` does that yet."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from egpo_kernels.triton import launch
from egpo_kernels.triton.launch import Ring

# 13 slots of 16 KiB, of the 227 KiB that a program may have on sm_90: a row of bfloat16 of up to 212,992.
HOPPER = Ring(num_warps=8, strips=4, slots=13)


@contextlib.contextmanager
def switched_on(ring: Ring | None = HOPPER) -> Iterator[None]:
    """Every rule has this ring, or none."""
    rules = tuple(rule._replace(constants=rule.constants._replace(ring=ring)) for rule in launch.TABLE)
    with mock.patch.object(launch, "TABLE", rules):
        yield
