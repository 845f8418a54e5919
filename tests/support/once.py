"""A slow result that several tests and several pytest-xdist workers share."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def made_once(tmp_path_factory: Any, name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, as JSON, made by the first worker that asks; the others wait for it."""
    folder = Path(tmp_path_factory.getbasetemp())
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_text(json.dumps(make()))
        return json.loads(file.read_text())
