"""Everything a CUDA machine should answer, in nine minutes, written to a folder.

    python -m benchmarks.gpu                            # tests, sanitizer, bench, dram
    python -m benchmarks.gpu --only tests,dram --out d  # some of it
    python -m benchmarks.gpu --dry-run                  # the same on a CPU, tiny: does the command itself work

``gpu.json`` and ``gpu.md`` are written after every step; ``logs`` keeps what each command printed.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.steps import STEPS, Plan, attempt, limit_of, save
from benchmarks.gpu.tables import markdown
from benchmarks.machine import ROOT, describe


def steps_of(text: str) -> list[str]:
    """Step names in their order, from what ``--only`` was given."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no step; it must be some of {','.join(STEPS)}")
    return [name for name in STEPS if name in names]


def folder(device: str, dry: bool) -> Path:
    """Where results go unless told otherwise."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / (f"{slug}-dry-run" if dry else slug)


def walk(names: list[str], plan: Plan) -> dict[str, Any]:
    """Run the steps one after the other, and write what is known after each."""
    start = time.monotonic()
    found: dict[str, Any] = {"machine": describe(plan.device), "dry_run": plan.dry, "steps": {}}
    plan.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        limit = limit_of(name, names, time.monotonic() - start, plan.dry)
        print(f"{name}: at most {limit:.0f} s", flush=True)
        record = attempt(name, plan, limit)
        found["steps"][name] = {**record, "limit": round(limit)}
        save(found, plan.out)
        (plan.out / "gpu.md").write_text(markdown(found))
        print(f"{name}: {record['status']} after {record['seconds']:.0f} s {record.get('reason', '')}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """0 when every step passed or had nothing to run with, 1 otherwise, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=steps_of, default=list(STEPS), metavar="STEP[,STEP..]", help=",".join(STEPS))
    parser.add_argument("--out", type=Path, help="folder for the results (default benchmarks/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device here: run this on one, or try the command itself with --dry-run", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else "cuda"
    out = options.out or folder(str(describe(device)["device"]), options.dry_run)
    found = walk(options.only, Plan(out.resolve(), options.dry_run))
    print(f"written to {out}")
    return int(any(record["status"] in ("failed", "killed") for record in found["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
