"""The first stage of `python -m benchmarks.gpu`: its questions, and the sweep over launch constants."""

import pytest
import torch

from benchmarks.gpu import calls, candidates, first, lines, sweep, tables, trial, values
from benchmarks.gpu.candidates import KERNELS, Candidate
from egpo_kernels import triton as backend
from egpo_kernels.triton import launch

CPU = torch.device("cpu")
LOSS, VALUES = "logits_policy_loss_kernel", "row_statistics_kernel"


# Questions.


def raising(message):
    def job():
        raise RuntimeError(message)

    return job


def test_answers_are_written_as_they_come_and_a_failure_is_one(tmp_path):
    path = tmp_path / "lines"
    jobs = [("a", lambda: {"kind": "copy", "GB/s": 1}), ("b", raising("no clock")), ("c", lambda: {"kind": "facts"})]
    assert first.ask(iter(jobs), path)
    assert [entry["kind"] for entry in lines.read(path)] == ["copy", "trouble", "facts"]
    assert lines.read(path)[1]["message"] == "RuntimeError: no clock" and not lines.read(path)[1]["right"]


def test_nothing_is_asked_of_a_lost_context(tmp_path):
    jobs = [("a", raising("CUDA error: misaligned address")), ("b", lambda: pytest.fail("asked"))]
    assert not first.ask(iter(jobs), tmp_path / "lines")
    assert [entry["of"] for entry in lines.read(tmp_path / "lines")] == ["a"]


def test_what_several_jobs_share_may_fail_and_others_are_still_asked(tmp_path):
    def jobs():
        yield "a", lambda: {"kind": "facts"}
        raise RuntimeError("out of memory")

    path = tmp_path / "lines"
    assert first.ask(first.guarded("calls", jobs()), path)
    assert [entry["kind"] for entry in lines.read(path)] == ["facts", "trouble"]
    assert lines.read(path)[1]["of"] == "calls" and "out of memory" in lines.read(path)[1]["message"]


def test_what_a_machine_is():
    found = first.machine("cpu")
    assert found["torch"] == torch.__version__ and found["ncu"] and len(found) == len(first.PACKAGES) + 3


def test_values_are_right_and_wrong_ones_are_seen(monkeypatch):
    found = dict(values.values("cpu"))
    assert {"token_log_probs", "logits_policy_loss, in place", "egpo_loss"} < set(found)
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


def test_a_candidate_that_ends_its_process_is_wrong_and_the_others_are_tried(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "tried", lambda candidate, problem, truth: tried.append(candidate.kernel))
    monkeypatch.setattr(trial, "exact", lambda problem: {})
    path = tmp_path / "lines"
    lines.append(path, kind="trying", number=0)
    assert trial.main("cpu", path, 0, 2) == 0
    found = {entry["number"]: entry for entry in lines.read(path) if entry["kind"] == "built"}
    every = candidates.candidates(CPU, trial.VOCAB["cpu"])
    assert list(found) == [0, *range(2, len(every), 2)] and len(tried) == len(found) - 1
    assert found[0]["error"] == trial.DIED and not found[0]["right"] and found[2]["right"]


@pytest.mark.parametrize(
    ("message", "lost"),
    [("out of resource: shared memory, Required: 262144", False), ("Triton Error [CUDA]: misaligned address", True)],
)
def test_what_cannot_be_launched_is_not_wrong_but_what_loses_the_context_is(message, lost, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "tried", lambda candidate, problem, truth: raising(message)())
    monkeypatch.setattr(trial, "exact", lambda problem: {})
    assert trial.main("cpu", tmp_path / "lines", 0, 1) == int(lost)
    built = [entry for entry in lines.read(tmp_path / "lines") if entry["kind"] == "built"]
    assert len(built) == (1 if lost else len(candidates.candidates(CPU, trial.VOCAB["cpu"])))
    assert all(entry["right"] is not lost and message in entry["error"] for entry in built)


def test_a_process_that_makes_no_headway_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.sys, "executable", "/bin/false")
    assert sweep.try_all("cpu", tmp_path / "sweep.jsonl", float("inf")) == []


def test_those_that_are_right_are_timed_and_ranked(tmp_path, monkeypatch):
    own = launch.constants_for(VALUES, trial.VOCAB["cpu"], 2, CPU)
    every = [Candidate(VALUES, own._replace(strips=strips)) for strips in (2, 4, 8)]
    monkeypatch.setattr(sweep, "candidates", lambda device, vocab: every)
    entries = [
        {"kind": "built", "number": 0, "kernel": VALUES, "constants": every[0].title, "right": True, "registers": 99},
        {"kind": "built", "number": 1, "kernel": VALUES, "constants": every[1].title, "right": True},
        {"kind": "built", "number": 2, "kernel": VALUES, "constants": every[2].title, "right": False, "error": "far"},
    ]
    monkeypatch.setattr(sweep, "try_all", lambda *arguments: entries)
    taken = iter(range(9, 0, -1))
    monkeypatch.setattr(sweep, "milliseconds", lambda run, device: float(next(taken)))
    sweep.main("cpu", tmp_path / "lines", 60.0)
    said = lines.read(tmp_path / "lines")
    assert [entry["kind"] for entry in said] == ["built"] * 3 + ["swept"] + ["ranked"] * 2 + ["best"] * 2
    ranked = [entry for entry in said if entry["kind"] == "ranked"]
    assert ranked[0]["ms"] < ranked[1]["ms"] and {one["strips"] for one in ranked} == {2, 4}
    assert {one["registers"] for one in ranked} == {99, ""}
    assert all(entry["GB/s, 4 rows"] > 0 and "GB/s, in place" not in entry for entry in said if entry["kind"] == "best")
    record = {"machine": {"device": "x", "commit": "c", "date": "d"}, "status": "failed", "seconds": 1.0, "limit": 9}
    text = tables.markdown({"first": {**record, "said": said}})
    assert f"| {every[2].title} | False |" in text and "Of each kernel the fastest first" in text
