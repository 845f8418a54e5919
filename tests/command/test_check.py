"""`egpo-kernels check`: a right library passes, a wrong kernel fails by name, what cannot run says what to do."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

from egpo_kernels import portable
from egpo_kernels.command import bandwidth, check, checks
from egpo_kernels.command.main import main
from egpo_kernels.engine import dispatch
from tests.support.batches import NEEDS_TRITON
from tests.support.calls import FUNCTIONS
from tests.support.page import ROOT

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv("EGPO_KERNELS_BACKEND", raising=False)


@pytest.fixture
def small(monkeypatch):
    """The batches that are small enough for the interpreter, and no bandwidth."""
    every = checks.checks
    monkeypatch.setattr(check, "checks", lambda device, interpreted: every(device, True))
    monkeypatch.setattr(check, "rates", lambda device, backend: iter(()))


def run(capsys, *arguments):
    status = main(["check", "--device", "cpu", *arguments])
    return status, capsys.readouterr().out


def wrong_lines(printed):
    return [line for line in printed.splitlines() if line.startswith("WRONG ")]


# A right library.


def test_every_function_that_takes_a_backend_is_checked():
    assert {one.what.split(",")[0] for one in checks.checks(CPU, True)} == set(FUNCTIONS)


def test_the_portable_backend_is_right_at_full_size(capsys, monkeypatch):
    monkeypatch.setattr(check, "rates", lambda device, backend: iter(()))
    status, printed = run(capsys, "--backend", "portable")
    assert status == 0 and not wrong_lines(printed), printed
    ok = re.findall(r"^(.+?)  .* ok$", printed, re.M)
    assert ok == [one.what for one in checks.checks(CPU, True)]
    assert re.search(r"^all right, in \d+ s$", printed, re.M)


@NEEDS_TRITON
def test_interpreted_kernels_are_right(capsys, small):
    status, printed = run(capsys, "--backend", "triton")
    assert status == 0, printed
    assert "triton, interpreted" in printed and "portable\n" not in printed


def test_the_same_numbers_every_time():
    one, other = (checks.verdict(checks.checks(CPU, True)[0], "portable") for _ in range(2))
    assert one == other


# A wrong kernel.


def times(factor):
    """Every floating result, or what was written, times a factor."""

    def spoil(function):
        def wrong(*arguments):
            found = function(*arguments)
            if found is None:
                arguments[-1].mul_(factor)
            if isinstance(found, (tuple, list)):
                return [it * factor if isinstance(it, torch.Tensor) else it for it in found]
            return found * factor if isinstance(found, torch.Tensor) else found

        return wrong

    return spoil


def only(number, value):
    """One result of several set to a value."""

    def spoil(function):
        def wrong(*arguments):
            found = list(function(*arguments))
            found[number] = torch.full_like(found[number], value)
            return tuple(found)

        return wrong

    return spoil


def unwritten(function):
    """A result in memory that nobody is given."""
    return lambda *arguments: function(*arguments[:-1], torch.empty_like(arguments[-1]))


def nothing(function):
    return lambda *arguments: None


def raising(function):
    def wrong(*arguments):
        raise RuntimeError("an illegal instruction was encountered")

    return wrong


def half_as_many(function):
    """Rows whose reduction factor is another."""

    def wrong(*arguments):
        found = function(*arguments)
        return found if found.factor is None else found._replace(factor=2 * found.factor)

    return wrong


def nobody_alive(function):
    """Rows whose kept tokens are not looked at."""
    return lambda *arguments: (made := function(*arguments))._replace(alive=torch.zeros_like(made.alive))


FAULTS = [
    ("token_rows", half_as_many, "egpo_loss, on-policy", "gradient of logits"),
    ("row_statistics", times(1.01), "token_log_probs", "log_probs"),
    ("token_scores", times(1.01), "token_log_probs, no gradient", "log_probs"),
    ("row_statistics", only(0, torch.nan), "linear_token_log_probs", "log_probs"),
    ("logits_gradient", times(1.01), "token_log_probs", "gradient of logits"),
    ("logits_gradient", unwritten, "egpo_loss, on-policy", "gradient of logits"),
    ("logits_policy_loss", times(0.99), "logits_policy_loss, one pass", "loss"),
    ("logits_policy_loss", unwritten, "logits_policy_loss, in place, active rows", "gradient of logits"),
    ("logits_policy_loss", raising, "egpo_loss", "RuntimeError: an illegal instruction"),
    ("logits_loss_gradient", times(0.99), "linear_policy_loss, head trains", "loss"),
    ("rescale_", nothing, "logits_policy_loss, on-policy, other upstream", "gradient of logits"),
    ("policy_loss_and_gradient", times(1.01), "policy_loss, egpo", "loss"),
    ("policy_loss_and_gradient", times(0.99), "policy_loss, cispo", "gradient of log_probs"),
    ("policy_loss_and_gradient", only(3, 0.0), "policy_loss, entropy bonus, KL", "gradient of entropy"),
    ("policy_loss", times(1.01), "policy_loss, reduction none", "loss"),
    ("policy_loss_gradient", times(0.99), "policy_loss, reduction none", "gradient of log_probs"),
    ("kept_entries", nobody_alive, "token_log_probs, kept tokens", "gradient of logits"),
    ("kept_logits", times(1.01), "token_log_probs, kept tokens", "log_probs"),
    ("kept_statistics", only(0, torch.nan), "logits_policy_loss, kept tokens", "loss"),
    ("kept_gradient", times(1.01), "token_log_probs, kept tokens", "gradient of logits"),
    ("put_kept_", nothing, "logits_policy_loss, kept tokens", "gradient of logits"),
    ("shard_statistics", times(1.01), "token_log_probs, vocabulary in parts", "log_probs"),
    ("merged_shards", times(1.01), "token_log_probs, vocabulary in parts", "log_probs"),
    ("support_metrics", times(1.01), "logits_policy_loss, kept tokens", "metrics"),
    ("gathered_products", times(1.01), "linear_policy_loss, kept tokens", "loss"),
    ("add_gathered", nothing, "linear_policy_loss, kept tokens", "gradient of hidden"),
    ("scaled_gradients", times(0.99), "policy_loss, cispo", "gradient of log_probs"),
    ("group_advantages", times(1.01), "group_advantages, egpo", "advantages"),
    ("group_advantages", only(1, torch.nan), "group_advantages, egpo_c5", "weights"),
]


@pytest.mark.parametrize(("name", "spoil", "what", "output"), FAULTS, ids=lambda it: getattr(it, "__name__", str(it)))
def test_a_wrong_kernel_fails_by_name(capsys, small, monkeypatch, name, spoil, what, output):
    monkeypatch.setattr(portable, name, spoil(getattr(portable, name)))
    status, printed = run(capsys, "--backend", "portable")
    assert status == 1
    named = [line for line in wrong_lines(printed) if line.startswith(f"WRONG {what} on [")]
    assert any(output in line for line in named), printed
    assert re.search(rf"^{re.escape(what)} .* WRONG$", printed, re.M)
    assert f"{len(wrong_lines(printed))} wrong, in " in printed


def test_every_kernel_has_a_fault():
    assert {name for name, *_ in FAULTS} == set(portable.__all__) - {"scratch_bytes"}


def test_a_gradient_where_nothing_counts_is_wrong(capsys, small, monkeypatch):
    original = portable.logits_gradient

    def leaking(logits, rows, *arguments):
        original(logits, rows, *arguments)
        arguments[-1].view(-1, logits.shape[-1])[~rows.mask] = 1e-12

    monkeypatch.setattr(portable, "logits_gradient", leaking)
    status, printed = run(capsys, "--backend", "portable")
    assert status == 1 and "not 0 at positions that the mask leaves out" in printed


# A reader that goes away.


@pytest.mark.parametrize("arguments", [["info"], ["check", "--device", "cpu", "--backend", "portable"]])
def test_a_closed_pipe_ends_it_quietly(arguments):
    code = f"import sys; from egpo_kernels.command.main import main; sys.exit(main({arguments}))"
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=240
        )
    finally:
        os.close(writes)
    assert done.returncode == 141 and done.stderr == ""


# What is to be checked.


def test_reference_is_not_checked_against_itself(monkeypatch, capsys):
    monkeypatch.setenv("EGPO_KERNELS_BACKEND", "reference")
    assert main(["check", "--device", "cpu"]) == 2
    assert "EGPO_KERNELS_BACKEND is 'reference'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["check", "--backend", "reference"], ["check", "--speed"], ["spell"]])
def test_bad_usage_is_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: egpo-kernels" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_here_is_status_2(capsys, device):
    assert main(["check", "--device", device]) == 2
    said = capsys.readouterr()
    assert f"--device is '{device}'" in said.err and "it must be one of cpu" in said.err and not said.out


def test_a_backend_that_cannot_run_here_is_status_2(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    assert main(["check", "--device", "cpu", "--backend", "triton"]) == 2
    assert "install egpo-kernels[triton]" in capsys.readouterr().err
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["check", "--device", "cpu", "--backend", "triton"]) == 2
    assert "or TRITON_INTERPRET=1 set before" in capsys.readouterr().err


def test_auto_checks_interpreted_kernels_too_where_they_can_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    assert check.find_backends("auto", CPU) == ["portable", "triton"]
    assert check.find_backends("portable", CPU) == ["portable"]
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    assert check.find_backends("auto", CPU) == ["portable"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    assert check.find_backends("auto", CPU) == ["portable"]


# Bandwidth.


def test_bandwidth_is_the_bytes_that_must_move_over_the_median(monkeypatch):
    monkeypatch.setattr(bandwidth, "ROWS", {"cpu": 4})
    monkeypatch.setattr(bandwidth, "SECONDS", 0.001)
    moved = []

    def speed(nbytes, call):
        call()
        moved.append(nbytes)
        return float(nbytes)

    monkeypatch.setattr(bandwidth, "_speed", speed)
    found = list(bandwidth.rates(CPU, "portable"))
    logits = 4 * bandwidth.VOCAB * 2
    assert moved == [2 * logits, logits, 2 * logits]
    assert [rate.of_copy for rate in found] == [1.0, 0.5, 1.0]
    monkeypatch.undo()
    assert bandwidth._speed(8, lambda: torch.ones(2).sum()) > 0


def test_bandwidth_that_cannot_be_measured_fails_nothing(capsys, small, monkeypatch):
    def none_left(device, backend):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 1.16 GiB")

    monkeypatch.setattr(check, "rates", none_left)
    monkeypatch.setattr(check, "checks", lambda device, interpreted: [])
    status, printed = run(capsys, "--backend", "portable")
    assert status == 0 and "bandwidth not measured: out of memory: tried" in printed


def test_the_console_script_is_this_function():
    text = (ROOT / "pyproject.toml").read_text()
    module, name = re.search(r'^egpo-kernels = "([\w.]+):(\w+)"$', text, re.M).groups()
    assert getattr(importlib.import_module(module), name) is main
