"""What a caller says of a vocabulary that is spread over ranks: checked, plain tensors or DTensors."""

import json
import zlib
from reprlib import repr as shown
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from egpo_kernels.inputs.validation import check_whole, environment, is_distributed
from egpo_kernels.parallel.exchange import gather_texts
from egpo_kernels.parallel.shard import Shard

LONG = 1000
"""Names of groups make a longer one."""


class Given(NamedTuple):
    """``vocab_group``, ``vocab_start`` and ``vocab_size`` as the caller gave them, and further arguments of which all
    ranks must give the same.
    """

    group: Any = None
    start: Any = None
    size: Any = None
    options: tuple[Any, ...] = ()

    @property
    def nothing(self) -> bool:
        """Whether none of them was given."""
        return self.group is None and self.start is None and self.size is None

    @property
    def text(self) -> str:
        """The options, without tensors, whose numbers nobody may ask for; the end of a long text by its checksum."""
        text = repr([type(each) if isinstance(each, Tensor) else getattr(each, "json", each) for each in self.options])
        return text if len(text) <= LONG else f"{text[:LONG]} {zlib.crc32(text.encode())}"


NOTHING = Given()


class Placed(NamedTuple):
    """A DTensor's own part of dimension ``dim``: the group over which it is split (None: it is not), where it begins,
    and how long the dimension is.
    """

    group: Any
    start: int
    whole: int


def read_shard(
    name: str, tensor: Any, dim: int, given: Given, summed: tuple[int, ...] = ()
) -> tuple[Tensor, Shard | None]:
    """Return this rank's tensor, of which ``dim`` is the vocabulary, and which columns they are; None: all there are.

    ``summed``: see `local`.

    Raises:
        TypeError: A group that is none, a DTensor that is split in another way.
        ValueError: Columns that do not fit the vocabulary, another group than the DTensor's.
    """
    if given.nothing and not is_distributed(tensor):
        return tensor, None
    start, size = check_whole("vocab_start", given.start, 0, 31), check_whole("vocab_size", given.size, 1, 31)
    group: Any = None if given.group is None else read_group("vocab_group", given.group)
    whole = None
    if is_distributed(tensor):
        # Sequences may be with other ranks, but must be whole.
        placed = read_placement(name, tensor, dim, (0,) if tensor.dim() > 1 and dim else ())
        if given.group is not None and (placed.group is None or placed.group.group_name != group.group_name):
            raise ValueError(
                f"vocab_group is not the group over which {name} is split, {describe(tensor)}; it must be that, or None"
            )
        if start not in (None, placed.start):
            raise ValueError(
                f"vocab_start is {start} with a DTensor whose columns begin at {placed.start}; leave it out"
            )
        group, start, whole, tensor = placed.group, placed.start, placed.whole, local(tensor, summed)
    return tensor, _shard(name, tensor.shape[dim], group, start, size, whole, given.text)


def _shard(
    name: str, columns: int, group: Any, start: int | None, size: int | None, whole: int | None, options: str
) -> Shard | None:
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    if whole is None and start is None:
        start, whole = rank * columns, ranks * columns
    elif whole is None and size is None:
        raise ValueError(f"vocab_start is {start} and vocab_size is None; it must be given too: columns may be uneven")
    most = size if whole is None else whole
    assert start is not None and most is not None
    vocab = most if size is None else size
    wanted = f"{name} has {columns} columns"
    if vocab > most:
        raise ValueError(
            f"vocab_size is {vocab}, and {name} has columns for {most} on {ranks} ranks; it must not be more: pass the "
            "vocab_group of all ranks that have some"
        )
    if ranks == 1 and (start, columns < vocab) != (0, False):
        raise ValueError(
            f"{wanted} from vocab_start {start} on, of vocab_size {vocab}, and no other rank has any; they must be "
            "all: pass vocab_group"
        )
    start, own = min(start, vocab), max(0, min(columns, vocab - start))
    if ranks == 1 and own == columns:
        return None
    return Shard("" if group is None else group.group_name, ranks, start, own, vocab, options)


def read_group(name: str, value: Any) -> Any:
    """The process group that was given as one or as a mesh of one dimension, of which this rank is a member."""
    wanted = "it must be a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, or None"
    group = value
    if dist.is_available() and isinstance(value, DeviceMesh):
        if value.ndim != 1:
            raise ValueError(f"{name} is a DeviceMesh of {value.ndim} dimensions; {wanted}: pass mesh['tp']")
        group = value.get_group()
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        # A group that this rank is no member of is a number.
        raise TypeError(f"{name} is {shown(value)}; {wanted}")
    return group


def read_placement(name: str, tensor: Any, dim: int, rows: tuple[int, ...] = ()) -> Placed:
    """Which mesh dimension splits dimension ``dim`` of a DTensor; others must not, but those among ``rows``.

    ``rows`` are dimensions whose parts go with other tensors' parts.
    """
    dim, found = dim % tensor.dim(), None
    for place, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        plain = type(placement).__name__ == "Shard"
        if plain and placement.dim == dim and found is None:
            found = place
        elif not plain or placement.dim not in rows:
            raise TypeError(
                f"{name} is {describe(tensor)}; it must be split over dimension {dim} by one dimension of the mesh at "
                f"most, and be Replicate() on the others{', or Shard(0)' if rows else ''}: redistribute it"
            )
    if found is None:
        return Placed(None, 0, tensor.shape[dim])
    mesh, whole = tensor.device_mesh, tensor.shape[dim]
    # As torch cuts: parts of equal length, the last of which may be shorter, or nothing.
    start = min(mesh.get_local_rank(found) * -(-whole // mesh.size(found)), whole)
    return Placed(mesh.get_group(found), start, whole)


def local(tensor: Any, summed: tuple[int, ...] = ()) -> Tensor:
    """This rank's part of a DTensor, whose gradient each rank makes a part of along these dimensions of the mesh."""
    if not summed:
        return tensor.to_local()
    from torch.distributed.tensor import Partial

    meant = [Partial() if dim in summed else placement for dim, placement in enumerate(tensor.placements)]
    return tensor.to_local(grad_placements=meant)


def describe(tensor: Any) -> str:
    """What a DTensor is, for a message."""
    return f"a DTensor with placements {tensor.placements} on a mesh of shape {tuple(tensor.device_mesh.shape)}"


def check_alike(shard: Shard | None, device: torch.device, named: dict[str, Any]) -> None:
    """Under ``EGPO_KERNELS_DEBUG_GROUPS=1``, raise on every rank where ranks come with others than are ``named``.

    An exchange among them would wait for ever, and nothing but another exchange can tell.
    """
    if shard is None or shard.size == 1 or environment("EGPO_KERNELS_DEBUG_GROUPS") != "1":
        return
    own = {name: str(value) for name, value in named.items()} | {"options": shard.options}
    for rank, text in enumerate(gather_texts(json.dumps(own), shard.group, shard.size, device)):
        for name, theirs in json.loads(text).items():
            if theirs != own[name]:
                raise ValueError(
                    f"{name} is {own[name]} here and {theirs} on rank {rank} of vocab_group; all ranks must come with "
                    "the same tokens and options"
                )
