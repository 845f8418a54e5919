"""Lines on the screen: coloured where rich is installed and a terminal reads them, else plain."""

import contextlib
import sys
from collections.abc import Iterator

try:
    from rich.console import Console
    from rich.text import Text
except ImportError:
    RICH = False
else:
    RICH = True


class Screen:
    """Where a command writes."""

    def __init__(self) -> None:
        self.console = Console() if RICH and sys.stdout.isatty() else None

    def line(self, text: str = "", style: str = "") -> None:
        """Write a line at once; ``style`` is one of rich's."""
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(Text(text, style=style), soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Say, on a terminal only, what is going on meanwhile."""
        with contextlib.nullcontext() if self.console is None else self.console.status(text):
            yield
