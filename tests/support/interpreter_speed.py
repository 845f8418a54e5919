"""Triton's interpreter without its two largest costs, which change no result.

Every call of a device function patches the language anew: within a launch the same modules are patched once. And every
sum or product of whole numbers is looked at for an overflow that nothing but a debugging run would report.
"""

import dataclasses
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__
_patched: list[set[frozenset[str]]] = []


def _patch_once(function: Any) -> Any:
    """As the interpreter's own, but for modules that this launch has patched."""
    seen = frozenset(module.__name__ for module in (tl, tl.core) if module in _modules(function))
    if _patched and seen in _patched[-1]:
        return interpreter._LangPatchScope()
    if _patched:
        _patched[-1].add(seen)
    return _patch_lang(function)


def _modules(function: Any) -> list[Any]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _launch_patched_once(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patched.append(set())
    try:
        return _launch(self, *args, **kwargs)
    finally:
        _patched.pop()


def hurry() -> None:
    """Replace the interpreter's patching, and leave out the checks whose findings it would drop."""
    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _launch_patched_once
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
