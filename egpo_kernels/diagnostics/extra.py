"""The libraries of the extra, imported when they are wanted."""

import importlib
from typing import Any


def wanted(module: str) -> Any:
    """Return an imported module, or raise ImportError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"egpo_kernels.diagnostics needs {module}, which does not import ({error}); install the extra: "
            "pip install 'egpo_kernels[diagnostics]'"
        ) from error
