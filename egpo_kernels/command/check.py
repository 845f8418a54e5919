"""`egpo-kernels check`: every kernel against `reference` in float64 on this machine, and its bandwidth."""

import os
import time

import numpy as np
import torch

from egpo_kernels.command.bandwidth import rates
from egpo_kernels.command.checks import Verdict, checks, verdict
from egpo_kernels.command.info import describe, devices
from egpo_kernels.command.screen import Screen
from egpo_kernels.engine.dispatch import choose_backend

WRONG = 1
ROW = "{:<48}  {:<24}  {:<21}  {:>7}  {:>7}  {}"
HEAD = ROW.format("kernel", "worst on", "in", "error", "allowed", "")


def find_device(name: str | None) -> torch.device:
    """The device of that name; without one the accelerator's first, or the CPU where that cannot hold float64.

    Raises:
        ValueError: There is none of that name here.
    """
    here = devices()
    if name is None:
        return next(device for device in [*here[1:2], here[0]] if not refused(device))
    why = refused(name)
    if why:
        raise ValueError(f"--device is {name!r}, which {why}; it must be one of {', '.join(map(str, here))}")
    return torch.device(name)


def refused(device: torch.device | str) -> str:
    """Why float64 numbers, which everything is compared with, cannot be on a device; empty where they can."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        return f"torch cannot use for float64 ({str(error).splitlines()[0]})"
    return ""


def find_backends(name: str, device: torch.device) -> list[str]:
    """What is to be checked: what ``auto`` takes; on a CPU the interpreted kernels too, where they can run.

    Raises:
        ValueError: A backend that cannot run on ``device``, or `reference`, which is what all are checked against.
        RuntimeError: Triton is asked for and not installed.
    """
    found = [choose_backend(name, device)]
    if found == ["reference"]:
        raise ValueError("EGPO_KERNELS_BACKEND is 'reference', which everything is checked against; unset it")
    if name == "auto" and found == ["portable"] and interprets():
        try:
            found.append(choose_backend("triton", device))
        except RuntimeError:
            return found
    return found


def interprets() -> bool:
    """Whether triton's kernels run interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def show(screen: Screen, device: torch.device, backends: list[str]) -> int:
    """Check and say what came of it; 1 where something is off."""
    start, found = time.perf_counter(), describe(device)
    screen.line(f"{device}: " + ", ".join(f"{name} {value}" for name, value in found.items()))
    wrong: list[str] = []
    for backend in backends:
        interpreted = backend == "triton" and interprets()
        screen.line()
        screen.line(f"{backend}, interpreted" if interpreted else backend, "bold")
        screen.line(HEAD.rstrip())
        wrong += _kernels(screen, device, backend, interpreted)
        if not interpreted:
            _bandwidth(screen, device, backend)
    screen.line()
    for text in wrong:
        screen.line(f"WRONG {text}", "red")
    seconds = time.perf_counter() - start
    screen.line(f"{len(wrong)} wrong, in {seconds:.0f} s" if wrong else f"all right, in {seconds:.0f} s")
    return WRONG if wrong else 0


def _kernels(screen: Screen, device: torch.device, backend: str, interpreted: bool) -> list[str]:
    wrong = []
    with screen.waiting("drawing batches"):
        every = checks(device, interpreted)
    for check in every:
        # The interpreter computes with numpy, which warns where a GPU is silent: of masked lanes.
        with screen.waiting(check.what), np.errstate(all="ignore" if interpreted else None):
            found = verdict(check, backend)
        screen.line(row(found), "red" if found.wrong else "")
        wrong += found.wrong
    return wrong


def row(found: Verdict) -> str:
    """A verdict as a line of the table."""
    worst = found.worst
    numbers = (f"{worst.error:.1e}", f"{worst.allowed:.1e}", "WRONG" if found.wrong else "ok")
    return ROW.format(found.what, found.on, found.output, *numbers)


def _bandwidth(screen: Screen, device: torch.device, backend: str) -> None:
    screen.line()
    try:
        with screen.waiting("bandwidth"):
            found = list(rates(device, backend))
    except RuntimeError as error:
        screen.line(f"bandwidth not measured: {str(error).splitlines()[0]}")
        return
    for rate in found:
        screen.line(
            f"{rate.what:<48}  {rate.on:<24}  {rate.bytes_per_second / 1e9:8.1f} GB/s {rate.of_copy:>8.0%} of the copy"
        )
