"""Launching a kernel: the first time by Triton, which finds out what to compile it for; then what it found, at once.

Triton looks at every argument to find a kernel again, which costs the host time. Host code knows most of them (what it
allocates is aligned, the dtypes of rows are settled): it says in a key what may differ between calls.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

ON_AMD = torch.version.hip is not None
NOTHING: dict[str, Any] = {}

# By key, then by place in the order of launches.
_known: dict[Hashable, dict[int, Any]] = {}


class Launches:
    """The launches of one host function, whose order its ``key`` decides, as it must all that Triton compiles for.

    That is, beside constants and options: the device, dtypes, which tensors are None, how those lie that were not
    allocated here (`lie`), and which whole numbers are special to Triton (`size`).
    """

    __slots__ = ("known", "place")

    def __init__(self, *key: Hashable) -> None:
        known = _known.get(key)
        if known is None:
            known = _known.setdefault(key, {})
        self.known, self.place = known, 0

    def __call__(self, kernel: Any, programs: int, arguments: tuple, options: dict[str, Any] = NOTHING) -> None:
        """Launch ``kernel``; ``arguments`` are all of its own, in its order, ``options`` what is compiled with."""
        place = self.place
        self.place = place + 1
        compiled = self.known.get(place)
        if compiled is not None:
            compiled[(programs, 1, 1)](*arguments)
            return
        compiled = kernel[(programs,)](*arguments, **options)
        # Interpreted, there is none.
        if compiled is not None:
            self.known[place] = compiled


def lie(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Which tensors start 16 bytes, which Triton compiles for; None where there is none.

    For AMD also whether their memory takes more than 31 bits: it compiles offsets of 32 bits where it does not.
    """
    if ON_AMD:
        return tuple(
            [None if it is None else (not it.data_ptr() & 15, it.untyped_storage().size() >> 31) for it in tensors]
        )
    return tuple([None if tensor is None else not tensor.data_ptr() & 15 for tensor in tensors])


def dtypes(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Of tensors that may be of several; None where there is none."""
    return tuple([None if tensor is None else tensor.dtype for tensor in tensors])


def reach(*numbers: int) -> tuple[int, ...]:
    """Of whole numbers that Triton does not specialise: whether there is nothing to launch for, more than 31 bits."""
    return tuple([number >> 31 if number else -1 for number in numbers])


def size(number: int) -> tuple[bool, bool, int]:
    """What Triton compiles for of a whole number that it may specialise: 1, a multiple of 16, more than 31 bits."""
    return number == 1, not number & 15, number >> 31
