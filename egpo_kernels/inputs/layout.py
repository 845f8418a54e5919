"""From what callers hold (padded or packed, per sequence or per token) to flat rows `[N]`."""

import uuid
from reprlib import repr as shown
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.fields import check_number, entries, plain
from egpo_kernels.inputs.segments import per_row, segment_index
from egpo_kernels.inputs.validation import check_complete, check_dense, check_tensor, check_whole

IGNORED = -100
"""The token id that marks a position as not counted when no mask is given."""


class Layout(NamedTuple):
    """How rows belong to sequences: sequence i owns rows ``offsets[i] : offsets[i + 1]``.

    ``shape`` is that of a per-token tensor (``(S, T)`` padded, ``(N,)`` packed); ``poison`` is a 0-d 1.0, or NaN when
    ``cu_seqlens`` on a device was malformed; ``sequence [N]`` is each row's.
    """

    shape: tuple[int, ...]
    num_sequences: int
    offsets: Tensor
    poison: Tensor
    sequence: Tensor

    @property
    def num_rows(self) -> int:
        """Flattened positions N, padding included."""
        return self.sequence.shape[0]

    def per_token(self, name: str, value: Any, kind: str) -> Tensor:
        """Check a per-token tensor and flatten it to ``[N]``."""
        return check_tensor(name, value, kind, self._token_shapes(), self.sequence.device).reshape(-1)

    def per_token_or_sequence(
        self, name: str, value: Any, kind: str, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Check a tensor given per sequence (where shapes agree) or per token, and return it per row ``[N]``.

        Beside it a 0-d 1.0 where its shape can be read both ways, NaN where they differ (in rows that ``counts``, if
        given) and a device may not be asked; else None.
        """
        shapes = {"[S]": (self.num_sequences,), "[S, 1]": (self.num_sequences, 1)}
        value = check_tensor(name, value, kind, {**shapes, **self._token_shapes()}, self.sequence.device)
        flat = value.reshape(-1)
        if all(value.shape != shape for shape in shapes.values()):
            return flat, None
        rows = per_row(flat, self.sequence)
        if value.shape != self.shape or len(self.shape) == 2:
            return rows, None
        if counts is None:
            counts = torch.arange(self.num_rows, device=flat.device) < self.offsets[-1]
        return rows, torch.ops.egpo_kernels.read_either_way(rows.detach(), flat.detach(), counts, name)

    def _token_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"[S, T]" if len(self.shape) == 2 else "[N]": self.shape}


def make_layout(name: str, shape: tuple[int, ...], cu_seqlens: Any, device: torch.device) -> Layout:
    """Describe per-token tensors of ``shape``: ``[S, T]``, or ``[N]`` with ``cu_seqlens [S + 1]``."""
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(
                f"{name} has shape {list(shape)}; it must be [S, T], or packed [N] with cu_seqlens [S + 1]"
            )
        sequences, length = shape
        offsets = torch.arange(sequences + 1, device=device) * length
        # Not repeat_interleave, whose trace holds for one product of the sizes on torch 2.11.
        index = torch.arange(sequences, device=device)[:, None].expand(shape).reshape(-1)
        return Layout(shape, sequences, offsets, torch.ones((), dtype=torch.float32, device=device), index)
    if len(shape) != 1:
        raise ValueError(f"cu_seqlens is given with {name} padded; it must be None, or {name} packed")
    check_dense("cu_seqlens", cu_seqlens, "integer")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [S + 1], an integer tensor")
    cu_seqlens = check_tensor("cu_seqlens", cu_seqlens, "integer", {"[S + 1]": tuple(cu_seqlens.shape)}, device)
    offsets, poison = torch.ops.egpo_kernels.sequence_offsets(cu_seqlens, shape[0])
    return Layout(shape, cu_seqlens.shape[0] - 1, offsets, poison, segment_index(offsets, shape[0]))


def one_sequence(shape: tuple[int, ...], device: torch.device) -> Layout:
    """Describe packed per-token tensors ``[N]`` where it does not matter which sequence a token is in."""
    (length,) = shape
    index = torch.zeros(length, dtype=torch.long, device=device)
    return Layout(
        shape, 1, torch.arange(2, device=device) * length, torch.ones((), dtype=torch.float32, device=device), index
    )


def counted(mask: Any, tokens: Tensor | None, layout: Layout) -> Tensor:
    """Return the rows that count, ``[N]`` bool: ``mask``, else ``tokens != -100``, else every row in a sequence."""
    inside = torch.arange(layout.num_rows, device=layout.sequence.device) < layout.offsets[-1]
    if mask is not None:
        return inside & (layout.per_token("mask", mask, "real") != 0)
    return inside if tokens is None else inside & (tokens != IGNORED)


def temperature_rows(
    temperature: Any, layout: Layout, dtype: torch.dtype, counts: Tensor
) -> tuple[float, Tensor | None]:
    """Return the temperature as a float and None, or as 1.0 and a tensor ``[N]`` (NaN where it is not positive)."""
    if not isinstance(temperature, Tensor):
        return check_number("temperature", temperature, low=0.0, high=float("inf"), open_low=True) or 1.0, None
    if temperature.dim() == 0:
        number = check_tensor("temperature", temperature, "real", {}, layout.sequence.device)
        return 1.0, number.detach().to(dtype).expand(layout.num_rows)
    rows, sound = layout.per_token_or_sequence("temperature", temperature, "real", counts)
    rows = rows.detach().to(dtype)
    return 1.0, rows if sound is None else rows * sound


def group_ids(groups: Any, num_sequences: int, device: torch.device, group_size: int | None) -> Tensor:
    """Return group ids ``[S]`` int64 on ``device`` from a tensor, a list, a numpy array, or an int G (G in a row).

    Names are numbered on the host and copied without blocking.
    """
    # Not more: a tensor of counts could not be compared with it.
    group_size, groups = check_whole("group_size", group_size, 1, bits=31), plain(groups)
    if isinstance(groups, bool) or groups is None:
        raise TypeError(f"groups is {shown(groups)}; it must be ids per sequence (tensor, list, numpy array) or an int")
    if isinstance(groups, int):
        if not 1 <= groups < 2**31 or num_sequences % groups:
            raise ValueError(f"groups is {shown(groups)}; it must be >= 1 and divide the {num_sequences} sequences")
        if group_size is not None and group_size != groups:
            raise ValueError(f"group_size is {group_size} with groups = {groups}; they must be equal")
        return torch.arange(num_sequences, device=device) // groups
    if isinstance(groups, Tensor):
        home = groups.device if groups.device.type == "cpu" else device
        ids = check_tensor("groups", groups, "integer", {"[S]": (num_sequences,)}, home).long()
    else:
        ids = _numbered(groups, num_sequences)
    if ids.device == device:
        return ids
    check_complete(ids, group_size)
    return to_device("groups", ids, device, "it must be a tensor there, or an int")


def to_device(name: str, values: Tensor, device: torch.device, wanted: str) -> Tensor:
    """Copy what the caller gave on the host as ``name`` to ``device``, without blocking; ``wanted`` ends the message.

    Raises:
        ValueError: A CUDA graph is being captured.
    """
    if device.type != "cuda":
        return values.to(device)
    if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{name} is on the CPU while a CUDA graph is captured, which would copy from memory that is gone when it "
            f"is replayed; {wanted}"
        )
    return values.pin_memory().to(device, non_blocking=True)


def _is_name(name: Any) -> bool:
    """Whether it names a group: (task, prompt) does too."""
    if isinstance(name, tuple):
        return all(_is_name(part) for part in name)
    return isinstance(name, (str, bytes, int, np.integer, uuid.UUID))


def _numbered(groups: Any, num_sequences: int) -> Tensor:
    names = entries(groups)
    if names is None and not isinstance(groups, np.ndarray):
        raise TypeError(
            f"groups is {type(groups).__name__}; it must be an integer tensor, a list, a numpy array, or an int G"
        )
    if names is None:
        raise ValueError(f"groups has shape {list(groups.shape)}; it must be [S], one name per sequence")
    if len(names) != num_sequences:
        raise ValueError(f"groups has {len(names)} entries; it must have one name per sequence, {num_sequences}")
    odd = [name for name in names if not _is_name(name)]
    if odd:
        raise TypeError(f"groups holds {shown(odd[0])}; a group's name must be a string, an integer or a tuple of them")
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.long)
