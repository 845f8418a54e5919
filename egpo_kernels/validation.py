"""Checks of what callers pass. Each message names the argument, what it is, what it must be."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

_KINDS = {
    "floating": lambda dtype: dtype.is_floating_point,
    "integer": lambda dtype: not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool),
    "bool": lambda dtype: dtype == torch.bool,
    "real": lambda dtype: not dtype.is_complex,
}
LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: Any, kind: str, shapes: Shapes, device: torch.device) -> Tensor:
    """Return ``value`` when it is a tensor of that kind, of one of the shapes (of any if none), on that device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a {kind} torch.Tensor")
    if not _KINDS[kind](value.dtype):
        raise TypeError(f"{name} has dtype {value.dtype}; it must be a {kind} tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; it must be dense (torch.strided)")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device} like the other tensors: move it there")
    if shapes and all(value.shape != shape for shape in shapes.values()):
        wanted = " or ".join(f"{text} = {list(shape)}" for text, shape in shapes.items())
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be {wanted}")
    return value


def check_rewards(rewards: Any) -> Tensor:
    """Return ``rewards`` when they are one real number per sequence."""
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards is {type(rewards).__name__}; it must be a tensor [S], one number per sequence")
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {list(rewards.shape)}; it must be [S], one number per sequence")
    return check_tensor("rewards", rewards, "real", {}, rewards.device)


def check_logits(name: str, logits: Any, packed: bool) -> Tensor:
    """Return ``logits`` when they are ``[S, T, V]`` (``[N, V]`` packed), of a known dtype, readable where they lie."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} is {type(logits).__name__}; it must be a floating torch.Tensor")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} has dtype {logits.dtype}; it must be float16, bfloat16, float32 or float64")
    wanted = "[N, V] with cu_seqlens" if packed else "[S, T, V] (or [N, V] with cu_seqlens)"
    if logits.dim() != (2 if packed else 3) or logits.layout != torch.strided:
        raise ValueError(f"{name} has shape {list(logits.shape)}; it must be dense {wanted}")
    if logits.shape[-1] < 1:
        raise ValueError(f"{name} has shape {list(logits.shape)}; its vocabulary (last dimension) must not be empty")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {logits.stride(-1)} along the vocabulary; it must be 1: pass logits.contiguous()"
        )
    return logits


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


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` when it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` when it is one of ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    return value


def check_instance(name: str, value: Any, kind: type) -> Any:
    """Return ``value`` when it is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {type(value).__name__}; it must be {kind.__name__}")
    return value


def check_count(name: str, value: Any, device: torch.device) -> Tensor | float | None:
    """Return a global count: None, a number >= 0, or a 0-d tensor on ``device``."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return check_tensor(name, value, "real", {"a 0-d tensor": ()}, device)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a number >= 0, a 0-d tensor or None")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value!r}; it must be a number >= 0, a 0-d tensor or None")
    return value


def checks_values(device: torch.device) -> bool:
    """Whether values that live on ``device`` may be looked at: always on a CPU, elsewhere (a sync) under debug."""
    return device.type == "cpu" or os.environ.get("EGPO_KERNELS_DEBUG") == "1"


def check_tokens(tokens: Tensor | None, mask: Tensor, vocab: int) -> None:
    """Raise when a counted token id lies outside ``[0, vocab)``. Values are read only where that costs no sync."""
    if tokens is None or not checks_values(tokens.device):
        return
    wrong = mask & ((tokens < 0) | (tokens >= vocab))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"tokens holds {int(tokens[row])} at flattened position {row}, where the mask counts it; every counted "
            f"token must be in [0, {vocab}): mask it out"
        )


def check_temperatures(temperature: Tensor | None, mask: Tensor) -> None:
    """Raise when a counted row's temperature is not a positive finite number."""
    if temperature is None or not checks_values(temperature.device):
        return
    wrong = mask & ~((temperature > 0) & temperature.isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"temperature holds {float(temperature[row])} at flattened position {row}; it must be positive and finite"
        )


def check_cu_seqlens(cu_seqlens: Tensor, num_rows: int) -> None:
    """Raise when ``cu_seqlens`` does not start at 0, decreases, or ends past the last row."""
    if not checks_values(cu_seqlens.device):
        return
    cu_seqlens = cu_seqlens.long()
    if cu_seqlens[0] != 0 or (cu_seqlens[1:] < cu_seqlens[:-1]).any() or cu_seqlens[-1] > num_rows:
        raise ValueError(
            f"cu_seqlens starts at {int(cu_seqlens[0])} and ends at {int(cu_seqlens[-1])} over {num_rows} packed "
            "tokens; it must start at 0, never decrease, and end at or before the last token"
        )


def check_group_size(value: Any) -> None:
    """Raise when ``value`` is neither None nor an int that a tensor can be compared with."""
    if value is None:
        return
    wanted = "it must be an int in [1, 2**31) or None"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"group_size is {value!r}; {wanted}")
    if not 1 <= value < 2**31:
        raise ValueError(f"group_size is {value!r}; {wanted}")


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
