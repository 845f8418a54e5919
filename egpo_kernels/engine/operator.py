"""How opaque operators are registered: by hand, which costs a call less than `torch.library.custom_op` does."""

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch._ops import OpOverload
from torch.compiler import is_compiling

from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, compute_dtype
from egpo_kernels.formulas.metrics import Table

Tensors = list[Tensor]
OptionalTensors = list[Tensor | None]
Tensors2 = tuple[Tensor, Tensor]
Tensors3 = tuple[Tensor, Tensor, Tensor]
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors5 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

NAMESPACE = "egpo_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


# What an operator may be given as it is; any other tensor, number or mode must be dispatched.
_PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None), bool, int, float, str, torch.dtype}


class Operator:
    """An operator: dispatched where somebody watches or traces, else called at once, which saves the host time."""

    def __init__(self, function: Callable, overload: OpOverload, writes: bool) -> None:
        self.function, self.overload, self.writes = function, overload, writes

    def __call__(self, *arguments: Any) -> Any:
        """Call it with all of its arguments, in order."""
        if is_compiling() or not _are_plain(arguments):
            return self.overload(*arguments)
        return self.of_plain(*arguments)

    def of_plain(self, *arguments: Any) -> Any:
        """Call it with arguments that are known to be plain, in a call that is not traced."""
        if _len_torch_dispatch_stack() > 0 or _are_functorch_transforms_active():
            return self.overload(*arguments)
        if self.writes or _elsewhere(arguments[0]) is not None:
            return _run(self.function, self.writes, *arguments)
        return self.function(*arguments)


def _are_plain(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        kind = type(argument)
        if kind is list:
            for part in argument:
                if type(part) not in _PLAIN:
                    return False
        elif kind not in _PLAIN:
            return False
    return True


def operator(fake: Callable, mutates: str | None = None) -> Callable[[Callable], Operator]:
    """Register a function under its name; ``fake`` makes results of the right shapes, ``mutates`` is written into.

    What it mutates comes first. It runs with its first tensor's GPU current, where kernels are launched.
    """

    def register(function: Callable) -> Operator:
        name, run = function.__name__, _on_device(function, mutates is not None)
        schema = torch.library.infer_schema(function, mutates_args=() if mutates is None else (mutates,))
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return Operator(function, getattr(getattr(torch.ops, NAMESPACE), name).default, mutates is not None)

    return register


def _on_device(function: Callable, writes: bool) -> Callable:
    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return _run(function, writes, *arguments)

    return run


def _run(function: Callable, writes: bool, first: Any, *others: Any) -> Any:
    where = _elsewhere(first)
    if where is not None:
        with torch.cuda.device(where):
            found = function(first, *others)
    else:
        found = function(first, *others)
    if writes and not first.is_inference():
        torch.autograd.graph.increment_version(first)
    return found


def _elsewhere(first: Any) -> int | None:
    """The GPU of this tensor, or list with one, where that is not the current one."""
    tensor = first if isinstance(first, Tensor) else next(one for one in first if one is not None)
    return tensor.device.index if tensor.is_cuda and tensor.device.index != torch.cuda.current_device() else None


@functools.lru_cache(maxsize=256)
def advantage_config(text: str) -> AdvantageConfig:
    """Read settings back from ``AdvantageConfig.json``."""
    return AdvantageConfig.from_dict(json.loads(text))


@functools.lru_cache(maxsize=256)
def policy_config(text: str) -> PolicyLossConfig:
    """Read settings back from ``PolicyLossConfig.json``."""
    return PolicyLossConfig.from_dict(json.loads(text))


def fake_vector(like: Tensor, table: Table, reported: bool) -> Tensor:
    """The metrics vector of an operator's fake."""
    return like.new_empty(len(table.keys) if reported else 0, dtype=compute_dtype(like.dtype))
