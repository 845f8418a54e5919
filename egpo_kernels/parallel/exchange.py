"""What ranks exchange: the only place with a process group, by its name, as an operator's argument can be."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Torch 2.13 gave them other names, and warns of the old ones.
_GATHER: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Pending(NamedTuple):
    """A tensor that is on its way, until `arrived`; ``sent`` must live so long."""

    values: Tensor
    work: Any
    sent: Tensor

    def arrived(self) -> Tensor:
        """The tensor; on a GPU it is its stream that waits."""
        if self.work is not None:
            self.work.wait()
        return self.values


def _group(name: str) -> Any:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def rank_in(group: str) -> int:
    """This process's place in a group, 0 where there is none."""
    return int(_group(group).rank()) if group else 0


def gather(values: Tensor, group: str, size: int) -> Pending:
    """Start to fetch ``values`` of all ``size`` ranks, in their order, ``[P, ...]``; all must have one shape."""
    if size == 1:
        return Pending(values[None], None, values)
    values = values.contiguous()
    found = values.new_empty(size * values.shape[0], *values.shape[1:])
    work = _GATHER(found, values, group=_group(group), async_op=True)
    return Pending(found.view(size, *values.shape), work, values)


def add_up_(values: Tensor, group: str, size: int) -> Pending:
    """Start to replace contiguous ``values`` by their sum over ranks."""
    work = None if size == 1 else dist.all_reduce(values, group=_group(group), async_op=True)
    return Pending(values, work, values)


def scatter_sum(values: Tensor, group: str, size: int) -> Tensor:
    """This rank's part of ``[P, ...]``, summed over ranks."""
    if size == 1:
        return values[0]
    values = values.contiguous()
    found = values.new_empty(values.shape[1:])
    _SCATTER(found, values.flatten(0, 1), group=_group(group))
    return found


def gather_texts(text: str, group: str, size: int, device: torch.device) -> list[str]:
    """Every rank's ``text``, in their order; for debugging, since the host waits."""
    said = torch.tensor([*text.encode()], dtype=torch.uint8, device=device)
    lengths = gather(torch.tensor([said.shape[0]], device=device), group, size).arrived().flatten().tolist()
    padded = torch.nn.functional.pad(said, (0, max(lengths) - said.shape[0]))
    found = gather(padded, group, size).arrived().tolist()
    return [bytes(part[:length]).decode() for part, length in zip(found, lengths, strict=True)]
