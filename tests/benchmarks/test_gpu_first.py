"""The first stage of `python -m benchmarks.gpu`: its questions, and the sweep over launch constants."""

import sys

import pytest
import torch

from benchmarks.gpu import calls, candidates, first, lines, sweep, tables, trial, values
from benchmarks.gpu.ask import ask, guarded
from benchmarks.gpu.candidates import KERNELS, Candidate
from benchmarks.gpu.plan import Plan
from egpo_kernels import triton as backend
from egpo_kernels.triton import launch

CPU = torch.device("cpu")
LOSS, VALUES = "logits_policy_loss_kernel", "row_statistics_kernel"


# Questions.


def answers(path):
    return [entry for entry in lines.read(path) if "of" in entry]


def raising(message):
    def job():
        raise RuntimeError(message)

    return job


def test_answers_are_written_as_they_come_and_a_failure_is_one(tmp_path):
    path = tmp_path / "lines"
    jobs = [("a", lambda: {"kind": "copy", "GB/s": 1}), ("b", raising("no clock")), ("c", lambda: {"kind": "facts"})]
    assert ask(iter(jobs), path) == 0
    assert [entry["kind"] for entry in answers(path)] == ["copy", "trouble", "facts"]
    assert answers(path)[1]["message"] == "RuntimeError: no clock" and not answers(path)[1]["right"]


def test_nothing_is_asked_of_a_lost_context_and_the_next_process_goes_on_behind_it(tmp_path):
    path, lost = tmp_path / "lines", ("a", raising("CUDA error: misaligned address"))
    assert ask(iter([lost, ("a", lambda: pytest.fail("asked"))]), path) == 1
    assert [entry["of"] for entry in answers(path)] == ["0 a"]
    assert ask(iter([lost, ("a", lambda: {"kind": "copy"})]), path) == 0
    assert [(entry["of"], entry["kind"]) for entry in answers(path)] == [("0 a", "trouble"), ("1 a", "copy")]


def test_what_ended_its_process_is_wrong_and_the_rest_is_asked(tmp_path):
    path = tmp_path / "lines"
    lines.append(path, started="0 a")
    assert ask(iter([("a", lambda: pytest.fail("asked")), ("b", lambda: {"kind": "copy"})]), path) == 0
    died, answer = answers(path)
    assert (died["of"], died["message"], died["right"]) == ("0 a", lines.DIED, False) and answer["kind"] == "copy"


def test_what_several_jobs_share_may_fail_and_others_are_still_asked(tmp_path):
    def jobs():
        yield "a", lambda: {"kind": "facts"}
        raise RuntimeError("out of memory")

    path = tmp_path / "lines"
    assert ask(guarded("calls", jobs()), path) == 0
    assert [entry["kind"] for entry in answers(path)] == ["facts", "trouble"]
    assert answers(path)[1]["of"] == "1 calls" and "out of memory" in answers(path)[1]["message"]


def test_what_a_machine_is():
    found = first.machine("cpu")
    assert found["torch"] == torch.__version__ and found["ncu"] and len(found) == len(first.PACKAGES) + 3


def test_values_are_right_and_wrong_ones_are_seen(monkeypatch):
    found = dict(values.values("cpu"))
    assert {"token_log_probs", "logits_policy_loss, in place, active rows", "egpo_loss"} < set(found)
    entry = found["token_log_probs"]()
    assert entry["right"] and float(entry["error"]) <= float(entry["allowed"]) and "wrong" not in entry
    original = backend.logits_gradient

    def doubled(*arguments):
        original(*arguments)
        arguments[-1].mul_(2)

    monkeypatch.setattr(backend, "logits_gradient", doubled)
    entry = found["token_log_probs"]()
    assert not entry["right"] and "gradient of logits" in entry["wrong"]


def test_whole_calls_are_timed_and_their_launches_counted(monkeypatch):
    jobs = calls.calls("cpu", calls.ROWS["cpu"][0])
    names = []
    for name, job in jobs:
        names.append(name)
        if name == "log-probs and entropy":
            entry = job()
    assert names == [label for call in calls.CALLS for label in (call.name, f"launches of {call.name}")]
    assert entry["passes"] == 1 and entry["rows"] == 16 and entry["ms"] > 0 and entry["host ahead"] == "0 of 2"
    seen = [
        {"kernel": "loss", "launches": 1, "us": 900.0},
        {"kernel": "fill", "launches": 3, "us": 6.0},
        {"kernel": "other", "launches": 2, "us": 400.0},
    ]
    monkeypatch.setattr(calls, "launches", lambda *arguments: seen)
    batch = calls.WORKLOADS["logits"].make(calls.Case("logits", "cpu", "bf16", 16, 50))
    found = calls.counted(calls.CALLS[0], batch, "cpu")
    assert (found["launches"], found["small"], found["small us"]) == (6, 3, 6.0)


# Launch constants.


def test_candidates_of_a_hopper(monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    device = torch.device("cuda")
    found = candidates.candidates(device, 151936)
    assert len(found) == len(set(found)) > 60
    # The library's own first, whatever comes of the others.
    assert {one.kernel: one.constants for one in reversed(found)} == {
        name: launch.constants_for(name, 151936, 2, device) for name in KERNELS
    }
    assert all(32 * one.constants.num_warps * one.constants.programs <= 2048 for one in found)


def test_constants_hold_for_one_kernel_and_only_inside():
    logits = torch.zeros(1, 2, 4096, dtype=torch.bfloat16)
    before = {name: launch.launch_for(name, logits) for name in KERNELS}
    own = launch.constants_for(LOSS, 4096, 2, CPU)
    with candidates.using(Candidate(LOSS, own._replace(num_warps=4))):
        assert launch.launch_for(LOSS, logits).options == {"num_warps": 4}
        assert launch.launch_for(VALUES, logits) == before[VALUES]
    assert {name: launch.launch_for(name, logits) for name in KERNELS} == before


def test_what_a_candidate_must_get_right():
    problem = trial.make_problem("cpu", 13, 72)
    truth = trial.exact(problem)
    mask = problem.rows.mask
    assert {name for name, value in truth.items() if not value.isfinite().all()} == {"log_probs"}
    # Rows that are masked, clipped, and neither.
    silent = (truth["loss gradient"] == 0).all(-1)
    assert silent[~mask].all() and silent[mask & truth["log_probs"].isfinite()].any() and not silent[mask].all()
    found = KERNELS[LOSS].run(problem, torch.full_like(problem.logits, 7.0))
    assert trial.complaint(found, truth, mask) is None
    worse = found["loss gradient"].clone()
    worse[(~silent).nonzero()[0, 0], 3] += worse.abs().max() / 8
    assert "off by" in trial.complaint({"loss gradient": worse}, truth, mask)
    worse = found["loss gradient"].clone()
    worse[(~mask).nonzero()[0, 0], 3] = 1e-30
    assert "not 0 outside the mask" in trial.complaint({"loss gradient": worse}, truth, mask)
    finite = found["log_probs"].nan_to_num(neginf=-100.0)
    assert "not -inf or NaN" in trial.complaint({"log_probs": finite}, truth, mask)


def test_every_candidate_is_tried_by_one_process(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "tried", lambda candidate, problem, truth: tried.append(candidate))
    monkeypatch.setattr(trial, "exact", lambda problem: {})
    for share in range(2):
        assert ask(trial.trials("cpu", share, 2), tmp_path / f"trial-{share}") == 0
    every = candidates.candidates(CPU, trial.VOCAB["cpu"])
    assert set(tried) == set(every) and len(tried) == len(every) == len({(one.kernel, one.title) for one in every})
    assert all(entry["right"] and entry["kind"] == "built" for entry in answers(tmp_path / "trial-1"))


@pytest.mark.parametrize(
    ("message", "lost"),
    [("out of resource: shared memory, Required: 262144", False), ("Triton Error [CUDA]: misaligned address", True)],
)
def test_what_cannot_be_launched_is_not_wrong_but_what_loses_the_context_is(message, lost, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "tried", lambda candidate, problem, truth: raising(message)())
    monkeypatch.setattr(trial, "exact", lambda problem: {})
    path = tmp_path / "lines"
    assert ask(trial.trials("cpu", 0, 1), path) == int(lost)
    assert len(answers(path)) == (1 if lost else len(candidates.candidates(CPU, trial.VOCAB["cpu"])))
    assert all(entry["right"] is not lost for entry in answers(path))
    assert all(message in entry["message" if lost else "error"] for entry in answers(path))


ENDS = """
import sys
from pathlib import Path
from benchmarks.gpu.ask import ask

def end(): raise SystemExit(3)
sys.exit(ask(iter([("a", lambda: {}), ("b", end), ("c", lambda: {}), ("d", end)]), Path(sys.argv[1])))
"""


def test_a_process_goes_on_behind_what_ends_it_and_is_given_up_without_headway(tmp_path):
    plan = Plan(tmp_path, True)
    record = plan.run_on("ends", [sys.executable, "-c", ENDS, str(plan.log("ends.jsonl"))], 60.0)
    assert (record["status"], record["restarts"]) == ("passed", 2)
    found = {entry["of"]: entry.get("message", "") for entry in answers(plan.log("ends.jsonl"))}
    assert found == {"0 a": "", "1 b": lines.DIED, "2 c": "", "3 d": lines.DIED}
    record = plan.run_on("false", ["/bin/false"], 60.0)
    assert (record["status"], record["restarts"]) == ("failed", 0)


def test_those_that_are_right_are_timed_and_ranked(tmp_path, monkeypatch):
    own = launch.constants_for(VALUES, trial.VOCAB["cpu"], 2, CPU)
    every = [Candidate(VALUES, own._replace(strips=strips)) for strips in (2, 4, 8)]
    monkeypatch.setattr(sweep, "candidates", lambda device, vocab: every)
    found = [{"right": True, "registers": 99}, {"right": True}, {"right": False, "error": "far"}]
    for number, (one, more) in enumerate(zip(every, found, strict=True)):
        given = {"kind": "built", "kernel": VALUES, "constants": one.title, **more}
        lines.append(tmp_path / f"trial-{number % 2}", started=one.title)
        lines.append(tmp_path / f"trial-{number % 2}", of=f"{number} {one.title}", **given)
    taken = iter(range(9, 0, -1))
    monkeypatch.setattr(sweep, "milliseconds", lambda run, device: float(next(taken)))
    sweep.main("cpu", tmp_path / "lines", [tmp_path / "trial-0", tmp_path / "trial-1"])
    said = lines.read(tmp_path / "lines")
    assert said[0]["tried"] == said[0]["candidates"] == 3
    assert [entry["kind"] for entry in said] == ["swept"] + ["ranked"] * 2 + ["best"] * 2
    ranked = [entry for entry in said if entry["kind"] == "ranked"]
    assert ranked[0]["ms"] < ranked[1]["ms"] and {one["strips"] for one in ranked} == {2, 4}
    assert {one["registers"] for one in ranked} == {99, ""}
    assert all(entry["GB/s, 4 rows"] > 0 and "GB/s, in place" not in entry for entry in said if entry["kind"] == "best")
    record = {"machine": {"device": "x", "commit": "c", "date": "d"}, "status": "failed", "seconds": 1.0, "limit": 9}
    text = tables.markdown({"first": {**record, "said": [*answers(tmp_path / "trial-0"), *said]}})
    assert f"| {every[2].title} | False |" in text and "Of each kernel the fastest first" in text
