"""Jobs one after the other, each answer written as it comes, in a process that may lose its CUDA context."""

from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.gpu import lines
from benchmarks.gpu.lines import Entry

Jobs = Iterator[tuple[str, Callable[[], Entry]]]
"""A name and what makes an entry, each to be called before the next is asked for."""
SIGNS = (
    "CUDA error",
    "Triton Error [CUDA]",
    "illegal memory access",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
)


def context_is_lost(error: BaseException) -> bool:
    """Whether every later call of the process fails too, read from what the error says, and those it came from; a
    failed assertion only quotes.
    """
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        following = following.__cause__ or following.__context__
    return any(sign in str(one) for one in seen for sign in SIGNS if not isinstance(one, AssertionError))


def guarded(name: str, jobs: Jobs) -> Jobs:
    """``jobs``, and a last one that says so where what they share cannot be made; those after them are still asked."""
    try:
        yield from jobs
    except Exception as error:
        trouble = error

        def fail() -> Entry:
            raise trouble

        yield name, fail


def ask(jobs: Jobs, path: Path) -> int:
    """Append each answer to ``path``, also of a job that fails; what is begun there is not asked again.

    Returns an exit status: 0, or 1 where the CUDA context is lost, which ends it.
    """
    begun, died = lines.known(path)
    for name in died:
        lines.append(path, **trouble(name, lines.DIED))
    for number, (what, job) in enumerate(jobs):
        name = f"{number} {what}"
        if name in begun:
            continue
        lines.append(path, started=name)
        try:
            lines.append(path, **job(), of=name)
        except Exception as error:
            lines.append(path, **trouble(name, f"{type(error).__name__}: {error}"[:2000]))
            if context_is_lost(error):
                return 1
    lines.append(path, finished=0)
    return 0


def trouble(name: str, message: str) -> Entry:
    """What is written in place of an answer."""
    return {"kind": "trouble", "of": name, "message": message, "right": False}
