"""The tests of `python -m benchmarks.gpu`: which are chosen, and a pytest that lacks plugins or loses its GPU."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.gpu import lines, tables, tests
from benchmarks.gpu.ask import context_is_lost
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.process import run
from benchmarks.gpu.summary import summary
from benchmarks.machine import ROOT

SAMPLE = """
import warnings
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_skips(): pytest.skip("no colour here")
def test_warns(): warnings.warn("old-fashioned", DeprecationWarning)

@pytest.fixture
def broken(): raise OSError("no disk")
def test_never_starts(broken): pass
"""
LOSES = """
import os

def test_before(): pass
def test_loses():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): pass
def test_dies(): os._exit(3)
def test_last(): pass
"""
# What must not reach a run on a machine whose pytest is another.
OPTIONS = """
[tool.pytest.ini_options]
minversion = "99.0"
addopts = ["--no-such-option"]
filterwarnings = ["error"]
"""


def run_sample(tmp_path, monkeypatch, source, plugins=("pytest",)):
    """What the stage makes of one file of tests, with these plugins and no others, on a machine with other options."""
    (tmp_path / "pyproject.toml").write_text(OPTIONS)
    (tmp_path / "test_sample.py").write_text(source)
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    monkeypatch.setattr(tests, "installed", lambda name: name in plugins)
    monkeypatch.setattr(tests, "PARTS", [tests.Part("sample", (str(tmp_path),), "", 1.0, (str(tmp_path),))])
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    plan = Plan(tmp_path / "out", True)
    record = tests.tests(plan, 120.0)
    return record, plan.log("tests-sample.txt").read_text()


def names(entries):
    return sorted(entry["test"].rpartition("::")[2] for entry in entries)


# Which tests.


def collected(part):
    """Node ids that a part chooses."""
    options = ["-m", part.marks, *(f"--ignore-glob={ROOT / path}" for path in part.ignored)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options, *part.paths]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return set(re.findall(r"^tests/\S+::.*$", done.stdout, re.MULTILINE))


def test_every_test_that_a_gpu_has_a_word_to_say_to_is_in_one_part():
    memory, gpu, backends, compiled = tests.PARTS
    whole = collected(tests.Part("whole", ("tests",), "gpu", 1.0, ()))
    alone, rest = collected(memory), collected(backends)
    assert {name.partition("::")[0] for name in alone} == {"tests/gpu/test_large_batches.py"}
    assert gpu.paths == memory.paths == ("tests/gpu",) and gpu.marks == "gpu and not memory"
    apart = {name for name in whole if name.startswith((*gpu.paths, *compiled.paths))}
    assert alone < apart and not apart & rest and rest < whole
    # What is left out refuses bad input, on the host.
    left_out = {name.partition("::")[0] for name in whole - apart - rest}
    assert left_out and all(name.startswith("tests/inputs/test_bad_input") for name in left_out)


def test_parts_end_in_their_order_and_what_takes_tens_of_gigabytes_is_alone():
    untils = [part.until for part in tests.PARTS]
    assert untils == sorted(untils) and untils[-1] == 1.0
    assert [part.name for part in tests.PARTS if part.alone] == ["memory"]


# Another pytest.


def test_without_pytest_the_stage_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tests, "installed", lambda name: False)
    assert tests.tests(Plan(tmp_path, False), 9.0)["reason"] == "pytest is not installed here"


@pytest.mark.parametrize("plugins", [(), ("xdist",), ("xdist", "pytest_timeout")], ids=["none", "xdist", "both"])
def test_plugins_are_used_where_they_are(tmp_path, monkeypatch, plugins):
    monkeypatch.setattr(tests, "installed", lambda name: name in plugins)
    alone, spread = (" ".join(tests.command(Plan(tmp_path, False), part)) for part in tests.PARTS[:2])
    assert ("-n " in spread and "--dist load " in spread) is ("xdist" in plugins) and "-n " not in alone
    assert ("--timeout 100" in spread) is ("--timeout 100" in alone) is ("pytest_timeout" in plugins)


@pytest.mark.parametrize("plugins", [("pytest",), ("pytest", "xdist", "pytest_timeout")], ids=["alone", "workers"])
def test_a_report_of_tests(tmp_path, monkeypatch, plugins):
    (tmp_path / "test_unreadable.py").write_text("import nothing_of_that_name\n")
    found, log = run_sample(tmp_path, monkeypatch, SAMPLE, plugins)
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 3, 1), log
    assert found["selected"] >= 5 and found["status"] == "failed" and not found["unfinished"]
    said = {failure["test"].rpartition("::")[2]: failure["message"] for failure in found["failures"]}
    assert "one is not two" in said["test_fails"] and "no disk" in said["test_never_starts"]
    assert "nothing_of_that_name" in said["test_unreadable.py"]
    assert "no colour here" in found["skips"][0]["message"]
    (warning,) = found["warnings"]
    assert warning["message"] == "old-fashioned" and warning["first"].endswith("::test_warns")
    record = {"machine": {"device": "x", "commit": "c", "date": "d"}, "limit": 9, **found}
    text = tables.markdown({"tests": record})
    assert "2 passed, 3 failed, 1 skipped, 0 unfinished" in text and "| test_sample.py::test_fails |" in text
    assert "| DeprecationWarning | old-fashioned |" in text


def test_a_report_that_was_cut_off(tmp_path):
    entry = {"of": "a.py::b", "outcome": "passed", "seconds": 0.5, "message": ""}
    entries = [{"selected": 9}, entry, {**entry, "outcome": "failed", "message": "in teardown"}, {"started": "a.py::c"}]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, entries)) + '\n{"of": "a.py::c", "outc')
    found = summary([tmp_path / "lines", tmp_path / "none"])
    assert (found["selected"], found["passed"], found["failed"]) == (9, 0, 1)
    assert found["unfinished"] == ["a.py::c"]
    assert summary([tmp_path / "none"])["selected"] == 0


# A context that is lost.


@pytest.mark.parametrize("plugins", [("pytest",), ("pytest", "xdist")], ids=["alone", "workers"])
def test_only_the_test_that_loses_the_context_fails(tmp_path, monkeypatch, plugins):
    found, log = run_sample(tmp_path, monkeypatch, LOSES, plugins)
    assert names(found["failures"]) == ["test_dies", "test_loses"], log
    assert (found["selected"], found["passed"]) == (5, 3) and not found["unfinished"]
    said = {failure["test"].rpartition("::")[2]: failure["message"] for failure in found["failures"]}
    assert said["test_loses"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert ("crashed while running" if "xdist" in plugins else "the process ended") in said["test_dies"]
    # Workers are replaced; a process without them is started again behind each of the two.
    assert found["runs"]["sample"].get("restarts") == (None if "xdist" in plugins else 2)


def test_a_test_that_ends_the_last_process_leaves_nothing_to_run(tmp_path, monkeypatch):
    found, _ = run_sample(tmp_path, monkeypatch, LOSES.partition("def test_after")[0])
    assert (found["passed"], names(found["failures"])) == (1, ["test_loses"])
    assert found["runs"]["sample"]["status"] == "passed" and found["runs"]["sample"]["restarts"] == 1


def test_a_run_that_never_starts_is_not_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tests, "installed", lambda name: name == "pytest")
    part = tests.Part("sample", ("--no-such-option",), "", 1.0, ("--no-such-option",))
    record = tests.run_part(Plan(tmp_path, True), part, 60.0)
    assert record["status"] == "failed" and record["restarts"] == 0 and "exit status 4" in record["reason"]


def test_what_says_that_the_context_is_lost():
    def chained():
        try:
            raise RuntimeError("Triton Error [CUDA]: device-side assert triggered")
        except RuntimeError as error:
            raise ValueError("log_probs could not be computed") from error

    with pytest.raises(ValueError) as caught:
        chained()
    assert context_is_lost(caught.value)
    assert context_is_lost(RuntimeError("CUDA error: misaligned address"))
    assert not context_is_lost(RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert not context_is_lost(AssertionError("said 'CUDA error'"))


def test_the_plugin_is_silent_without_a_file(tmp_path):
    (tmp_path / "test_sample.py").write_text("def test_passes(): pass\n")
    options = ["-p", "benchmarks.gpu.report", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    done = run([sys.executable, "-m", "pytest", *options, str(tmp_path)], 60, tmp_path / "log", {})
    assert done["status"] == "passed" and lines.read(tmp_path / "lines") == []
