"""Everything a CUDA machine should answer, in stages that fit a quarter of an hour, written to a folder as it comes.

    python -m benchmarks.gpu                            # first, tests, bench, dram, sanitizer
    python -m benchmarks.gpu --only first,dram --out d  # some of it
    python -m benchmarks.gpu --dry-run                  # the same on a CPU, tiny: does the command itself work

``first.json``, ``tests.json`` and so on are written as each stage ends, and ``gpu.md`` of all that the folder holds;
``logs`` keeps what each command printed, and its results line by line.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import wheels
from benchmarks.gpu.budget import limit_of
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import STAGES, attempt, gather, save
from benchmarks.gpu.tables import markdown
from benchmarks.machine import ROOT, describe


def stages_of(text: str) -> list[str]:
    """Stage names in their order, from what ``--only`` was given."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no stage; it must be some of {','.join(STAGES)}")
    return [name for name in STAGES if name in names]


def folder(device: str, dry: bool) -> Path:
    """Where results go unless told otherwise; below ``OUT`` where the environment says that this comes back."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    results = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    return results / (f"{slug}-dry-run" if dry else slug)


def walk(names: list[str], plan: Plan, start: float) -> list[str]:
    """Run the stages one after the other, and write what is known after each; their statuses."""
    statuses = []
    plan.out.mkdir(parents=True, exist_ok=True)
    brought = None if plan.dry else wheels.install(plan.log("wheels.txt"))
    machine = {**describe(plan.device), "from .whl": brought or "nothing"}
    print(f"from .whl: {machine['from .whl']}", flush=True)
    for name in names:
        limit = limit_of(name, names, time.monotonic() - start, plan.dry)
        print(f"{name}: at most {limit:.0f} s", flush=True)
        record = attempt(name, plan, limit)
        save(name, {"machine": machine, "dry_run": plan.dry, "limit": round(limit), **record}, plan.out)
        (plan.out / "gpu.md").write_text(markdown(gather(plan.out)))
        print(f"{name}: {record['status']} after {record['seconds']:.0f} s {record.get('reason', '')}", flush=True)
        statuses.append(record["status"])
    return statuses


def main(arguments: list[str] | None = None) -> int:
    """0 when every stage passed or had nothing to run with, 1 otherwise, 2 without a GPU."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    every = list(STAGES)
    parser.add_argument("--only", type=stages_of, default=every, metavar="STAGE[,STAGE..]", help=",".join(every))
    parser.add_argument("--out", type=Path, help="results (default <device> in benchmarks/results, or in $OUT)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device here: run this on one, or try the command itself with --dry-run", file=sys.stderr)
        return 2
    out = options.out or folder(str(describe("cpu" if options.dry_run else "cuda")["device"]), options.dry_run)
    statuses = walk(options.only, Plan(out.resolve(), options.dry_run), start)
    print(f"written to {out}")
    return int("failed" in statuses or "killed" in statuses)


if __name__ == "__main__":
    sys.exit(main())
