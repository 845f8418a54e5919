"""A step on what the demo's sampler kept: replay takes away a drift that is the probability left out."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")
pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (make demo installs it)")

from demo import __main__ as command
from demo import rollouts
from demo.history import History
from demo.settings import Settings
from demo.summary import summary_rows
from demo.tasks import TASKS
from demo.train import Trainer
from egpo_kernels import recipes
from tests.demo.tiny import make_policy
from tests.support.accuracy import assert_rounding

PROMPTS = ("9 10", "11 12 13 14", "15", "16 17 18")
TOP_P = 0.3


class Problems:
    """As much of a `ProblemSet` as training asks for; answers are right where they are odd in length."""

    def __init__(self):
        self.held_out = [self._problem(TASKS[i % len(TASKS)], prompt) for i, prompt in enumerate(PROMPTS)]

    def next_batch(self):
        return self.held_out

    def _problem(self, task, prompt):
        def reward(text):
            return float(len(text.split()) % 2)

        return SimpleNamespace(task=task, prompt=prompt, question=prompt, expected="odd", reward=reward)


def make_settings(top_p, replay, fused_linear):
    return Settings(recipes.EGPO, steps=1, seed=0, fused_linear=fused_linear, top_p=top_p, replay=replay)


def make_trainer(settings):
    return Trainer(make_policy(settings.fused_linear), Problems(), settings)


def first_step(*asked):
    result = make_trainer(make_settings(*asked)).step(1)
    return result.record, result.rollouts


@torch.no_grad()
def left_out(answers):
    """-log of the probability that each sampled token's kept set holds, by an untrained model's plain forward."""
    model, found = make_policy().model, []
    for answer in answers:
        ids = torch.tensor([*map(int, answer["question"].split()), *answer["tokens"]])[None]
        shares = model(ids).logits[0, -len(answer["tokens"]) - 1 : -1].softmax(-1)
        found += [-row[kept].sum().log() for row, kept in zip(shares, answer["kept"], strict=True)]
    return torch.stack(found)


def assert_no_drift(drift, answers):
    """Nothing but rounding of log-probs as large as these; their size stands in for the zero."""
    largest = max(abs(value) for answer in answers for value in answer["log_probs"])
    largest = torch.tensor(largest, dtype=torch.float64)
    assert_rounding(largest + drift, largest)


@pytest.mark.parametrize("fused_linear", [False, True])
def test_with_replay_there_is_no_drift(fused_linear):
    record, answers = first_step(TOP_P, True, fused_linear)
    assert_no_drift(record["drift"], answers)
    sizes = [len(kept) for answer in answers for kept in answer["kept"]]
    metrics = record["metrics"]
    assert metrics["support/rows/sum"] == metrics["policy/tokens/sum"] == len(sizes)
    assert metrics["support/kept/max"] == max(sizes) and metrics["support/singletons/sum"] == sizes.count(1) > 0
    assert metrics["support/missing_tokens/sum"] == 0
    for ratio in ("min", "mean", "max"):
        assert metrics[f"policy/ratio/{ratio}"] == pytest.approx(1.0, abs=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("fused_linear", [False, True])
def test_without_it_the_drift_is_the_mass_left_out(fused_linear):
    record, answers = first_step(TOP_P, False, fused_linear)
    expected = left_out(answers)
    assert_rounding(torch.tensor(record["drift"], dtype=torch.float64), expected.mean())
    assert 0.01 < record["drift"] < -torch.tensor(TOP_P).log()
    assert not any(name.startswith("support/") for name in record["metrics"])
    assert record["metrics"]["policy/ratio/mean"] == pytest.approx((-expected).exp().mean().item())


def test_both_sample_alike():
    (_, with_replay), (_, without) = (first_step(TOP_P, replay, False) for replay in (True, False))
    assert with_replay == without


@pytest.mark.parametrize("fused_linear", [False, True])
def test_over_the_whole_vocabulary_nothing_drifts_and_nothing_is_recorded(fused_linear):
    record, answers = first_step(1.0, False, fused_linear)
    assert_no_drift(record["drift"], answers)
    assert not any("kept" in answer for answer in answers)
    # As before there was a record: no old log-probs at all.
    assert all(record["metrics"][f"policy/ratio/{ratio}"] == 1 for ratio in ("min", "mean", "max"))


@pytest.mark.parametrize(
    "top_p, replay, words",
    [
        (1.0, False, "the whole vocabulary"),
        (TOP_P, True, "kept tokens replayed"),
        (TOP_P, False, "kept tokens not replayed"),
    ],
)
def test_files_and_summary_say_what_was_sampled_from(tmp_path, top_p, replay, words):
    settings, history = make_settings(top_p, replay, False), History(tmp_path)
    trainer = make_trainer(settings)
    history.add_held_out(trainer.evaluate(0))
    result = trainer.step(1)
    history.add_step(result.record, result.rollouts)
    records = rollouts.read_records(tmp_path)
    assert records == result.rollouts
    rows = dict(summary_rows(settings, history, rollouts.pack(records), 1.0, 1.0))
    assert words in rows["sampled from"]
    assert float(rows["drift from the sampler, step 1"].split()[0]) == round(result.record["drift"], 4)
    sizes = [len(kept) for record in records for kept in record.get("kept", [])]
    assert ("tokens kept, mean" in rows) == (top_p < 1) == bool(sizes)
    if sizes:
        assert rows["tokens kept, mean"] == f"{sum(sizes) / len(sizes):.1f}"
        assert rows["sampled tokens kept alone"] == f"{sizes.count(1) / len(sizes):.0%}"


def asked_for(monkeypatch, tmp_path, *arguments):
    """What the command line makes of its arguments, in place of a run."""
    runs, stand_in = [], ModuleType("demo.run")
    stand_in.run = lambda *given: runs.append(given) or True
    monkeypatch.setitem(sys.modules, "demo.run", stand_in)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), *arguments])
    assert command.main() == 0
    ((settings, folder),) = runs
    assert folder == tmp_path
    return settings


@pytest.mark.parametrize(
    "arguments, expected",
    [([], (1.0, False)), (["--top-p", "0.9"], (0.9, True)), (["--top-p", "0.9", "--no-replay"], (0.9, False))],
)
def test_arguments(monkeypatch, tmp_path, arguments, expected):
    settings = asked_for(monkeypatch, tmp_path, *arguments)
    assert (settings.top_p, settings.replay) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--top-p", "0"], "top-p is '0'; it must be"),
        (["--top-p", "1.5"], "top-p is '1.5'; it must be"),
        (["--top-p", "nan"], "top-p is 'nan'; it must be"),
        (["--top-p", "all"], "top-p is 'all'; it must be"),
        (["--no-replay"], "no-replay is given with top-p 1"),
        (["--no-replay", "--top-p", "1.0"], "no-replay is given with top-p 1"),
    ],
)
def test_bad_arguments(monkeypatch, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        asked_for(monkeypatch, tmp_path, *arguments)
    assert message in capsys.readouterr().err
