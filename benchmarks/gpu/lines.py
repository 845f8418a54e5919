"""Results as they come: one JSON object a line, so that a process that is killed has said what it knew."""

import json
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
DIED = "the process ended while it ran"


def append(path: Path, **entry: Any) -> None:
    """Add a line; the file is closed again, so nothing of it waits in a buffer."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[Entry]:
    """All lines, none where there is no file."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut off in the middle
    return found


def known(path: Path) -> tuple[set[str], list[str]]:
    """Names of what an earlier process ``started``, and among them of what has no line that it is the result ``of``."""
    entries = read(path)
    begun = {entry["started"] for entry in entries if "started" in entry}
    return begun, sorted(begun - {entry["of"] for entry in entries if "of" in entry})
