"""Time, bandwidth, memory and error of this library against what users write by hand and against its rivals.

    python -m benchmarks logits                         # [512 x 151936] on this CPU, float32 and bfloat16
    python -m benchmarks all --device cuda --tokens 2048,8192,32768 --out results

Writes benchmarks.json, benchmarks.md and pictures to --out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.pictures import FAMILIES, draw
from benchmarks.providers import OURS
from benchmarks.report import Report, make_report, markdown, show
from benchmarks.session import run
from benchmarks.timing import copy_bandwidth
from benchmarks.workloads import DTYPES, SEQUENCES, WORKLOADS, Case, cases

DEFAULTS = {
    "cpu": {"dtype": ["fp32", "bf16"], "tokens": [64, 256, 512], "vocab": [32000, 151936], "rounds": 7},
    "cuda": {"dtype": ["bf16"], "tokens": [2048, 8192, 32768], "vocab": [32000, 151936], "rounds": 20},
}


def numbers(text: str) -> list[int]:
    """Comma-separated integers."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Comma-separated words."""
    return [part.strip() for part in text.split(",") if part.strip()]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with the device's own defaults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="all", choices=[*WORKLOADS, "all"], help="workload (default all)")
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=names, help=f"of the logits, among {', '.join(DTYPES)}")
    parser.add_argument("--tokens", type=numbers, help=f"rows of logits, multiples of {SEQUENCES}; several scale")
    parser.add_argument("--vocab", type=numbers, help="vocabularies; several scale")
    parser.add_argument("--rounds", type=int, help="timed calls of each provider")
    parser.add_argument("--rivals", type=names, default=["all"], help="all, none, or some of eager, torch.compile, ...")
    parser.add_argument("--out", type=Path, default=Path("benchmark-out"), help="folder (default benchmark-out)")
    parser.set_defaults(**DEFAULTS["cpu"])
    parser.set_defaults(**DEFAULTS[parser.parse_known_args(given)[0].device])
    options = parser.parse_args(given)
    if any(count < 2 * SEQUENCES or count % SEQUENCES for count in options.tokens):
        parser.error(f"--tokens must be multiples of {SEQUENCES}, at least {2 * SEQUENCES}")
    if min(options.vocab) < 2 or options.rounds < 1:
        parser.error("--vocab must be at least 2, --rounds at least 1")
    if unknown := set(options.dtype) - set(DTYPES):
        parser.error(f"--dtype {', '.join(sorted(unknown))}: choose among {', '.join(DTYPES)}")
    if unknown := set(options.rivals) - {"all", "none"} - set(FAMILIES):
        parser.error(f"--rivals {', '.join(sorted(unknown))}: choose all, none or some of {', '.join(FAMILIES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def main() -> None:
    """Measure, print, write; what is known after each workload is written then."""
    options = arguments()
    chosen = list(WORKLOADS) if options.what == "all" else [options.what]
    machine, bandwidth = describe(options.device), copy_bandwidth(options.device)
    facts: dict[tuple[Case, str], dict[str, Any]] = {}
    for workload in chosen:
        sizes = (options.device, options.dtype, options.tokens, options.vocab)
        facts |= run(list(cases(workload, *sizes)), options.rivals, options.rounds)
        report = make_report(machine, bandwidth, facts)
        write(report, options.out)
    show(report)
    print(f"written to {options.out}: benchmarks.json, benchmarks.md and pictures")
    if any(one["family"] == OURS and one.get("wrong") for one in report["results"]):
        sys.exit(f"{OURS} is too far from float64: see the rows marked FAR OFF")


def write(report: Report, out: Path) -> None:
    """JSON, Markdown and pictures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmarks.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "benchmarks.md").write_text(markdown(report))
    draw(report, out)


if __name__ == "__main__":
    main()
