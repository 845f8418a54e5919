"""Count memory traffic, launches, registers and instructions of our kernels and others', without a GPU.

python -m benchmarks.counts                    # writes counts.json and counts.md, prints the table
python -m benchmarks.counts --targets sm_90    # one target
"""

import argparse
import json
from pathlib import Path

from benchmarks.counts.budgets import TARGETS
from benchmarks.counts.collect import LIBRARIES, collect, together
from benchmarks.counts.table import markdown
from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "counts"


def main() -> None:
    """Count, write, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for counts.json and counts.md")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, help="GPUs to compile for")
    options = parser.parse_args()
    with together() as pool:
        counts = collect(options.targets, LIBRARIES, pool)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    (options.out / "counts.md").write_text(markdown(counts))
    print(markdown(counts), end="")


if __name__ == "__main__":
    main()
