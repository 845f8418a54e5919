"""The kind of a call: all that its checks look at but sizes and numbers, which are looked at in every call.

What was found of one call, and the way that it went, holds for all others of its kind.
"""

from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from egpo_kernels.engine.dispatch import choose_backend
from egpo_kernels.inputs.layout import PER_SEQUENCE, PER_TOKEN

MOST = 256
"""Kinds that are kept of a function; a program has a few."""

_OPTIONS = (bool, str)
Way = TypeVar("Way")


def remember(known: dict[Hashable, Way], kind: Hashable | None, way: Way) -> None:
    """Keep the ``way`` of a ``kind``, where there is one."""
    if kind is not None:
        if len(known) >= MOST:
            known.clear()
        known[kind] = way


def kind_of_call(logits: Any, given: Sequence[Any], temperature: Any, backend: Any, *options: Any) -> Hashable | None:
    """The kind of a call with padded logits, and what is ``given`` per token or per sequence.

    None where there is none to go by: in a traced call, and where an argument must be looked at in each call, or is not
    handed on as it is.
    """
    if is_compiling() or isinstance(temperature, Tensor):
        return None
    if type(logits) is not Tensor or logits.is_nested or logits.layout is not torch.strided:
        return None
    shape, device = logits.shape, logits.device
    # Of one token each, what is per token has the shape of what is per sequence.
    if len(shape) != 3 or shape[1] == 1 or shape[2] < 1 or logits.stride(2) != 1 or logits.is_neg():
        return None
    kind = [logits.dtype, choose_backend(backend, device)]
    for option in options:
        if type(option) not in _OPTIONS:
            return None
        kind.append(option)
    per_token, per_sequence = shape[:2], shape[:1]
    for tensor in given:
        if tensor is None:
            kind.append(None)
            continue
        if type(tensor) is not Tensor or tensor.is_nested or tensor.layout is not torch.strided:
            return None
        if tensor.device != device or tensor.requires_grad or tensor.is_neg() or tensor.is_inference():
            return None
        if tensor.shape == per_token:
            kind += tensor.dtype, PER_TOKEN
        elif tensor.shape == per_sequence:
            kind += tensor.dtype, PER_SEQUENCE
        else:
            return None
    return tuple(kind)
