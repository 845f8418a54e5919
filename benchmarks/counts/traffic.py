"""Exact memory traffic of Triton kernels, counted while they run interpreted on CPU tensors.

    with count_traffic() as traffic:
        grad = backward(logits)                 # launches any number of kernels

    traffic.kernels                             # Counter({"backward_kernel": 1})
    traffic.of(logits)                          # TensorTraffic(launches=1, loaded=..., ...)
    traffic.of(grad)                            # fresh tensors are asked about afterwards
    traffic.of(logits[2, 5]).loaded             # any view: 0 says that row was never read
    traffic.rows_loaded(logits)                 # [0, 1, 3]: the rows with at least one byte read
    traffic.launches[0].of(logits)              # the same for one launch

Each launch keeps, for every storage among its arguments, how often each byte was loaded and stored. A tensor
is then any set of bytes of a storage, so a strided view counts its own elements and not the gaps between. A
masked-off lane touches nothing. An atomic operation counts as one load and one store of its element.

Freed memory that a later tensor reuses is not mixed up: a storage is told by its identity in the launch that
used it, not by its address. Only weak references are held. They keep the identity from being given out again
but not the data from being freed, so an address that would be reused without counting is reused with it.

An access outside every tensor argument raises before it happens: it would read or overwrite foreign memory.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from triton.runtime import interpreter


class TensorTraffic(NamedTuple):
    """Bytes moved between kernels and one tensor, summed over launches.

    `loaded` counts every access, `loaded_once` a byte once however often its launch reads it: what a perfect
    cache that lives as long as a launch leaves for memory. `stored` and `stored_once` likewise.
    """

    launches: int
    loaded: int
    loaded_once: int
    stored: int
    stored_once: int


NO_TRAFFIC = TensorTraffic(0, 0, 0, 0, 0)


class _Storage:
    """How often one launch loaded and stored each byte of one storage."""

    def __init__(self, storage):
        self.identity = StorageWeakRef(storage)
        self.start = storage.data_ptr()
        self.loads = np.zeros(storage.nbytes(), np.uint32)
        self.stores = np.zeros(storage.nbytes(), np.uint32)

    def moved(self, own: np.ndarray | slice = slice(None)) -> TensorTraffic:
        """The traffic with its own bytes among these."""
        loads, stores = self.loads[own], self.stores[own]
        loaded, loaded_once, stored, stored_once = (
            int(count) for counts in (loads, stores) for count in (counts.sum(), np.count_nonzero(counts))
        )
        return TensorTraffic(int(loaded + stored > 0), loaded, loaded_once, stored, stored_once)


class Launch:
    """One kernel launch: its name and the traffic of every storage it was given."""

    def __init__(self, kernel: str, storages):
        self.kernel = kernel
        # An argument may be passed twice and its storage must be counted once.
        self._storages = {storage._cdata: _Storage(storage) for storage in storages}

    def count(self, kind: str, addresses: np.ndarray, itemsize: int) -> None:
        """Adds one load or store (`kind`: "loads", "stores") of `itemsize` bytes at every address."""
        left = len(addresses)
        for storage in self._storages.values():
            counts = getattr(storage, kind)
            offsets = addresses.astype(np.int64) - storage.start
            offsets = offsets[(offsets >= 0) & (offsets + itemsize <= len(counts))]
            for byte in range(itemsize):
                np.add.at(counts, offsets + byte, 1)
            left -= len(offsets)
        if left > 0:
            total = len(addresses)
            raise IndexError(f"{self.kernel}: {left} of {total} {kind} lie outside every tensor argument")

    def of(self, tensor: torch.Tensor) -> TensorTraffic:
        """The traffic of this launch with `tensor`, which may be any view."""
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        return NO_TRAFFIC if storage is None else storage.moved(_bytes_of(tensor))

    @property
    def total(self) -> TensorTraffic:
        """The traffic of this launch with every tensor."""
        return _sum(storage.moved() for storage in self._storages.values())._replace(launches=1)


class Traffic:
    """All launches inside one `count_traffic` block, in order."""

    def __init__(self):
        self.launches: list[Launch] = []

    @property
    def kernels(self) -> Counter:
        """How many times each kernel was launched, by name."""
        return Counter(launch.kernel for launch in self.launches)

    def of(self, tensor: torch.Tensor) -> TensorTraffic:
        """The traffic of all launches with `tensor`, which may be any view."""
        return _sum(launch.of(tensor) for launch in self.launches)

    @property
    def total(self) -> TensorTraffic:
        """The traffic of all launches with every tensor."""
        return _sum(launch.total for launch in self.launches)

    def rows_loaded(self, tensor: torch.Tensor) -> list[int]:
        """The indices into the first dimension under which at least one byte was loaded."""
        return [row for row in range(len(tensor)) if self.of(tensor[row]).loaded]


def _sum(each: Iterable[TensorTraffic]) -> TensorTraffic:
    return TensorTraffic(*(sum(field) for field in zip(NO_TRAFFIC, *each, strict=True)))


@contextlib.contextmanager
def count_traffic():
    """Counts the traffic of every kernel launched inside the block; yields a `Traffic`."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 first")
    traffic = Traffic()
    memory = interpreter._interpreter
    launch, load, store = interpreter.GridExecutor.__call__, memory.load, memory.store
    atomic_rmw, atomic_cas = memory.atomic_rmw, memory.atomic_cas

    def counted_launch(self, *args, **kwargs):
        storages = [tensor.untyped_storage() for tensor in tensors((args, tuple(kwargs.values())))]
        traffic.launches.append(Launch(self.fn.__name__, storages))
        return launch(self, *args, **kwargs)

    def count(kind, pointers, mask, itemsize):
        pointers = np.asarray(pointers)
        traffic.launches[-1].count(kind, pointers[np.broadcast_to(mask, pointers.shape)], itemsize)

    def counted_load(pointers, mask, other, dtype):
        count("loads", pointers, mask, np.dtype(dtype).itemsize)
        return load(pointers, mask, other, dtype)

    def counted_store(pointers, value, mask):
        count("stores", pointers, mask, value.dtype.itemsize)
        return store(pointers, value, mask)

    def counted_atomic_rmw(operation, pointers, value, mask, semantic):
        for kind in ("loads", "stores"):
            count(kind, pointers, mask, value.dtype.itemsize)
        return atomic_rmw(operation, pointers, value, mask, semantic)

    def counted_atomic_cas(pointers, compare, value, semantic):
        for kind in ("loads", "stores"):
            count(kind, pointers, True, value.dtype.itemsize)
        return atomic_cas(pointers, compare, value, semantic)

    # Every form of access (masked, block pointer, tensor descriptor, atomic) ends in one of these four
    # extension functions; the Python methods above them change their arguments between Triton versions.
    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_launch),
        mock.patch.object(memory, "load", counted_load),
        mock.patch.object(memory, "store", counted_store),
        mock.patch.object(memory, "atomic_rmw", counted_atomic_rmw),
        mock.patch.object(memory, "atomic_cas", counted_atomic_cas),
    ):
        yield traffic


def tensors(argument: Any) -> Iterator[torch.Tensor]:
    """The tensors among a kernel's arguments, through tuples, tensor descriptors and reinterpreted tensors."""
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, tuple):
        for member in argument:
            yield from tensors(member)
    elif hasattr(argument, "base"):
        yield from tensors(argument.base)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A mask over the bytes of the tensor's storage: those that belong to its elements."""
    own = np.zeros(tensor.untyped_storage().nbytes(), bool)
    size = tensor.element_size()
    elements = np.lib.stride_tricks.as_strided(
        own[tensor.storage_offset() * size :],
        shape=(*tensor.shape, size),
        strides=(*(stride * size for stride in tensor.stride()), 1),
    )
    elements[...] = True
    return own
