"""Python code of a page under docs/."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def run_page(name: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a page's blocks in order, with what its reader has at hand; return what they leave."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)
    assert blocks
    space = {"__name__": name, **(names or {})}
    for block in blocks:
        exec(block, space)
    return space


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
