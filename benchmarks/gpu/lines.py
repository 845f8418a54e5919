"""Results as they come: one JSON object a line, so that a process that is killed has said what it knew."""

import json
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


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
