"""Triton's interpreter without its largest costs, which change no result.

Every call of a device function patches the language anew: within a launch the same modules are patched once. Every
sum or product of whole numbers is looked at for an overflow that nothing but a debugging run would report. Every value
works out anew what its type is: a shape is made into Triton's objects once, and a dtype into numpy's. And Python keeps
frames in pieces of 16 KiB: a loop that calls over the end of one maps and unmaps memory with every call.
"""

import dataclasses
import functools
import inspect
import math
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__
numpy_dtype = interpreter._get_np_dtype
make_block_type = tl.core.block_type.__init__
make_tensor = tl.core.tensor.__init__
_patched: list[set[frozenset[str]]] = []
_dtypes: dict[str, Any] = {}
_blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}


def _patch_once(function: Any) -> Any:
    """As the interpreter's own, but for modules that this launch has patched."""
    seen = _modules(function)
    if _patched and seen in _patched[-1]:
        return interpreter._LangPatchScope()
    if _patched:
        _patched[-1].add(seen)
    return _patch_lang(function)


@functools.cache
def _modules(function: Any) -> frozenset[str]:
    return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)


@functools.cache
def _builtins(module: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]


def _patch_known_builtins(module: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(module):
        interpreter._patch_attr(module, name, member, builder, scope)


def _with_room_for_frames(function: Any) -> Any:
    """The same function with a frame of a megabyte, whose piece has room for all that it calls."""
    function.__code__ = function.__code__.replace(co_stacksize=2**17)
    return function


@_with_room_for_frames
def _launch_patched_once(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patched.append(set())
    try:
        return _launch(self, *args, **kwargs)
    finally:
        _patched.pop()


def numpy_dtype_once(dtype: Any) -> Any:
    name = dtype.scalar.name
    if name not in _dtypes:
        _dtypes[name] = numpy_dtype(dtype)
    return _dtypes[name]


def _block_type_once(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, tuple(getattr(size, "value", size) for size in shape))
    if key not in _blocks:
        make_block_type(self, element_ty, shape)
        _blocks[key] = dict(self.__dict__)
    self.__dict__.update(_blocks[key], element_ty=element_ty)


@functools.cache
def _sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.core.constexpr(math.prod(shape)), tl.core.tuple([tl.core.constexpr(size) for size in shape])


def _tensor_of_a_known_shape(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _sizes(tuple(type.shape.values) if type.is_block() else ())


def hurry() -> None:
    """Replace what is slow, and leave out the checks whose findings would be dropped; for interpreted kernels alone."""
    interpreter._patch_builtin = _patch_known_builtins
    interpreter._get_np_dtype = numpy_dtype_once
    tl.core.block_type.__init__ = _block_type_once
    tl.core.tensor.__init__ = _tensor_of_a_known_shape
    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _launch_patched_once
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
