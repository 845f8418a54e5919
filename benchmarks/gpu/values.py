"""The checks of `egpo-kernels check` that read logits, of compiled kernels, as jobs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from egpo_kernels.command.checks import Check, of_logits, problems_of_logits, verdict


def compared(check: Check) -> dict[str, Any]:
    """The worst of a check's outputs under the accuracy rule, and what is wrong, if anything is."""
    found = verdict(check, "triton")
    error, allowed, _ = found.worst
    shown = {
        "what": found.what,
        "on": found.on,
        "in": found.output,
        "error": f"{error:.1e}",
        "allowed": f"{allowed:.1e}",
    }
    why = {"wrong": "; ".join(found.wrong)[:2000]} if found.wrong else {}
    return {"kind": "value", **shown, **why, "right": not found.wrong}


def values(device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """A job for each; on a CPU they are interpreted, and small."""
    for check in of_logits(problems_of_logits(torch.device(device), device == "cpu")):
        yield check.what, partial(compared, check)
