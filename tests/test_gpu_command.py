"""`python -m benchmarks.gpu` without a GPU: its budgets, its records, and what it reads from other tools."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.counts.traffic import count_traffic
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import dram, every_kernel, logits_kernels, report, steps, tables
from benchmarks.gpu.process import Finished, run
from benchmarks.machine import ROOT, UNKNOWN, answer, describe

# What `ncu --csv` prints, shortened by two of the six launches' metrics being whole passes.
PASS = f"{dram.PASS_BYTES:,}"
NCU_HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
    '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def ncu_text(values):
    """CSV with these (read, write, nanoseconds) for the launches in order, as ncu mixes it with its own lines."""
    lines = ["==PROF== Connected to process 42 (/usr/bin/python3.12)", NCU_HEAD]
    for number, (case, metrics) in enumerate(zip(logits_kernels.CASES, values, strict=True)):
        for (name, unit), value in zip(zip(dram.METRICS, ("byte", "byte", "ns"), strict=True), metrics, strict=True):
            where = f'"42","python3.12","127.0.0.1","{case.kernel}","1","7","(512, 1, 1)","(132, 1, 1)","0","9.0"'
            lines.append(f'"{number}",{where},"Command line profiler metrics","{name}","{unit}","{value}"')
    return "\n".join([*lines, "==PROF== Disconnected from process 42"])


def shell_script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


# Budgets.


def test_all_steps_end_inside_nine_minutes():
    assert sum(step.seconds for step in steps.STEPS.values()) < 540
    assert sum(step.dry_seconds for step in steps.STEPS.values()) < 180


def test_time_left_over_passes_to_later_steps():
    every = list(steps.STEPS)
    assert steps.limit_of("tests", every, 0.0, False) == 270
    assert steps.limit_of("sanitizer", every, 270.0, False) == 40
    assert steps.limit_of("sanitizer", every, 100.0, False) == 210
    assert steps.limit_of("dram", every, 480.0, False) == 50
    # A step alone has all of it.
    assert steps.limit_of("bench", ["bench"], 0.0, False) == 530
    assert steps.limit_of("bench", ["bench", "dram"], 0.0, False) == 480


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path):
    child = f"import os, pathlib, time; pathlib.Path('{tmp_path}/pid').write_text(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    # Until the child is there; with a limit that starting two interpreters meets on a busy machine.
    done = run([sys.executable, "-c", code], 5.0, tmp_path / "log.txt", {})
    assert time.monotonic() - started < 30
    assert done.code is None and done.record()["status"] == "killed"
    assert done.record()["reason"] == "killed after its 5 s" and (tmp_path / "log.txt").read_text() == "begun\n"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        gone = not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
        if gone:
            break
        time.sleep(0.1)
    assert gone


def test_a_command_that_fails_says_so_by_its_last_line(tmp_path):
    done = run([sys.executable, "-c", "raise SystemExit('no memory')"], 30, tmp_path / "log.txt", {"A": "1"})
    assert done.record()["status"] == "failed" and done.record()["reason"] == "exit status 1: no memory"


def test_results_are_written_after_every_step_whatever_happens(tmp_path, monkeypatch):
    def killed(plan, limit):
        return {"status": "killed", "seconds": 1.0, "reason": "killed after its 1 s"}

    def breaks(plan, limit):
        known = json.loads((plan.out / "gpu.json").read_text())
        assert known["steps"]["tests"]["status"] == "killed" and (plan.out / "gpu.md").is_file()
        raise OSError("disk full")

    monkeypatch.setitem(steps.STEPS, "tests", steps.Step(killed, 270, 100))
    monkeypatch.setitem(steps.STEPS, "bench", steps.Step(breaks, 170, 50))
    assert command.main(["--dry-run", "--only", "tests,bench,dram", "--out", str(tmp_path / "new")]) == 1
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert {name: it["status"] for name, it in found["steps"].items()} == {
        "tests": "killed",
        "bench": "failed",
        "dram": "absent",
    }
    assert found["steps"]["bench"]["reason"] == "OSError: disk full"
    assert "| tests | killed | 1.0 | killed after its 1 s |" in (tmp_path / "new" / "gpu.md").read_text()


# Without a GPU.


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_steps_by_name(capsys):
    assert command.steps_of("dram,tests") == ["tests", "dram"]
    with pytest.raises(SystemExit):
        command.main(["--only", "speed"])
    assert "'speed' is no step; it must be some of tests,sanitizer,bench,dram" in capsys.readouterr().err
    assert command.folder("NVIDIA H200 141GB", False).name == "nvidia-h200-141gb"


class Told(steps.Plan):
    """A plan that writes down its commands instead of running them."""

    def run(self, name, command, limit, **environment):
        log = self.out / f"{name}.txt"
        log.write_text("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
        with (self.out / "commands.txt").open("a") as told:
            told.write(" ".join([name, *command[1:]]) + "\n")
        return Finished(0, 1.0, limit, log)


@pytest.mark.parametrize("dry", [False, True])
def test_what_each_step_runs(dry, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "find_tool", lambda name: f"/opt/{name}")
    plan = Told(tmp_path, dry)
    found = {name: step.run(plan, 30.0) for name, step in steps.STEPS.items() if name != "dram"}
    told = (tmp_path / "commands.txt").read_text()
    assert found["tests"]["status"] == found["bench"]["status"] == "passed"
    sizes = (
        "--tokens 64 --vocab 512 --linear 64x32x512" if dry else "--tokens 2048,8192,32768 --linear 8192x4096x131072"
    )
    assert f"benchmarks all --device {'cpu' if dry else 'cuda'}" in told and sizes in told
    assert "--dist loadgroup" in told and "-m gpu tests" in told
    assert plan.environment["TRITON_INTERPRET"] == ("1" if dry else "0")
    assert found["sanitizer"]["status"] == ("absent" if dry else "passed")
    assert ("--tool memcheck" in told) is ("--tool racecheck" in told) is not dry


def test_tools_are_found_beside_cuda_too(tmp_path, monkeypatch):
    (tmp_path / "cuda-13" / "bin").mkdir(parents=True)
    shell_script(tmp_path / "cuda-13" / "bin" / "ncu", "exit 0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(steps, "TOOL_FOLDERS", (f"{tmp_path}/cuda*/bin",))
    assert steps.find_tool("ncu") == f"{tmp_path}/cuda-13/bin/ncu"
    assert steps.find_tool("compute-sanitizer") is None


# What other tools say.


def test_dram_traffic_in_passes(tmp_path, monkeypatch):
    one_and_one = (PASS, PASS, "1,000,000")
    values = [one_and_one, ("0", "96", "2,000"), one_and_one, one_and_one, (PASS, "1024", "600,000"), one_and_one]
    rows = dram.table(dram.parse(ncu_text(values)))
    assert [(row["read"], row["write"]) for row in rows] == [(1, 1), (0, 0), (1, 1), (1, 1), (1, 0), (1, 1)]
    assert rows[0]["ms"] == 1.0 and rows[0]["TB/s"] == round(2 * dram.PASS_BYTES / 1e12 / 1e-3, 3)
    assert rows[4]["what"] == "log-probs and entropy" and rows[4]["should write"] == 0
    with pytest.raises(ValueError, match="ncu saw"):
        dram.table(dram.parse(ncu_text(values))[1:])
    # The whole step, with an ncu that writes this.
    (tmp_path / "sample.csv").write_text(ncu_text(values))
    shell_script(tmp_path / "ncu", f'while [ "$1" != --log-file ]; do shift; done; cp {tmp_path}/sample.csv "$2"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    record = steps.dram(steps.Plan(tmp_path / "out", False), 30.0)
    assert record["status"] == "passed" and record["kernels"] == rows
    found = {"machine": {"device": "x"}, "steps": {"dram": record}}
    assert "| logits_policy_loss_kernel | loss and gradient, in place | 1.0 | 1.0 | 1 | 1 |" in tables.markdown(found)


REFUSED = """==PROF== Connected to process 7 (/usr/bin/python3.12)
==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters
==PROF== Disconnected from process 7
==WARNING== No kernels were profiled.
"""


def test_counters_that_are_refused_are_a_record(tmp_path, monkeypatch):
    assert dram.parse(REFUSED) == []
    (tmp_path / "refused").write_text(REFUSED)
    shell_script(tmp_path / "ncu", f"cat {tmp_path}/refused; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    record = steps.dram(steps.Plan(tmp_path / "out", False), 30.0)
    assert record["status"] == "absent" and "==ERROR== ERR_NVGPUCTRPERM" in record["reason"]


TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_skips(): pytest.skip("no colour here")

@pytest.fixture
def broken(): raise OSError("no disk")
def test_never_starts(broken): pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_report_of_tests(tmp_path, workers):
    (tmp_path / "test_sample.py").write_text(TESTS)
    (tmp_path / "test_unreadable.py").write_text("import nothing_of_that_name\n")
    lines = tmp_path / "lines"
    options = ["-p", "benchmarks.gpu.report", "--report-lines", str(lines), "-p", "no:cacheprovider", "-n", workers]
    # With one file that cannot be read pytest runs nothing unless told to.
    options += ["--continue-on-collection-errors", "-c", os.devnull, "--rootdir", str(tmp_path)]
    run([sys.executable, "-m", "pytest", *options, str(tmp_path)], 120, tmp_path / "log", {})
    found = report.summary(lines)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 3, 1), (tmp_path / "log").read_text()
    assert found["selected"] >= 4
    said = {failure["test"].rpartition("::")[2]: failure["message"] for failure in found["failures"]}
    assert "one is not two" in said["test_fails"] and "no disk" in said["test_never_starts"]
    assert "nothing_of_that_name" in said["test_unreadable.py"]
    assert "no colour here" in found["skips"][0]["message"]
    record = {"status": "failed", "seconds": 1.0, **found}
    text = tables.markdown({"machine": {"device": "x"}, "steps": {"tests": record}})
    assert "1 passed, 3 failed, 1 skipped" in text and "| test_sample.py::test_fails |" in text


def test_a_report_that_was_cut_off(tmp_path):
    entry = {"test": "a.py::b", "outcome": "passed", "seconds": 0.5, "message": ""}
    lines = [{"selected": 9}, entry, {**entry, "outcome": "failed", "message": "in teardown"}]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, lines)) + '\n{"test": "a.py::c", "outc')
    found = report.summary(tmp_path / "lines")
    assert (found["selected"], found["passed"], found["failed"]) == (9, 0, 1)
    assert report.summary(tmp_path / "none")["selected"] == 0


# What it launches, and where.


def test_every_kernel_is_launched():
    sources = [path.read_text() for path in (ROOT / "egpo_kernels" / "triton").glob("*.py")]
    defined = {line[4:].split("(")[0] for text in sources for line in text.splitlines() if line.startswith("def ")}
    with count_traffic() as traffic:
        every_kernel.main("cpu", "70")
    assert set(traffic.kernels) == {name for name in defined if name.endswith("_kernel")}


def test_kernels_over_logits_are_launched_in_the_order_of_the_table():
    with count_traffic() as traffic:
        logits_kernels.main("cpu", "8", "70")
    counted = {case.kernel for case in logits_kernels.CASES}
    launched = [launch.kernel for launch in traffic.launches if launch.kernel in counted]
    assert launched == [case.kernel for case in logits_kernels.CASES]


def test_the_machine_describes_itself():
    found = describe("cpu")
    keys = ["device", "cpu", "threads", "driver", "cuda", "python", "torch", "triton", "commit", "date"]
    assert list(found) == keys
    assert all(type(value) in (str, int) and value != "" for value in found.values())
    assert json.loads(json.dumps(found)) == found
    assert answer("no-such-command") == UNKNOWN == answer("git", "rev-parse", "no-such-name")
