"""Torch's own launches of a call, counted on CPU tensors: the operations that would each launch a kernel on a GPU.

torch.profiler sees every operation, those of backward and inside opaque operators too, which dispatch modes do not.
Views, allocations, what has no elements and what only answers the host launch nothing. The count is a lower bound:
some kernels of torch (a sort, say) are several launches, and copies from the host are not seen on a CPU.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

FILLS = ("aten::zero_", "aten::fill_")


def operations(run: Callable[[], object]) -> list[str]:
    """Names of the operations of ``run`` that would launch a kernel, in order.

    Raises:
        RuntimeError: Another profiler is running.
    """
    named = _ExperimentalConfig(capture_overload_names=True)
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True, experimental_config=named
    ) as seen:
        torch.zeros(1)  # the witness that operations are recorded
        run()
    outermost = (event for event in seen.events() if event.cpu_parent is None)
    found = [_short(launch) for event in outermost for launch in _launches(event) if not _of_nothing(launch)]
    if found[:1] != ["zero_"]:
        raise RuntimeError("torch.profiler recorded no operations: no other profiler may be running")
    return found[1:]


def _launches(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The launches of an operation: its own, or those of what it is made of. Some may be of no elements."""
    traits = _traits(event.name, event.overload_name)
    if traits is None:
        yield from _below(event)
    elif traits.kernel or (traits.past_dispatcher and not _calls_itself(event)):
        # A mask as an index is searched first, on a GPU too; all else that a kernel calls is the CPU's own.
        yield from (child for child in event.cpu_children if child.name == "aten::nonzero")
        if traits.launches:
            yield event
    else:
        below = list(_below(event))
        # It computed by itself what it made memory for, or what was there.
        own = any("empty" in child.name for child in event.cpu_children) or not (event.cpu_children or traits.implicit)
        yield from below or ([event] if traits.launches and own else [])


def _below(event: FunctionEvent) -> Iterator[FunctionEvent]:
    for child in event.cpu_children:
        yield from _launches(child)


def _of_nothing(event: FunctionEvent) -> bool:
    """Whether a launch is of no elements: its first tensor has none, and it does not fill a result that has some."""
    return _empty(event) and not any(child.name in FILLS and not _empty(child) for child in event.cpu_children)


def _calls_itself(event: FunctionEvent) -> bool:
    """Whether an overload calls another of the same name through the dispatcher, where it is seen."""
    return any(child.name == event.name for child in event.cpu_children)


def _empty(event: FunctionEvent) -> bool:
    """Whether the first tensor has no elements."""
    return bool(event.input_shapes) and 0 in event.input_shapes[0]


def _short(event: FunctionEvent) -> str:
    return event.name.removeprefix("aten::")


class _Traits:
    """What torch's tables say of an overload.

    ``kernel``: it is written for a device; ``implicit``: it is made of other operations, and nothing where it has
    none; ``past_dispatcher``: another overload is written for a device; ``launches``: it computes a tensor.
    """

    def __init__(self, packet: Any, overload: str) -> None:
        operation = getattr(packet, overload or "default")
        self.kernel = _written_for(operation, "CPU")
        self.implicit = _written_for(operation, "CompositeImplicitAutograd")
        self.past_dispatcher = any(_written_for(getattr(packet, name), "CPU") for name in packet.overloads())
        self.launches = _computes(operation)


def _written_for(operation: Any, key: str) -> bool:
    """Whether an overload is in the dispatcher under a key; those of TorchScript alone are not in it at all."""
    name = operation.name()
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _computes(operation: Any) -> bool:
    """Whether an operation returns tensors, and neither a view nor memory as it comes."""
    returned = operation._schema.returns
    alias = returned[0].alias_info if returned else None
    is_view = torch.Tag.inplace_view in operation.tags or (alias is not None and not alias.is_write)
    of_tensors = any("Tensor" in str(one.type) for one in returned)
    # `_unsafe_view` does not say that it is one.
    return of_tensors and not is_view and not any(kind in operation._schema.name for kind in ("empty", "_view"))


@functools.cache
def _traits(name: str, overload: str) -> _Traits | None:
    """None of what is no operation of aten: a node of autograd, an operator of a library."""
    if not name.startswith("aten::"):
        return None
    return _Traits(getattr(torch.ops.aten, name.removeprefix("aten::")), overload)
