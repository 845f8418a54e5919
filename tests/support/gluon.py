"""A Gluon kernel under Triton's interpreter, which has no Gluon: its own source, with layouts left out.

    with through_ring():
        backend.logits_loss_gradient(...)

Everything but shared memory is the interpreter's own; shared memory is that of `tests.support.copies`.
"""

import contextlib
import importlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import triton.language as tl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.interpreter import InterpretedFunction

from benchmarks.ring import switched_on
from egpo_kernels.triton import launcher, ring
from egpo_kernels.triton.launch import Launch, Ring
from tests.support.copies import Copies, Slot
from tests.support.device import ON_GPU

# By its name: the package has a function of the same.
ONE_PASS = importlib.import_module("egpo_kernels.triton.logits_policy_loss")


class Memory:
    """Shared memory ``[slots, ...]``."""

    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.dtype = dtype
        self.slots = [Slot(tuple(shape[1:]), dtype, spoilt(dtype, shape[1:])) for _ in range(shape[0])]

    def index(self, place: Any) -> Slot:
        return self.slots[number(place)]


def number(value: Any) -> int:
    """The whole number in a constant or a scalar."""
    return value.handle.data.item() if isinstance(value, tl.tensor) else int(getattr(value, "value", value))


def spoilt(dtype: Any, shape: Any) -> tl.tensor:
    """NaN in 16 bits, or in both halves of 32."""
    bits = tl.full(shape, -1, tl.int32 if dtype == tl.int32 else tl.int16)
    return bits if dtype == tl.int32 else bits.to(dtype, bitcast=True)


class Machine:
    """What of Gluon a kernel may call; the rest is the language's own. A copy's lanes outside its mask bring zeros."""

    def __init__(self) -> None:
        self.copies = Copies()

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)

    def allocate_shared_memory(self, dtype: Any, shape: list[Any], layout: Any) -> Memory:
        self.copies = Copies()
        return Memory(dtype, [number(size) for size in shape])

    def copy_block(self, slot: Slot, source_ptr: Any, mask: Any) -> None:
        assert tuple(source_ptr.shape) == slot.shape, (source_ptr.shape, slot.shape)
        inside = tl.broadcast_to(mask, source_ptr.shape)
        self.copies.ask(slot, spoilt(slot.dtype, slot.shape), lambda: tl.load(source_ptr, mask=inside, other=0))

    def commit_group(self) -> None:
        self.copies.commit()

    def wait_group(self, under_way: Any) -> None:
        self.copies.wait(number(under_way))

    def arange(self, start: Any, end: Any, layout: Any) -> tl.tensor:
        return tl.arange(number(start), number(end))

    def full(self, shape: list[Any], value: float, dtype: Any, layout: Any) -> tl.tensor:
        return tl.full([number(size) for size in shape], value, dtype)

    def reshape(self, value: tl.tensor, shape: list[Any]) -> tl.tensor:
        return tl.reshape(value, [number(size) for size in shape])

    def convert_layout(self, value: tl.tensor, layout: Any, assert_trivial: bool) -> tl.tensor:
        return value

    def SliceLayout(self, dim: int, parent: Any) -> None:
        return None

    def SwizzledSharedLayout(self, *numbers: int, order: list[int]) -> None:
        return None


class Emulated(InterpretedFunction):
    """Interpreted with its own annotations: rewritten they are text, in which the interpreter knows no ``gl``."""

    def rewrite(self) -> Any:
        function = super().rewrite()
        function.__annotations__ = self.fn.__annotations__
        return function


def interpreted(machine: Machine) -> dict[str, Any]:
    """The functions of the module `egpo_kernels.triton.ring`, to be interpreted on a machine."""
    names = {**vars(ring), "gl": machine, "async_copy": machine, "copy_block": machine.copy_block}
    for name, value in vars(ring).items():
        if isinstance(value, GluonJITFunction):
            function = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
            function.__annotations__ = value.fn.__annotations__
            names[name] = Emulated(function)
    return names


@contextlib.contextmanager
def emulated(machine: Machine) -> Iterator[None]:
    """Run the kernel on ``machine`` where it would be launched."""
    kernel = interpreted(machine)["ring_policy_loss_kernel"]
    with mock.patch.object(ring, "ring_policy_loss_kernel", kernel):
        yield


# Blocks of 512 logits of 16 bits: three in the ring, up to six in a row.
SMALL = Ring(num_warps=1, strips=2, slots=3)


@contextlib.contextmanager
def through_ring(machine: Machine | None = None) -> Iterator[None]:
    """Rows of logits go through the ring: on a GPU that of `benchmarks.ring`, elsewhere a small one, emulated."""
    taken = []

    def kernel_of(launch: Launch) -> Any:
        taken.append(launch.slots)
        return original(launch)

    original = ONE_PASS.kernel_of
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(launcher._known, clear=True))  # which remembers what was chosen
        stack.enter_context(mock.patch.object(ONE_PASS, "kernel_of", kernel_of))
        stack.enter_context(switched_on() if ON_GPU else switched_on(SMALL))
        if not ON_GPU:
            stack.enter_context(emulated(machine or Machine()))
        yield
    assert taken and all(taken), "rows went another way"
