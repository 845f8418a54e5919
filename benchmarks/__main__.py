"""Time, bandwidth, memory and error of this library against what users write by hand and against its rivals.

    python -m benchmarks logits                         # [512 x 151936] on this CPU, float32 and bfloat16
    python -m benchmarks linear --linear 2048x576x49152 # from hidden states [2048 x 576] and a head of 49152
    python -m benchmarks all --device cuda --tokens 2048,8192,32768 --out results
    python -m benchmarks host                           # what a call costs the host: see benchmarks/host.py

Writes benchmarks.json, benchmarks.md and pictures to --out; the first two after every round, so that a run that is
killed has written what it knew.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.batches import DTYPES, SEQUENCES
from benchmarks.machine import describe
from benchmarks.pictures import FAMILIES, draw
from benchmarks.providers import OURS
from benchmarks.report import Report, make_report, markdown, show
from benchmarks.session import Facts, Who, run
from benchmarks.timing import copy_bandwidth
from benchmarks.workloads import HIDDEN, WORKLOADS, Sizes, cases

DEFAULTS = {
    "cpu": {
        "dtype": ["fp32", "bf16"], "tokens": [64, 256, 512], "vocab": [32000, 151936], "linear": [(2048, 576, 49152)],
        "rounds": 7,
    },
    "cuda": {
        "dtype": ["bf16"], "tokens": [2048, 8192, 32768], "vocab": [32000, 151936],
        "linear": [(8192, 4096, 131072), (8192, 2048, 151936)], "rounds": 20,
    },
}  # fmt: skip
HOST = "host"
"""The subcommand that has arguments of its own."""
LONG_ROUNDS = 7
"""Calls as long as those of linear vary little."""


def numbers(text: str) -> list[int]:
    """Comma-separated integers."""
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int, int]]:
    """Comma-separated TOKENSxHIDDENxVOCAB."""
    found = [tuple(int(part) for part in shape.split("x")) for shape in text.split(",")]
    return [(tokens, hidden, vocab) for tokens, hidden, vocab in found]


def names(text: str) -> list[str]:
    """Comma-separated words."""
    return [part.strip() for part in text.split(",") if part.strip()]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with the device's own defaults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="all", choices=[*WORKLOADS, "all"], help="workload (default all; linear is both)"
    )
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=names, help=f"of the logits, among {', '.join(DTYPES)}")
    parser.add_argument("--tokens", type=numbers, help=f"rows of logits, multiples of {SEQUENCES}; several scale")
    parser.add_argument("--vocab", type=numbers, help="vocabularies; several scale")
    parser.add_argument("--linear", type=shapes, metavar="NxHxV", help="tokens, hidden and vocab of linear; several")
    parser.add_argument("--rounds", type=int, help=f"timed calls of each provider, linear {LONG_ROUNDS} at most")
    parser.add_argument("--rivals", type=names, default=["all"], help="all, none, or some of eager, torch.compile, ...")
    parser.add_argument("--last", type=names, default=[], help="some of --rivals, measured after all others")
    parser.add_argument("--out", type=Path, default=Path("benchmark-out"), help="folder (default benchmark-out)")
    parser.set_defaults(**DEFAULTS["cpu"])
    parser.set_defaults(**DEFAULTS[parser.parse_known_args(given)[0].device])
    options = parser.parse_args(given)
    counts = [*options.tokens, *(tokens for tokens, _, _ in options.linear)]
    if any(count < 2 * SEQUENCES or count % SEQUENCES for count in counts):
        parser.error(f"--tokens and those of --linear must be multiples of {SEQUENCES}, at least {2 * SEQUENCES}")
    if min(*options.vocab, *(min(hidden, vocab) for _, hidden, vocab in options.linear)) < 2 or options.rounds < 1:
        parser.error("--vocab, and both of --linear, must be at least 2, --rounds at least 1")
    if unknown := set(options.dtype) - set(DTYPES):
        parser.error(f"--dtype {', '.join(sorted(unknown))}: choose among {', '.join(DTYPES)}")
    if unknown := set(options.rivals) - {"all", "none"} - set(FAMILIES):
        parser.error(f"--rivals {', '.join(sorted(unknown))}: choose all, none or some of {', '.join(FAMILIES)}")
    measured = FAMILIES if "all" in options.rivals else options.rivals
    if unknown := set(options.last) - set(measured):
        parser.error(f"--last {', '.join(sorted(unknown))}: choose among those measured, {', '.join(measured)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == [HOST]:
        from benchmarks import host  # wants triton, which the others do without

        host.main(sys.argv[2:])
        return
    options = arguments()
    chosen = [name for name in WORKLOADS if options.what == "all" or name.startswith(options.what)]
    machine, bandwidth = describe(options.device), copy_bandwidth(options.device)
    sizes = Sizes(options.dtype, options.tokens, options.vocab, options.linear)
    facts: Facts = {}

    def write(known: Facts) -> Report:
        report = make_report(machine, bandwidth, facts | known, options.last)
        (options.out / "benchmarks.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "benchmarks.md").write_text(markdown(report))
        return report

    options.out.mkdir(parents=True, exist_ok=True)
    for late in (False, True) if options.last else (False,):
        for workload in chosen:
            found = list(cases(workload, options.device, sizes))
            rounds = min(options.rounds, LONG_ROUNDS) if WORKLOADS[workload].given == HIDDEN else options.rounds
            facts |= run(found, Who(options.rivals, options.last, late), rounds, write)
            report = write({})
            draw(report | {"results": [one for one in report["results"] if one["workload"] == workload]}, options.out)
    show(report)
    print(f"written to {options.out}: benchmarks.json, benchmarks.md and pictures")
    if any(one["family"] == OURS and one.get("wrong") for one in report["results"]):
        sys.exit(f"{OURS} is too far from float64: see the rows marked FAR OFF")


if __name__ == "__main__":
    main()
