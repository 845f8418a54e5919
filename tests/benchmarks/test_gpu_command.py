"""`python -m benchmarks.gpu` without a GPU: its budgets, its records, and what it reads from other tools."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.counts.traffic import count_traffic
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import budget, dram, every_kernel, logits_kernels, plan, stages, tables
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.process import run
from benchmarks.machine import ROOT, UNKNOWN, answer, describe

MACHINE = {"machine": {"device": "x", "commit": "c", "date": "d"}, "limit": 9}
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


def test_all_stages_fit_a_lease_start_included():
    starts, quarter_of_an_hour = 120, 15 * 60
    assert starts + sum(one.seconds for one in budget.BUDGET.values()) <= quarter_of_an_hour
    assert all(one.seconds <= budget.LONGEST == 240 for one in budget.BUDGET.values())
    assert list(budget.BUDGET) == list(stages.STAGES) == ["first", "tests", "bench", "dram", "sanitizer"]
    assert sum(one.dry_seconds for one in budget.BUDGET.values()) < 300


def test_the_page_says_what_the_budget_says():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = {name: seconds for name, seconds in re.findall(r"^\| `(\w+)` \|.*\| (\d+) s \|$", page, re.MULTILINE)}
    assert rows == {name: str(one.seconds) for name, one in budget.BUDGET.items()}
    # Its calls ask for every stage once, in order, each within what a command may take.
    calls = [call.split(",") for call in re.findall(r'^PYTHON_BIN=python3 make gpu ARGS="--only ([\w,]+)"', page, re.M)]
    assert [name for call in calls for name in call] == list(budget.BUDGET) and len(calls) == 3
    assert all(sum(budget.BUDGET[name].seconds for name in call) <= 600 for call in calls)


def test_time_left_over_passes_to_later_stages():
    every = list(budget.BUDGET)
    assert budget.limit_of("first", every, 0.0, False) == 200
    assert budget.limit_of("tests", every, 200.0, False) == 220
    assert budget.limit_of("tests", every, 190.0, False) == 230
    # But not more than a stage may take at the most.
    assert budget.limit_of("tests", every, 20.0, False) == 240
    # A stage alone has its own.
    assert budget.limit_of("bench", ["bench"], 0.0, False) == 200
    assert budget.limit_of("dram", ["bench", "dram"], 230.0, False) == 10


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path):
    child = f"import os, pathlib, time; pathlib.Path('{tmp_path}/pid').write_text(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    # Until the child is there; with a limit that starting two interpreters meets on a busy machine.
    done = run([sys.executable, "-c", code], 5.0, tmp_path / "log.txt", {})
    assert time.monotonic() - started < 30
    assert done["status"] == "killed"
    assert done["reason"] == "killed after its 5 s" and (tmp_path / "log.txt").read_text() == "begun\n"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        gone = not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
        if gone:
            break
        time.sleep(0.1)
    assert gone


def test_a_command_that_fails_says_so_by_its_last_line(tmp_path):
    done = run([sys.executable, "-c", "raise SystemExit('no memory')"], 30, tmp_path / "log.txt", {"A": "1"})
    assert done["status"] == "failed" and done["reason"] == "exit status 1: no memory"


def test_results_are_written_after_every_stage_whatever_happens(tmp_path, monkeypatch):
    def killed(plan, limit):
        return {"status": "killed", "seconds": 1.0, "reason": "killed after its 1 s"}

    def breaks(plan, limit):
        assert json.loads((plan.out / "tests.json").read_text())["status"] == "killed"
        assert (plan.out / "gpu.md").is_file()
        raise OSError("disk full")

    monkeypatch.setitem(stages.STAGES, "tests", killed)
    monkeypatch.setitem(stages.STAGES, "bench", breaks)
    out = tmp_path / "new"
    assert command.main(["--dry-run", "--only", "tests,bench", "--out", str(out)]) == 1
    # Another call into the same folder leaves what is there.
    assert command.main(["--dry-run", "--only", "dram", "--out", str(out)]) == 0
    found = stages.gather(out)
    assert {name: it["status"] for name, it in found.items()} == {
        "tests": "killed",
        "bench": "failed",
        "dram": "absent",
    }
    assert found["bench"]["reason"] == "OSError: disk full" and found["bench"]["dry_run"]
    text = (out / "gpu.md").read_text()
    assert "| tests | killed | 1.0 | 120 |" in text and "| killed after its 1 s |" in text
    assert "| dram | absent |" in text


# Without a GPU.


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_stages_by_name(capsys):
    assert command.stages_of("dram,tests") == ["tests", "dram"]
    with pytest.raises(SystemExit):
        command.main(["--only", "speed"])
    assert "'speed' is no stage; it must be some of first,tests,bench,dram,sanitizer" in capsys.readouterr().err


def test_results_go_where_the_environment_says(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert command.folder("NVIDIA H200 141GB", False) == ROOT / "benchmarks" / "results" / "nvidia-h200-141gb"
    monkeypatch.setenv("OUT", "/elsewhere")
    assert command.folder("NVIDIA H100", True) == Path("/elsewhere/nvidia-h100-dry-run")


class Told(Plan):
    """A plan that writes down its commands instead of running them."""

    def run(self, name, command, limit, **environment):
        log = self.log(f"{name}.txt")
        log.write_text("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
        with (self.out / "commands.txt").open("a") as told:
            told.write(" ".join([name, *command[1:]]) + "\n")
        return {"status": "passed", "seconds": 1.0}


@pytest.mark.parametrize("dry", [False, True])
def test_what_each_stage_runs(dry, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find_tool", lambda name: f"/opt/{name}")
    monkeypatch.setattr(stages, "trial_processes", lambda device: 1)
    plan = Told(tmp_path, dry)
    found = {name: run(plan, 40.0) for name, run in stages.STAGES.items() if name != "dram"}
    told = (tmp_path / "commands.txt").read_text()
    assert {found[name]["status"] for name in ("first", "tests", "bench")} == {"passed"}
    device = "cpu" if dry else "cuda"
    assert f"first -m benchmarks.gpu.first {device} " in told
    assert f"benchmarks.gpu.trial {device} {tmp_path}/logs/trial-0.jsonl 0 1\n" in told
    assert "trial-0.jsonl\n" in told.partition("benchmarks.gpu.sweep")[2]
    sizes = (
        "logits --dtype bf16 --tokens 64 --vocab 512"
        if dry
        else "all --tokens 2048,8192 --vocab 151936 --linear 8192x4096x131072"
    )
    assert f"benchmarks {sizes}" in told and f"--device {device}" in told and "torch.compile --out" in told
    assert plan.environment["TRITON_INTERPRET"] == ("1" if dry else "0")
    assert found["sanitizer"]["status"] == ("absent" if dry else "passed")
    assert all((f"--tool {name}" in told) is not dry for name in ("memcheck", "racecheck", "synccheck"))


def test_what_no_time_is_left_for_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find_tool", lambda name: f"/opt/{name}")
    record = stages.sanitizer(Told(tmp_path, False), 0.5)
    assert record["runs"]["memcheck"]["reason"] == "0 s were left for it" and record["status"] == "passed"


def test_benchmarks_say_what_they_lack(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "installed", lambda module: module != "rich")
    record = stages.bench(Plan(tmp_path, False), 1.0)
    assert record["status"] == "absent" and record["reason"].startswith("rich not installed here: `make wheels`")


def test_tools_are_found_beside_cuda_too(tmp_path, monkeypatch):
    (tmp_path / "cuda-13" / "bin").mkdir(parents=True)
    shell_script(tmp_path / "cuda-13" / "bin" / "ncu", "exit 0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(plan, "TOOL_FOLDERS", (f"{tmp_path}/cuda*/bin",))
    assert plan.find_tool("ncu") == f"{tmp_path}/cuda-13/bin/ncu"
    assert plan.find_tool("compute-sanitizer") is None


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
    record = stages.dram(Plan(tmp_path / "out", False), 30.0)
    assert record["status"] == "passed" and record["kernels"] == rows
    found = {"dram": {**MACHINE, **record}}
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
    record = stages.dram(Plan(tmp_path / "out", False), 30.0)
    assert record["status"] == "absent" and "==ERROR== ERR_NVGPUCTRPERM" in record["reason"]


# What it launches, and where.


def test_every_kernel_is_launched():
    sources = [path.read_text() for path in (ROOT / "egpo_kernels" / "triton").glob("*.py")]
    defined = {line[4:].split("(")[0] for text in sources for line in text.splitlines() if line.startswith("def ")}
    with count_traffic() as traffic:
        every_kernel.main("cpu", "70")
    # One runs on a Hopper only.
    defined -= {"ring_policy_loss_kernel"}
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
