"""Launching a kernel: the first time by Triton, which finds out what to compile it for; then what it found, at once.

Triton looks at every argument to find a kernel again, which costs the host time. Host code knows most of them (what it
allocates is aligned, the dtypes of rows are settled): it says in a key what may differ between calls.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

ON_AMD = torch.version.hip is not None
NOTHING: dict[str, Any] = {}
HOOKED = object()

# By key: compiled kernels by place in the order of launches, and what was worked out by the function that did.
_known: dict[Hashable, dict[Any, Any]] = {}


class Launches:
    """The launches of one host function, whose order its ``key`` decides, as it must all that Triton compiles for.

    That is, beside constants and options: the device, dtypes, which tensors are None, how those lie that were not
    allocated here (`lie`), and which whole numbers are special to Triton (`size`).
    """

    __slots__ = ("known", "place", "stream")

    def __init__(self, *key: Hashable) -> None:
        known = _known.get(key)
        if known is None:
            known = _known.setdefault(key, {})
        self.known, self.place, self.stream = known, 0, None

    def worked_out(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns of ``arguments`` that the key settles; it is called once for a key."""
        found = self.known.get(function)
        if found is None:
            found = self.known[function] = function(*arguments)
        return found

    def __call__(self, kernel: Any, programs: int, arguments: tuple, options: dict[str, Any] = NOTHING) -> None:
        """Launch ``kernel``; ``arguments`` are all of its own, in its order, ``options`` what is compiled with."""
        place = self.place
        self.place = place + 1
        known = self.known.get(place)
        if known is None:
            compiled = kernel[(programs,)](*arguments, **options)
            # Interpreted, there is none.
            if compiled is not None:
                # As they are looked up by Triton at each launch, which takes as long as they do.
                self.known[place] = compiled, compiled.run, compiled.function, compiled.packed_metadata
            return
        stream = self.stream
        if stream is None:
            stream = self.stream = _stream()
        compiled, run, function, metadata = known
        if stream is HOOKED:
            compiled[(programs, 1, 1)](*arguments)
        else:
            # As Triton launches, but for what it makes ready for hooks.
            run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)


def _stream() -> Any:
    """The current stream, or that somebody wants to be told of launches, a profiler."""
    active = driver.active
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if getattr(hook, "calls", True):
            return HOOKED
    return active.get_current_stream(active.get_current_device())


def lie(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Of each tensor its dtype, and whether it starts 16 bytes, which Triton compiles for; None where there is none.

    For AMD also whether their memory takes more than 31 bits: it compiles offsets of 32 bits where it does not.
    """
    if ON_AMD:
        sizes = tuple([None if it is None else it.untyped_storage().size() >> 31 for it in tensors])
        return sizes + tuple([None if it is None else (it.dtype, not it.data_ptr() & 15) for it in tensors])
    return tuple([None if it is None else (it.dtype, not it.data_ptr() & 15) for it in tensors])


def reach(*numbers: int) -> tuple[int, ...]:
    """Of whole numbers that Triton does not specialise: whether there is nothing to launch for, more than 31 bits."""
    return tuple([number >> 31 if number else -1 for number in numbers])


def size(number: int) -> tuple[bool, bool, int]:
    """What Triton compiles for of a whole number that it may specialise: 1, a multiple of 16, more than 31 bits."""
    return number == 1, not number & 15, number >> 31
