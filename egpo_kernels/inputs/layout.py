"""How what callers hold (padded or packed, per sequence or per token) belongs to rows `[N]`."""

import uuid
from collections.abc import Callable
from reprlib import repr as shown
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.fields import entries, plain
from egpo_kernels.inputs.segments import Segments, counted_rows, even_offsets, per_row, segment_index
from egpo_kernels.inputs.validation import check_complete, check_dense, check_tensor, check_whole, has_shape, is_fit

# How many numbers a tensor holds: none, one for each token, for each sequence, or one for all.
ABSENT, PER_TOKEN, PER_SEQUENCE, FOR_ALL = range(4)


class Layout(NamedTuple):
    """How rows belong to sequences: as many to each where padded, else by ``known_offsets [S + 1]``.

    ``shape`` is that of a per-token tensor (``(S, T)`` padded, ``(N,)`` packed), ``num_rows`` are its positions N,
    padding included; ``poison`` is None, or a 0-d 1.0 that is NaN where ``cu_seqlens`` on a device was malformed.
    """

    shape: tuple[int, ...]
    num_rows: int
    num_sequences: int
    device: torch.device
    known_offsets: Tensor | None = None
    poison: Tensor | None = None

    @property
    def segments(self) -> Segments:
        """The same without tensors' shapes."""
        return Segments(self.num_rows, self.num_sequences, self.known_offsets)

    @property
    def offsets(self) -> Tensor:
        """``[S + 1]`` int64: sequence i owns rows ``offsets[i] : offsets[i + 1]``."""
        if self.known_offsets is not None:
            return self.known_offsets
        return even_offsets(self.num_rows, self.num_sequences, self.device)

    @property
    def sequence(self) -> Tensor:
        """The sequence of each row ``[N]``."""
        if self.known_offsets is not None:
            return segment_index(self.known_offsets, self.num_rows)
        if len(self.shape) == 1:
            return torch.zeros(self.shape, dtype=torch.long, device=self.device)
        # Not repeat_interleave, whose trace holds for one product of the sizes on torch 2.11.
        return torch.arange(self.num_sequences, device=self.device)[:, None].expand(self.shape).reshape(-1)

    def poisoned(self, values: Tensor) -> Tensor:
        """``values``, NaN where `poison` is."""
        return values if self.poison is None else values * self.poison

    def inside(self) -> Tensor:
        """Rows ``[N]`` that are in a sequence."""
        if self.known_offsets is None:
            return torch.ones(self.num_rows, dtype=torch.bool, device=self.device)
        return torch.arange(self.num_rows, device=self.device) < self.known_offsets[-1]

    def per_token(self, name: str, value: Any, kind: str) -> Tensor:
        """Check a per-token tensor and flatten it to ``[N]``."""
        return self.shaped(name, value, kind).reshape(-1)

    def shaped(self, name: str, value: Any, kind: str) -> Tensor:
        """Check a per-token tensor and leave its shape."""
        if is_fit(value, kind, self.device) and value.shape == self.shape:
            return value
        return check_tensor(name, value, kind, self._token_shapes(), self.device)

    def field(
        self, name: str, value: Any, kind: str, counts: Callable[[], Tensor]
    ) -> tuple[Tensor, int, Tensor | None]:
        """Check a tensor given per sequence (where shapes agree; ``[S]`` then) or per token, whose shape is left.

        Beside it which of both it is, and a 0-d 1.0 where its shape can be read both ways, NaN where they differ in the
        rows of ``counts`` and a device may not be asked; else None.
        """
        by_sequence = ((self.num_sequences,), (self.num_sequences, 1))
        fit = is_fit(value, kind, self.device)
        if not fit or value.shape not in (*by_sequence, self.shape):
            shapes = {"[S]": by_sequence[0], "[S, 1]": by_sequence[1], **self._token_shapes()}
            value = check_tensor(name, value, kind, shapes, self.device)
        # What is fit is not traced.
        if value.shape not in by_sequence if fit else not has_shape(value, by_sequence):
            return value, PER_TOKEN, None
        flat = value if value.dim() == 1 else value.reshape(-1)
        if value.shape != self.shape or len(self.shape) == 2:
            return flat, PER_SEQUENCE, None
        rows = per_row(flat, self.sequence)
        sound = torch.ops.egpo_kernels.read_either_way(rows.detach(), flat.detach(), counts(), name)
        return rows, PER_TOKEN, sound

    def per_token_or_sequence(
        self, name: str, value: Any, kind: str, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `field`, spread over rows ``[N]``; without ``counts`` every row in a sequence does."""
        values, found, sound = self.field(name, value, kind, lambda: self.inside() if counts is None else counts)
        return per_row(values, self.sequence) if found == PER_SEQUENCE else values.reshape(-1), sound

    def _token_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"[S, T]" if len(self.shape) == 2 else "[N]": self.shape}


def make_layout(name: str, shape: tuple[int, ...], cu_seqlens: Any, device: torch.device) -> Layout:
    """Describe per-token tensors of ``shape``: ``[S, T]``, or ``[N]`` with ``cu_seqlens [S + 1]``."""
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(
                f"{name} has shape {list(shape)}; it must be [S, T], or packed [N] with cu_seqlens [S + 1]"
            )
        return Layout(shape, shape[0] * shape[1], shape[0], device)
    if len(shape) != 1:
        raise ValueError(f"cu_seqlens is given with {name} padded; it must be None, or {name} packed")
    check_dense("cu_seqlens", cu_seqlens, "integer")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [S + 1], an integer tensor")
    cu_seqlens = check_tensor("cu_seqlens", cu_seqlens, "integer", {"[S + 1]": tuple(cu_seqlens.shape)}, device)
    offsets, poison = torch.ops.egpo_kernels.sequence_offsets(cu_seqlens, shape[0])
    return Layout(shape, shape[0], cu_seqlens.shape[0] - 1, device, offsets, poison)


def one_sequence(shape: tuple[int, ...], device: torch.device) -> Layout:
    """Describe packed per-token tensors ``[N]`` where it does not matter which sequence a token is in."""
    return Layout(shape, shape[0], 1, device)


def counted(mask: Any, tokens: Tensor | None, layout: Layout) -> Tensor:
    """Return the rows that count, ``[N]`` bool: ``mask``, else ``tokens != -100``, else every row in a sequence."""
    flat = None if mask is None else layout.per_token("mask", mask, "real")
    return counted_rows(flat, tokens, layout.known_offsets, layout.num_rows, layout.device)


def temperature_field(temperature: Tensor, layout: Layout, counts: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Temperatures of tokens, of sequences or of all, NaN where they can be read two ways that differ; and of which."""
    if temperature.dim() == 0:
        number = check_tensor("temperature", temperature, "real", {}, layout.device)
        return number.detach().reshape(1), FOR_ALL
    values, kind, sound = layout.field("temperature", temperature, "real", counts)
    values = values.detach()
    return values if sound is None else values * sound, kind


def group_ids(
    groups: Any, num_sequences: int, device: torch.device, group_size: int | None
) -> tuple[Tensor | None, int]:
    """Return group ids ``[S]`` int64 on ``device`` from a tensor, a list or a numpy array; from an int G None and G.

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
        return None, groups
    if isinstance(groups, Tensor):
        home = groups.device if groups.device.type == "cpu" else device
        ids = check_tensor("groups", groups, "integer", {"[S]": (num_sequences,)}, home).long()
    else:
        ids = _numbered(groups, num_sequences)
    if ids.device == device:
        return ids, 0
    check_complete(ids, group_size)
    return to_device("groups", ids, device, "it must be a tensor there, or an int"), 0


def consecutive_ids(count: int, members: int, device: torch.device) -> Tensor:
    """Ids ``[S]`` of groups of so many members in a row."""
    return torch.arange(count, device=device) // members


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
