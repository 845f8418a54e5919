"""`egpo-kernels info`: what it tells, why a backend is taken, and how it looks with rich and without."""

import io
import json
import platform
import subprocess
import sys

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.command import info, screen
from egpo_kernels.command.main import main
from egpo_kernels.engine import dispatch
from tests.support.page import ROOT

pytestmark = pytest.mark.cpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv("EGPO_KERNELS_BACKEND", raising=False)


class Terminal(io.StringIO):
    """A screen that says it is one."""

    def isatty(self):
        return True


def terminal(monkeypatch):
    """Put one in place of what pytest captures."""
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


def test_json_holds_what_the_page_shows(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    versions = found["versions"]
    assert versions["egpo_kernels"] == ek.__version__ and versions["torch"] == str(torch.__version__)
    assert versions["python"] == platform.python_version() and versions["numpy"]
    assert found["devices"]["cpu"]["auto takes"] == "portable"
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for section, entries in found.items():
        assert section == "devices" or f"{section}\n" in text
        for name, value in entries.items():
            assert section == "devices" or f"  {name:<16}  {value}".rstrip() in text.splitlines()
    assert "cpu\n" in text and f"threads           {torch.get_num_threads()}\n" in text


def test_what_is_not_installed_is_said_of_what_the_library_needs_and_of_nothing_else(monkeypatch):
    known = {"numpy": "2.0", "verl": "0.9.1"}

    def version(name):
        if name not in known:
            raise info.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(info.metadata, "version", version)
    found = info.versions()
    assert found["triton"] == "not installed" and found["numpy"] == "2.0" and found["verl"] == "0.9.1"
    assert "trl" not in found


def test_only_variables_that_change_what_runs(monkeypatch):
    for name in info.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EGPO_KERNELS_DEBUG", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("HOME_ADDRESS", "nobody's business")
    assert info.environment() == {"EGPO_KERNELS_DEBUG": "1", "TRITON_INTERPRET": "1"}


@pytest.mark.parametrize(
    ("device", "installed", "variable", "backend", "why"),
    [
        (CPU, True, None, "portable", "run on cuda and xpu devices"),
        (GPU, False, None, "portable", "triton is not installed"),
        (GPU, True, None, "triton", "triton is installed"),
        (GPU, True, "auto", "triton", "triton is installed"),
        (GPU, True, "portable", "portable", "EGPO_KERNELS_BACKEND says so"),
        (GPU, False, "triton", "none", "triton is not installed"),
        (CPU, True, "cuda", "none", "EGPO_KERNELS_BACKEND is 'cuda'; it must be one of"),
    ],
)
def test_why_a_backend_is_taken_and_that_it_is(monkeypatch, device, installed, variable, backend, why):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", installed)
    if variable:
        monkeypatch.setenv("EGPO_KERNELS_BACKEND", variable)
    found = info.answer(device)
    assert found[0] == backend and why in found[1]
    if backend == "none":
        with pytest.raises((ValueError, RuntimeError)):
            dispatch.choose_backend("auto", device)
    else:
        assert dispatch.choose_backend("auto", device) == backend


def test_gpus_are_told_apart(monkeypatch):
    class Properties:
        name, total_memory = "a GPU", 80 << 30

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: GPU)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    monkeypatch.setattr(info.collect_env, "get_nvidia_driver_version", lambda run: "570.1")
    found = info.facts()["devices"]
    assert list(found) == ["cpu", "cuda:0", "cuda:1"]
    one = found["cuda:1"]
    assert (one["name"], one["memory"], one["capability"]) == ("a GPU", "80.0 GiB", "9.1")
    assert one["driver"] == ("unknown" if torch.version.hip else "570.1")


# How it looks.


@pytest.mark.skipif(not screen.RICH, reason="rich is not installed")
def test_colours_on_a_terminal_with_rich(monkeypatch):
    written = terminal(monkeypatch)
    shown = screen.Screen()
    shown.line("WRONG [8, 8] :smile: 1e-9", "red")
    text = written.getvalue()
    assert "\x1b[31m" in text and "WRONG [8, 8] :smile: 1e-9" in text


def test_plain_on_a_terminal_without_rich(monkeypatch):
    written = terminal(monkeypatch)
    monkeypatch.setattr(screen, "RICH", False)
    shown = screen.Screen()
    with shown.waiting("a moment"):
        shown.line("WRONG [8, 8]", "red")
    assert written.getvalue() == "WRONG [8, 8]\n"


def test_plain_in_a_pipe(capsys):
    shown = screen.Screen()
    with shown.waiting("a moment"):
        shown.line("WRONG [8, 8]" + 200 * "-", "red")
    assert capsys.readouterr().out == "WRONG [8, 8]" + 200 * "-" + "\n"


def test_it_runs_without_rich_and_imports_no_stack():
    code = """
import sys
sys.modules["rich"] = None
from egpo_kernels.command.main import main
status = main(["info"])
heavy = {"transformers", "trl", "verl", "openrlhf", "accelerate", "peft", "rich.console", "egpo_kernels.triton"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("versions\n  egpo_kernels ")


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.strip() == ek.__version__
