"""Ranks of one process: each is a thread, and one runs at a time, until it waits for what the others have to say.

So an exchange is real, and everything else is as in one process: no pool, no transport, no time, no chance.
"""

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_names = itertools.count()


class Deadlock(RuntimeError):
    """A rank waits for one that has ended."""


class World:
    """What ranks of one group say to one another, and whose turn it is; ``calls`` are (rank, collective, bytes)."""

    def __init__(self, size: int) -> None:
        self.size, self.turn, self.ended = size, threading.Lock(), 0
        self.changed = threading.Condition(self.turn)
        self.said: dict[tuple[str, int], dict[int, Any]] = {}
        self.calls: list[tuple[int, str, int]] = []

    def meet(self, rank: int, number: int, kind: str, value: Tensor) -> list[Tensor]:
        """What all ranks say in their meeting of this ``number``, in their order."""
        self.calls.append((rank, kind, value.numel() * value.element_size()))
        here = self.said.setdefault((kind, number), {})
        here[rank] = value.clone()
        self.changed.notify_all()
        while len(here) < self.size:
            if self.ended:
                raise Deadlock(f"rank {rank} waits in {kind} {number} for a rank that has ended")
            self.changed.wait()
        shapes = {tuple(each.shape) for each in here.values()}
        if len(shapes) > 1:
            raise Deadlock(f"ranks come to {kind} {number} with shapes {shapes}, which would hang or corrupt memory")
        return [here[each] for each in range(self.size)]


class Done(dist.Work):
    """Work that is done, but only looked at as `wait` is called: what is read before holds NaN."""

    def __init__(self, target: Tensor, value: Tensor, deferred: bool) -> None:
        super().__init__()
        self.target, self.value = target, value
        if not deferred:
            self.wait()
        elif target.is_floating_point():
            target.fill_(torch.nan)

    def wait(self, timeout: Any = None) -> bool:
        """The result comes now."""
        self.target.copy_(self.value.view(self.target.shape))
        return True


class Group(dist.ProcessGroup):
    """One rank's handle of a group of `World`."""

    def __init__(self, world: World, rank: int) -> None:
        super().__init__(rank, world.size)
        self.world, self.number, self.name = world, 0, f"simulated {next(_names)}"

    @property
    def group_name(self) -> str:
        """Under which it is registered."""
        return self.name

    def _meet(self, kind: str, value: Tensor) -> list[Tensor]:
        self.number += 1
        return self.world.meet(self.rank(), self.number, kind, value)

    def getBackendName(self) -> str:
        """As torch asks for it."""
        return "simulated"

    def _allgather_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Done:
        return Done(output, torch.cat([part.flatten() for part in self._meet("all_gather", given)]), True)

    all_gather_single = _allgather_base

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Done:
        """Sums only."""
        return Done(tensors[0], sum(self._meet("all_reduce", tensors[0])[1:], self._last(0)), True)

    def _last(self, rank: int) -> Tensor:
        return self.world.said["all_reduce", self.number][rank]

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Done:
        total = torch.stack(self._meet("reduce_scatter", given)).sum(0)
        return Done(output, total.view(self.size(), -1)[self.rank()], False)

    reduce_scatter_single = _reduce_scatter_base


@contextlib.contextmanager
def _registered(groups: list[Group]) -> Iterator[None]:
    names = [group.group_name for group in groups]
    for name, group in zip(names, groups, strict=True):
        dist.distributed_c10d._register_process_group(name, group)
    try:
        yield
    finally:
        for name in names:
            dist.distributed_c10d._unregister_process_group(name)


def in_ranks(size: int, function: Callable[[int, Group], Any]) -> SimpleNamespace:
    """``results`` of ``function(rank, group)`` in the order of ranks, and the ``calls`` of collectives.

    What a rank raises is raised here, after all have ended.
    """
    logging.getLogger("c10d-NullHandler-default").disabled = True  # it repeats what is raised
    world = World(size)
    groups = [Group(world, rank) for rank in range(size)]
    results: list[Any] = [None] * size
    raised: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        with world.turn:
            try:
                results[rank] = function(rank, groups[rank])
            except BaseException as error:
                raised[rank] = error
            world.ended += 1
            world.changed.notify_all()

    with _registered(groups):
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    errors = [error for error in raised if error is not None]
    for error in sorted(errors, key=lambda each: isinstance(each, Deadlock)):
        raise error
    return SimpleNamespace(results=results, calls=world.calls)
