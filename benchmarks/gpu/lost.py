"""Whether an error means that the process has lost its CUDA context: every later call of it fails too."""

SIGNS = (
    "CUDA error",
    "Triton Error [CUDA]",
    "illegal memory access",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
)


def context_is_lost(error: BaseException) -> bool:
    """Read from what the error says, and those it came from; a failed assertion only quotes."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        following = following.__cause__ or following.__context__
    return any(sign in str(one) for one in seen for sign in SIGNS if not isinstance(one, AssertionError))
