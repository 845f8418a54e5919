"""What one element of the logits costs in a compiled kernel, read from its SASS: instructions, exponentials, accesses.

    [Sweep(elements=32, instructions=8.0, special=1.03, ...), Sweep(elements=16, instructions=7.6, ...)]

A sweep is an innermost loop (a backward branch with no other inside) that loads from global memory; one thread handles
as many elements an iteration as its widest loads bring. Loops that only store write zeros over rows that are not read,
and do not count. Of a loop with several paths every instruction counts; a loop the compiler unrolled counts beside its
remainder. A kernel without a loop is one sweep itself.
"""

import re
from collections import Counter
from typing import NamedTuple

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
LOADS = ("LDG", "LDGSTS")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^\s;]+)(.*?)\s*;")


class Instruction(NamedTuple):
    """One line of SASS: address, mnemonic ("LDG"), its modifiers, and where it branches to, if it does."""

    address: int
    name: str
    modifiers: tuple[str, ...]
    target: int | None

    @property
    def width(self) -> int:
        """Bytes one thread moves, for a load or store."""
        return next((WIDTHS[modifier] for modifier in self.modifiers if modifier in WIDTHS), 4)


class Sweep(NamedTuple):
    """One loop over a row; what is not ``elements`` or ``load_width`` is per element."""

    elements: int
    """One thread handles in an iteration."""
    load_width: int
    """Bytes of the widest load."""
    instructions: float
    special: float
    """Special-function operations (MUFU): exponentials, logarithms, reciprocals."""
    loads: float
    stores: float
    barriers: float
    shuffles: float
    """Exchanges between the threads of a warp (SHFL)."""
    ahead: bool
    """Loads go to shared memory (LDGSTS) and are used iterations later: they are on their way while one computes."""
    evict_first: bool
    """Every load and store of the row's own leaves the cache to what is read again."""


def parse(sass: str) -> list[Instruction]:
    """The instructions of what ``cuobjdump -sass`` prints."""
    found = []
    for address, mnemonic, operands in LINE.findall(sass):
        name, *modifiers = mnemonic.split(".")
        goal = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if name == "BRA" else None
        found.append(Instruction(int(address, 16), name, tuple(modifiers), int(goal[1], 16) if goal else None))
    return found


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the loops that hold no other; several branches back to one place are one loop."""
    ends: dict[int, int] = {}
    for instruction in code:
        # A branch to itself is no loop: it stops what runs past the end.
        if instruction.target is not None and instruction.target < instruction.address:
            ends[instruction.target] = instruction.address
    inner = [
        (start, end)
        for start, end in ends.items()
        if not any(other != start and start <= other and ends[other] <= end for other in ends)
    ]
    return [[one for one in code if start <= one.address <= end] for start, end in sorted(inner)]


def sweeps(code: list[Instruction], itemsize: int) -> list[Sweep]:
    """The sweeps of a kernel over logits of ``itemsize`` bytes, in the order of the code."""
    if not any(one.target is not None and one.target < one.address for one in code):
        stop = next((place for place, one in enumerate(code) if one.target == one.address), len(code))
        return [_sweep(code[:stop], itemsize)]
    return [_sweep(body, itemsize) for body in innermost_loops(code) if _width(body)]


def _width(body: list[Instruction]) -> int:
    return max((one.width for one in body if one.name in LOADS), default=0)


def _sweep(body: list[Instruction], itemsize: int) -> Sweep:
    names, width = Counter(one.name for one in body), _width(body)
    loads = [one for one in body if one.name in LOADS]
    elements = sum(one.width for one in loads if one.width == width) // itemsize
    row = [one for one in body if one.name in (*LOADS, "STG") and one.width == width]
    return Sweep(
        elements=elements,
        load_width=width,
        instructions=(len(body) - names["NOP"]) / elements,
        special=names["MUFU"] / elements,
        loads=len(loads) / elements,
        stores=names["STG"] / elements,
        barriers=names["BAR"] / elements,
        shuffles=names["SHFL"] / elements,
        ahead=names["LDGSTS"] > 0,
        evict_first=all("EF" in one.modifiers for one in row),
    )
