"""The console script: `egpo-kernels info` and `egpo-kernels check`."""

import argparse
import os
import sys
from collections.abc import Sequence

import egpo_kernels as ek
from egpo_kernels.command import check, info
from egpo_kernels.command.screen import Screen

CHECKED = ("auto", "triton", "portable")
NOBODY_READS = 141
"""Status where the pipe was closed, as a shell says of a program that SIGPIPE ended."""


def parser() -> argparse.ArgumentParser:
    """Both subcommands and their options."""
    made = argparse.ArgumentParser(prog="egpo-kernels", description=ek.__doc__)
    made.add_argument("--version", action="version", version=ek.__version__)
    commands = made.add_subparsers(dest="command", required=True)
    one = commands.add_parser("info", help="versions, devices, and which backend 'auto' takes: for a bug report")
    one.add_argument("--json", action="store_true", help="the same as JSON")
    one = commands.add_parser("check", help="every kernel against the reference in float64, and its bandwidth")
    one.add_argument("--device", help="cpu, cuda, cuda:1, ...; the accelerator's first where there is one, else cpu")
    one.add_argument("--backend", choices=CHECKED, default="auto", help="what to check (default: what 'auto' takes)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; its status, or `NOBODY_READS`."""
    given = parser().parse_args(arguments)
    try:
        status = run(given, Screen())
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would raise again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    return status


def run(given: argparse.Namespace, screen: Screen) -> int:
    """0, or 1 where a check failed, or 2 where what was asked for cannot run here."""
    if given.command == "info":
        return info.show(screen, given.json)
    try:
        device = check.find_device(given.device)
        backends = check.find_backends(given.backend, device)
    except (ValueError, RuntimeError) as error:
        print(f"egpo-kernels check: {error}", file=sys.stderr)
        return 2
    return check.show(screen, device, backends)
