"""Shared memory whose asynchronous copies land as late as they may: when they are waited for, and not before.

A copy spoils its destination when it is asked for, and its source is read when it lands: whoever takes a block too
early, asks for one over a block still wanted, or overwrites what is yet to be copied, gets other numbers.
"""

from collections.abc import Callable
from typing import Any


class Copies:
    """The copies of one program, in groups as cp.async has them."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def ask(self, slot: "Slot", spoilt: Any, read: Callable[[], Any]) -> None:
        """Begin a copy of what ``read`` returns to ``slot``, which holds what is ``spoilt`` until then."""
        slot.content = spoilt
        self.open.append(lambda: setattr(slot, "content", read()))

    def commit(self) -> None:
        """Close a group, be it empty."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, under_way: int) -> None:
        """Land all groups but the last ``under_way``."""
        while len(self.groups) > under_way:
            for land in self.groups.pop(0):
                land()

    @property
    def landed(self) -> bool:
        """Whether nothing is under way."""
        return not self.open and not any(self.groups)


class Slot:
    """A block of shared memory."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, content: Any) -> None:
        self.shape, self.dtype, self.content = shape, dtype, content

    def load(self, layout: Any) -> Any:
        """What lies in it."""
        return self.content
