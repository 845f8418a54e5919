"""How kernels over logits are launched: one table of constants by kernel, GPU, vocabulary and dtype.

The order in which a row is summed up follows from these constants and from how rows lie in memory (in whole accesses
or not), never from the rows beside it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

ACCESS_BYTES = 16
"""What a thread loads or stores at once."""

# Of an NVIDIA multiprocessor, and the most a thread may have.
REGISTERS, MAX_REGISTERS = 1 << 16, 255


class Ring(NamedTuple):
    """Constants of the kernel that keeps a row in shared memory: ``slots`` blocks of ``strips``."""

    num_warps: int
    strips: int
    slots: int


class Constants(NamedTuple):
    """What a measurement may change. A strip is one access of every thread of a program.

    ``strips`` make a block of the sweep for statistics, ``gradient_strips`` one of the sweep for the gradient. With
    ``stages`` above 1 so many blocks less one are on their way to shared memory while one is computed. ``programs`` is
    how many are to share a processor, and its registers: one, where a row has to stay in cache to be read twice.
    With a ``ring``, rows that it takes go through shared memory instead: see `egpo_kernels.triton.ring`.
    """

    num_warps: int
    strips: int
    stages: int
    gradient_strips: int
    programs: int
    ring: Ring | None = None


class Rule(NamedTuple):
    """Constants of a kernel where everything named fits: the beginning of an architecture, a vocabulary or more."""

    kernel: str
    architecture: str
    itemsizes: tuple[int, ...]
    vocab: int
    constants: Constants


class Table(tuple[Rule, ...]):
    """Rules, of which the first that fits is taken; hashed by what it is, not by what is in it, which takes long."""

    __slots__ = ()
    __eq__, __hash__ = object.__eq__, object.__hash__


ANY = (2, 4, 8)
# What is not measured is predicted: see benchmarks/NOTES.md.
TABLE: tuple[Rule, ...] = Table((
    # Interpreted, a block is small, so that a vocabulary of a thousand has several.
    Rule("", "interpreter", ANY, 0, Constants(1, 4, 3, 4, 1)),
    Rule("", "gfx", ANY, 0, Constants(16, 2, 1, 2, 1)),
    # Read once: nothing has to stay in cache, and several programs hide each other's waiting.
    Rule("row_statistics_kernel", "", ANY, 0, Constants(4, 4, 3, 4, 4)),
    Rule("logits_gradient_kernel", "", (8,), 0, Constants(8, 4, 1, 4, 2)),
    Rule("logits_gradient_kernel", "", ANY, 0, Constants(8, 4, 1, 8, 2)),
    # 64 KiB of a row on their way; 64 elements a thread share the cost of a block.
    Rule("logits_policy_loss_kernel", "", (8,), 0, Constants(8, 4, 3, 4, 1)),
    Rule("logits_policy_loss_kernel", "", ANY, 0, Constants(8, 8, 3, 8, 1)),
))  # fmt: skip


class Launch(NamedTuple):
    """Constants of one launch as a kernel sees them, all known when it is compiled.

    ``threads`` times ``width`` elements are a strip. ``odd`` says that rows may start anywhere in their 16 bytes, or
    are no whole numbers of accesses; ``aligned`` that every row of the logits starts an access, ``agrees`` that
    every row of the gradient lies in its 16 bytes as the row of logits does. ``end`` are the strips after the last
    whole block, ``edges`` the lanes for what no whole access covers wherever an odd row starts. ``slots`` is the
    length of the ring in shared memory that rows go through, 0 where they do not.
    """

    threads: Any
    width: Any
    strips: Any
    stages: Any
    gradient_strips: Any
    odd: Any
    aligned: Any
    agrees: Any
    end: Any
    edges: Any
    slots: Any


class Extent(NamedTuple):
    """Elements of a row: all, those in whole blocks of the sweep for statistics, and where the part ends that whole
    accesses cover wherever the row starts.
    """

    vocab: Any
    full: Any
    inner: Any


class Launched(NamedTuple):
    """What a launch over rows of logits is given beside its tensors; see `Constants` for ``programs``."""

    launch: Launch
    extent: Extent
    options: dict[str, int]
    programs: int


@functools.cache
def architecture(device: torch.device) -> str:
    """What the table knows a device by: sm_90, gfx942, interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def constants_for(kernel: str, vocab: int, itemsize: int, device: torch.device) -> Constants:
    """The table's constants of ``kernel``."""
    return _constants_for(kernel, vocab, itemsize, architecture(device), TABLE)


@functools.lru_cache(maxsize=256)
def _constants_for(kernel: str, vocab: int, itemsize: int, found: str, table: tuple[Rule, ...]) -> Constants:
    for rule in table:
        if rule.kernel in ("", kernel) and found.startswith(rule.architecture):
            if itemsize in rule.itemsizes and vocab >= rule.vocab:
                return rule.constants
    raise LookupError(f"no rule of the table fits {kernel} on {found}")


def choice_of(kernel: str, logits: torch.Tensor) -> tuple[str, Constants]:
    """What decides, beside how tensors lie, what `launch_for` answers."""
    device = logits.device
    return architecture(device), constants_for(kernel, logits.shape[-1], logits.element_size(), device)


def launch_for(kernel: str, logits: torch.Tensor, out: torch.Tensor | None = None, may_ring: bool = False) -> Launched:
    """How ``kernel`` goes over ``logits [B, T, V]`` and, where there is one, their gradient.

    One that ``may_ring`` goes through the ring where the table has one that takes these rows.
    """
    vocab, itemsize, shift = logits.shape[-1], logits.element_size(), _shift(logits)
    found, constants = choice_of(kernel, logits)
    aligned = not any(shift)
    agrees = out is None or out is logits or _shift(out) == shift
    ring = constants.ring if may_ring and aligned and agrees else None
    if ring is not None and _fits(ring, vocab, itemsize):
        return _through_ring(ring, vocab, itemsize)
    return _launch(constants, found, vocab, itemsize, aligned, agrees)


@functools.lru_cache(maxsize=256)
def _launch(constants: Constants, found: str, vocab: int, itemsize: int, aligned: bool, agrees: bool) -> Launched:
    width, warp = ACCESS_BYTES // itemsize, 64 if found.startswith("gfx") else 32
    odd = vocab % width != 0 or not aligned
    if odd and itemsize == 8:
        width, odd = 1, False  # float64 has no whole numbers to be summed up in
    num_warps = constants.num_warps
    while num_warps > 1 and num_warps * warp * width > vocab:
        num_warps //= 2
    threads = num_warps * warp
    strip = threads * width
    most = triton.next_power_of_2(triton.cdiv(vocab, strip))
    strips, gradient_strips = min(constants.strips, most), min(constants.gradient_strips, most)
    # An odd row may begin up to an access late.
    covered = max(vocab - width, 0) if odd else vocab
    full, inner = (covered // size * size for size in (strips * strip, width))
    end = triton.next_power_of_2(triton.cdiv(inner - full, strip)) if inner > full else 0
    edges = triton.next_power_of_2(width * triton.cdiv(inner, strip) + 2 * width) if odd else 0
    aligned = aligned and not odd and width > 1
    made = (threads, width, strips, constants.stages, gradient_strips, odd, aligned, agrees, end, edges, 0)
    options = {"num_warps": num_warps}
    if found.startswith("sm_"):
        options |= _registers(constants.programs * constants.num_warps)
    return _launched(made, Extent(vocab, full, inner), options, constants.programs)


def _registers(warps: int) -> dict[str, int]:
    """The registers that so many warps of a processor leave to a thread.

    Left alone, the compiler spills to make room for one program more than there are to be.
    """
    return {"maxnreg": min(MAX_REGISTERS, REGISTERS // (32 * warps))}


def _launched(made: Sequence[Any], extent: Extent, options: dict[str, int], programs: int) -> Launched:
    return Launched(Launch(*made), extent, options, programs)


def _ring_block(ring: Ring, itemsize: int) -> int:
    """Elements of a slot."""
    return ring.strips * ring.num_warps * 32 * (ACCESS_BYTES // itemsize)


def _fits(ring: Ring, vocab: int, itemsize: int) -> bool:
    """Whether a row is of 16-bit numbers in whole accesses, and no longer than twice the ring."""
    whole = itemsize == 2 and vocab * itemsize % ACCESS_BYTES == 0
    return whole and vocab <= 2 * ring.slots * _ring_block(ring, itemsize)


@functools.lru_cache(maxsize=256)
def _through_ring(ring: Ring, vocab: int, itemsize: int) -> Launched:
    """A launch of the kernel in `egpo_kernels.triton.ring`; a short row has a short ring."""
    block, threads = _ring_block(ring, itemsize), ring.num_warps * 32
    slots = min(ring.slots, triton.cdiv(vocab, block))
    full = vocab // block * block
    end = ring.strips if full < vocab else 0
    made = (threads, ACCESS_BYTES // itemsize, ring.strips, 1, ring.strips, False, True, True, end, 0, slots)
    options = {"num_warps": ring.num_warps, **_registers(ring.num_warps)}
    return _launched(made, Extent(vocab, full, vocab), options, programs=1)


def _shift(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Where in its 16 bytes ``[B, T, V]`` begins, and by how much of them rows are shifted from one to the next, of one
    row too, which is the same among others.
    """
    (batch_stride, row_stride, _), itemsize = tensor.stride(), tensor.element_size()
    steps = (batch_stride * itemsize % ACCESS_BYTES, row_stride * itemsize % ACCESS_BYTES)
    return tensor.data_ptr() % ACCESS_BYTES, *steps


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type == "cpu":
        return 4
    properties = torch.get_device_module(device).get_device_properties(device)
    name = "multi_processor_count" if hasattr(properties, "multi_processor_count") else "max_compute_units"
    return int(getattr(properties, name))


def num_programs(launched: Launched, num_rows: int, device: torch.device) -> int:
    """Programs of a persistent launch."""
    return min(num_rows, launched.programs * processors(device))
