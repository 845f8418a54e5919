"""Modules of a stack that is not here."""

import sys
from types import ModuleType
from typing import Any

import pytest


def stand_in(patch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    """A module of a stack that is not here, with the names that a page imports."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        if package not in sys.modules:
            module = ModuleType(package)
            module.__path__ = []
            patch.setitem(sys.modules, package, module)
    for key, value in names.items():
        patch.setattr(sys.modules[name], key, value, raising=False)
