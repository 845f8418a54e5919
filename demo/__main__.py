"""The demo's command line: `python -m demo --recipe egpo --steps 12 --seed 0 --out demo-out`."""

import argparse
import math
import sys
from pathlib import Path

from demo.settings import Settings
from egpo_kernels import recipes

DEFAULT_STEPS = 12
INTERRUPTED = 130


def main() -> int:
    """Runs the demo; returns the exit code, 130 after Ctrl-C."""
    parser = _parser()
    given = parser.parse_args()
    if given.no_replay and given.top_p == 1:
        parser.error("no-replay is given with top-p 1, where nothing is kept to replay; top-p must be below 1 with it")
    replay = given.top_p < 1 and not given.no_replay
    settings = Settings(given.recipe, given.steps, given.seed, given.fused_linear, given.top_p, replay)
    try:
        # transformers takes seconds to import, and a wrong argument should be answered at once.
        from demo.run import run

        finished = run(settings, given.out)
    except KeyboardInterrupt:
        print("Stopped before the first step: nothing to report.", file=sys.stderr)
        finished = False
    return 0 if finished else INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Trains SmolLM2-135M-Instruct on small arithmetic and shows what the loss did.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--recipe", type=_recipe, default="egpo", help="the method trained with, by name")
    parser.add_argument("--steps", type=_steps, default=DEFAULT_STEPS, help="optimizer steps, 64 answers each")
    parser.add_argument("--seed", type=_seed, default=0, help="chooses the training prompts and the sampled answers")
    parser.add_argument("--out", type=_folder, default="demo-out", help="folder for log, rollouts and pictures")
    parser.add_argument(
        "--fused-linear", action="store_true", help="train without whole logits, from hidden states and output layer"
    )
    parser.add_argument(
        "--top-p", type=_top_p, default=1.0, help="sample from the fewest tokens that hold this probability"
    )
    parser.add_argument(
        "--no-replay", action="store_true", help="train over the whole vocabulary, not over what top-p kept"
    )
    return parser


def _recipe(name: str) -> recipes.Recipe:
    try:
        return recipes.get(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"steps is {text!r}; it must be a whole number, 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"seed is {text!r}; it must be a whole number, 0 or more")
    return int(text)


def _top_p(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"top-p is {text!r}; it must be a number above 0 and at most 1")
    return value


def _folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = (
            f"out is {text!r}; it must be a folder, or a new one's name where files may be written ({error.strerror})"
        )
        raise argparse.ArgumentTypeError(message) from None
    return path


if __name__ == "__main__":
    sys.exit(main())
