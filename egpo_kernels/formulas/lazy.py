"""Metrics as a dict that is filled from its vector when somebody looks, which for most micro-batches nobody does."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

# One for all: it is held once per dict, for as long as it takes to fill it. Filling may run a caller's dispatch mode.
_LOCK = threading.RLock()


class _Unread:
    """What C code that reads a dict past its methods finds in place of a value: it can make nothing of it."""

    def __repr__(self) -> str:
        return "<metric that was read past the methods of its dict; pass dict(metrics)>"


class Part(NamedTuple):
    """Entries of one vector, at ``places``, under the keys of ``unread``."""

    vector: Tensor
    unread: dict[str, Any]
    places: Sequence[int]


def unread(keys: Iterable[str]) -> dict[str, Any]:
    """Return the dict of these keys that lazy ones are copied from."""
    return dict.fromkeys(keys, _Unread())


def _looking(method: Callable) -> Any:
    """Fill the dict first, and another that it is compared with."""

    @functools.wraps(method)
    def after_filling(*args: Any, **kwargs: Any) -> Any:
        for it in args:
            if isinstance(it, LazyMetrics) and it._parts:
                it._fill()
        return method(*args, **kwargs)

    return after_filling


class LazyMetrics(dict[str, Any]):
    """A dict of detached 0-d tensors by name, made of whole vectors when a value is first asked for.

    Its keys are there from the start. Its copies and what torch's pytree makes of it are plain dicts, and its pickle is
    an `OrderedDict`, which ``torch.load(weights_only=True)`` reads. Made like a dict, it holds what it is given.
    """

    _parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, *parts: Part) -> "LazyMetrics":
        """Name entries of vectors; of two with the same key the later counts."""
        made = cls(parts[0].unread)
        for part in parts[1:]:
            dict.update(made, part.unread)
        made._parts = parts
        return made

    def _fill(self) -> None:
        with _LOCK:
            for vector, keys, places in self._parts:
                entries = vector.unbind()
                dict.update(self, {key: entries[place] for key, place in zip(keys, places, strict=True)})
            # Last, so that whoever finds none left also finds the values.
            self._parts = ()

    # Overridden so that C code that copies a dict does so through `keys` and `__getitem__`.
    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return deepcopy(dict(self), memo)

    # What needs the values, or changes them.
    __getitem__: Any = _looking(dict.__getitem__)
    __setitem__: Any = _looking(dict.__setitem__)
    __delitem__: Any = _looking(dict.__delitem__)
    __eq__: Any = _looking(dict.__eq__)
    __ne__: Any = _looking(dict.__ne__)
    __or__: Any = _looking(dict.__or__)
    __ror__: Any = _looking(dict.__ror__)
    __ior__: Any = _looking(dict.__ior__)
    __repr__: Any = _looking(dict.__repr__)
    get: Any = _looking(dict.get)
    items: Any = _looking(dict.items)
    values: Any = _looking(dict.values)
    pop: Any = _looking(dict.pop)
    popitem: Any = _looking(dict.popitem)
    setdefault: Any = _looking(dict.setdefault)
    update: Any = _looking(dict.update)
    clear: Any = _looking(dict.clear)
    copy: Any = __copy__


def merged(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ``{**first, **second}``; two that nobody has looked at stay so."""
    if type(first) is type(second) is LazyMetrics:
        parts = first._parts, second._parts  # once: another thread may be filling them
        if all(parts):
            return LazyMetrics.of(*parts[0], *parts[1])
    return {**first, **second}


def _flatten(metrics: LazyMetrics) -> tuple[list[Any], list[str]]:
    return list(metrics.values()), list(metrics)


def _flatten_with_keys(metrics: LazyMetrics) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(key), value) for key, value in metrics.items()], list(metrics)


def _unflatten(values: Iterable[Any], keys: list[str]) -> dict[str, Any]:
    return dict(zip(keys, values, strict=True))


pytree.register_pytree_node(
    LazyMetrics,
    _flatten,
    _unflatten,
    serialized_type_name="egpo_kernels.LazyMetrics",
    flatten_with_keys_fn=_flatten_with_keys,
)
