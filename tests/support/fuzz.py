"""What every fuzz test asserts: an error that names an argument, and arguments that nobody changed."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck
from torch import Tensor

CALM = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
"""Settings of hypothesis: the same examples every time, whatever the machine."""


def memory(value: Any) -> Any:
    """What an argument holds, bit for bit, the gaps of a view among it; None where that cannot be told."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided or value.is_nested:
        return None
    held = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
    return held.cpu().numpy().tobytes()


def writes(value: Any) -> int | None:
    """How often a tensor was written to, as autograd counts."""
    return None if not isinstance(value, Tensor) or value.is_inference() else value._version


def untouched(arguments: Mapping[str, Any], written: Iterable[str] = ()) -> Callable[[bool], None]:
    """A check, to be made after a call, that no argument but the written ones was changed by it."""
    before = {key: (memory(value), writes(value)) for key, value in arguments.items()}

    def check(succeeded: bool) -> None:
        for key, (held, count) in before.items():
            # The operators that write in place count a write before they look at what they were given.
            assert key in written or writes(arguments[key]) == count, key
            assert (succeeded and key in written) or memory(arguments[key]) == held, key

    return check


def attempt(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The result of one call, None where it refused as it should; nothing was changed."""
    check, result = untouched(arguments), None
    try:
        result = function(**arguments)
    except (ValueError, TypeError) as error:
        refusal(error, arguments)
    check(succeeded=result is not None)
    return result


def refusal(error: Exception, names: Iterable[str]) -> None:
    """Each message names an argument (or a setting) that could be given, and says what it must be."""
    known = "|".join(map(re.escape, names))
    assert re.search(rf"(?<!\w)({known})(?!\w)", str(error)) and "must" in str(error), error
