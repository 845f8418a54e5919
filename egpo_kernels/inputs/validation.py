"""Checks of what callers pass. Each message names the argument, what it is, what it must be."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from egpo_kernels.config.fields import fits_float32, plain

Shapes = dict[str, tuple[int, ...]]

# Torch has more dtypes, of which some can neither be converted nor compared.
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_KINDS = {
    "floating": _FLOATING,
    "integer": _INTEGER,
    "bool": (torch.bool,),
    "real": (*_FLOATING, *_INTEGER, torch.bool),
}


def check_dense(name: str, value: Any, kind: str) -> Tensor:
    """Return ``value`` when it is a tensor of that kind whose elements lie in strided memory."""
    if is_distributed(value):
        raise TypeError(
            f"{name} is a DTensor with placements {value.placements}; it must be a plain tensor, this rank's: pass its "
            "to_local(), or full_tensor()"
        )
    is_tensor = isinstance(value, Tensor) and value.dtype in _KINDS[kind]
    if is_tensor and value.layout == torch.strided and not value.is_nested:
        return value
    if not isinstance(value, Tensor) or value.dtype not in _KINDS[kind]:
        wanted = f"an {kind}" if kind == "integer" else f"a {kind}"
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; it must be {wanted} torch.Tensor")
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KINDS[kind])
        raise TypeError(f"{name} has dtype {value.dtype}; it must be {wanted} tensor ({names})")
    what = "is nested" if value.is_nested else f"has layout {value.layout}"
    raise ValueError(f"{name} {what}; it must be dense (torch.strided)")


def is_distributed(value: Any) -> bool:
    """Whether it is a DTensor, without an import of what they are made of."""
    return type(value).__name__ == "DTensor"


def is_fit(value: Any, kind: str, device: torch.device) -> bool:
    """Whether `check_tensor` has nothing to say but of its shape, and nothing to do: the way of almost every tensor."""
    return (
        isinstance(value, Tensor)
        and value.dtype in _KINDS[kind]
        and value.device == device
        and value.layout is torch.strided
        and not is_distributed(value)
        and not (is_compiling() or value.is_nested or value.is_neg() or value.is_inference())
    )


def has_shape(value: Tensor, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether a tensor has one of these shapes; torch 2.13's compiler sometimes gets ``shape in shapes`` wrong."""
    return any(value.shape == shape for shape in shapes)


def check_tensor(name: str, value: Any, kind: str, shapes: Shapes, device: torch.device) -> Tensor:
    """Return ``value`` when it is a tensor of that kind, of one of the shapes (of any if none), on that device."""
    check_dense(name, value, kind)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device} like the other tensors: move it there")
    if shapes and not has_shape(value, shapes.values()):
        wanted = " or ".join(f"{text} = {list(shape)}" for text, shape in shapes.items())
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be {wanted}")
    if is_compiling():
        # A compiler takes no tensor as two arguments.
        return value.view_as(value)
    # Operators refuse a view that is still to be negated, and autograd does not save what inference_mode made.
    value = value.resolve_neg() if value.is_neg() else value
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def check_rewards(rewards: Any) -> Tensor:
    """Return ``rewards`` when they are one real number per sequence."""
    if check_dense("rewards", rewards, "real").dim() != 1:
        raise ValueError(f"rewards has shape {list(rewards.shape)}; it must be [S], one number per sequence")
    return check_tensor("rewards", rewards, "real", {}, rewards.device)


def check_held(name: str, values: Tensor, held: Tensor) -> None:
    """Raise where whole numbers ``[S]`` are not the same in float32, by ``held [S]``."""
    if not is_compiling() and checks_values(values.device) and not held.all():
        raise ValueError(
            f"{name} holds {int(values[int((~held).nonzero()[0])])}, which float32 does not; they must be floating: "
            f"pass {name}.double()"
        )


def check_logits(name: str, logits: Any, packed: bool, may_be_empty: bool = False) -> Tensor:
    """Return ``logits`` when they are ``[S, T, V]`` (``[N, V]`` packed), of a known dtype, readable where they lie.

    Where other ranks have other columns, these ``may_be_empty``.
    """
    check_dense(name, logits, "floating")
    if logits.dim() != (2 if packed else 3):
        wanted = "[N, V] with cu_seqlens" if packed else "[S, T, V] (or [N, V] with cu_seqlens)"
        raise ValueError(f"{name} has shape {list(logits.shape)}; it must be {wanted}")
    vocab = logits.shape[-1]
    if vocab < 1 and not may_be_empty:
        raise ValueError(f"{name} has shape {list(logits.shape)}; its vocabulary (last dimension) must not be empty")
    if vocab > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {logits.stride(-1)} along the vocabulary; it must be 1: pass logits.contiguous()"
        )
    return logits.resolve_neg() if not is_compiling() and logits.is_neg() else logits


def check_not_overlapping(logits: Tensor) -> None:
    """Raise when rows of ``logits [B, T, V]`` share memory, so that a gradient written in place would be lost."""
    reach = logits.shape[-1]
    for dim in (1, 0) if logits.stride(0) >= logits.stride(1) else (0, 1):
        if logits.shape[dim] > 1 and logits.stride(dim) < reach:
            raise ValueError(
                f"logits with strides {logits.stride()} overlap themselves, and inplace_grad=True would write a "
                "gradient over itself; they must not: pass logits.clone() or inplace_grad=False"
            )
        reach = max(reach, logits.stride(dim) * logits.shape[dim])


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return the one of ``choices`` that ``value`` is: a plain string, where an enumeration's member may be given."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {shown(value)}; it must be one of {', '.join(map(repr, choices))}")
    if value not in choices:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(map(repr, choices))}")
    return choices[choices.index(value)]


def check_instance(name: str, value: Any, kind: type) -> Any:
    """Return ``value`` when it is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {type(value).__name__}; it must be {kind.__name__}")
    return value


def check_count(name: str, value: Any, device: torch.device, counted: Callable[[], Tensor]) -> Tensor | float | None:
    """Return a global count: None, a number >= 0, or a 0-d tensor; 0 only where ``counted`` rows are none."""
    if value is None:
        return None
    number = value = plain(value)
    wanted = "it must be a number >= 0 that float32 holds, a 0-d tensor or None"
    seen = not is_compiling() and checks_values(device)
    if isinstance(value, Tensor):
        value = check_tensor(name, value, "real", {"a 0-d tensor": ()}, device)
        number = value.item() if seen else 1
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {shown(value)}; {wanted}")
    if not (number >= 0 and fits_float32(number)):
        raise ValueError(f"{name} is {shown(value)}; {wanted}")
    if seen and number == 0 and counted().any():
        raise ValueError(
            f"{name} is {shown(value)}, and {int(counted().sum())} tokens count here; it must be the count of the "
            "whole batch, these among them"
        )
    return value


def check_whole(name: str, value: Any, low: int, bits: int = 63) -> int | None:
    """Return ``value`` when it is None or an int in ``[low, 2**bits)``."""
    if value is None:
        return None
    value, wanted = plain(value), f"it must be an int in [{low}, 2**{bits}) or None"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {shown(value)}; {wanted}")
    if not low <= value < 2**bits:
        raise ValueError(f"{name} is {shown(value)}; {wanted}")
    return value


def checks_values(device: torch.device) -> bool:
    """Whether values that live on ``device`` may be looked at: always on a CPU, elsewhere (a sync) under debug."""
    return kind_of(device) == "cpu" or environment("EGPO_KERNELS_DEBUG") == "1"


def environment(name: str) -> str | None:
    """An environment variable as it is now."""
    known = None if is_compiling() else getattr(os.environ, "_data", None)
    # Where it is not set, as it mostly is not, `os.environ.get` raises and catches twice.
    if known is not None and _encoded(name) not in known:
        return None
    return os.environ.get(name)


@functools.cache
def _encoded(name: str) -> Any:
    return os.environ.encodekey(name)


def kind_of(device: torch.device) -> str:
    """``device.type``, which torch makes anew each time it is asked, at some microseconds."""
    return device.type if is_compiling() else _kind_of(device)


@functools.cache
def _kind_of(device: torch.device) -> str:
    return device.type


def check_complete(ids: Tensor, group_size: int | None) -> None:
    """Raise when a group does not have exactly ``group_size`` members."""
    if group_size is None or not checks_values(ids.device):
        return
    _, counts = ids.unique(return_counts=True)
    wrong = counts[counts != group_size]
    if wrong.numel():
        raise ValueError(
            f"groups holds {wrong.numel()} groups that are not whole (one has {int(wrong[0])} members); each must have "
            f"group_size = {group_size}: pass whole groups, or call group_advantages before micro-batching"
        )
