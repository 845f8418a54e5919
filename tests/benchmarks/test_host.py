"""What calls cost the host: who is compared, with launches that only look like a GPU's, and what is written of it."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")

import triton

from benchmarks import host
from benchmarks.counts.calls import public
from benchmarks.counts.stubbed import stubbed
from benchmarks.host import Contender
from benchmarks.host_calls import VOCAB, calls, make_batch
from benchmarks.host_table import markdown
from benchmarks.machine import ROOT
from benchmarks.providers import OURS, Provider
from tests.support.benchmark import MACHINE
from tests.support.once import made_once

pytestmark = pytest.mark.cpu

FORWARD = ("token_log_probs, no gradient", "group_advantages")


def in_a_fresh_process(*arguments):
    """Python's answer where kernels are not interpreted; the rest of this file runs where they are."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report, and the table, of a short run of the command."""

    def make():
        folder = tmp_path_factory.mktemp("host")
        printed = in_a_fresh_process("-m", "benchmarks", "host", "--rounds", "2", "--out", str(folder))
        assert (folder / "host.md").read_text() == printed
        return {"report": json.loads((folder / "host.json").read_text()), "table": printed}

    return made_once(tmp_path_factory, "host", make)


@pytest.mark.timeout(600)
def test_the_command_times_everyone_and_counts_both_kinds_of_launches(written):
    results = written["report"]["results"]
    assert [(one["call"], one["provider"]) for one in results] == [
        (call.name, one.name) for call in calls() for one in call.providers
    ]
    ran = [one for one in results if one["refused"] is None]
    assert all(one["refused"] is None for one in results if one["family"] in (OURS, "eager"))
    for one in ran:
        assert one["seconds"]["rounds"] == 2
        assert 0 < one["seconds"]["lower_quartile"] <= one["seconds"]["median"] <= one["seconds"]["upper_quartile"]
        # Without a gradient a call may be kernels and nothing else.
        assert one["operations"] or (one["call"] in FORWARD and one["launches"])
        if one["family"] in (OURS, "eager"):
            assert bool(one["launches"]) == (one["family"] == OURS)
    table = [line for line in written["table"].splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(results)


def test_ours_is_first_of_every_call_and_every_public_function_is_called():
    assert {call.name.partition(",")[0] for call in calls()} == set(public())
    for call in calls():
        families = [one.family for one in call.providers]
        assert families[0] == OURS and families[-1] == "eager"


@pytest.mark.parametrize("workload", sorted({call.workload for call in calls()}))
def test_inputs_are_small(workload):
    batch = make_batch(workload)
    given = [field for field in batch if field is not None]
    assert batch.groups is not None and batch.rewards is not None and batch.leaves
    assert max(field.numel() for field in given) <= 32 * VOCAB


def test_only_others_may_refuse():
    def broken(batch):
        raise RuntimeError("no GPU")

    batch = make_batch("advantages")
    theirs = Contender("loss", Provider("theirs", "Liger", broken), batch)
    theirs.prepare([])
    assert theirs.record() == {
        "call": "loss", "provider": "theirs", "family": "Liger", "refused": "RuntimeError: no GPU"
    }  # fmt: skip
    absent = Contender("loss", Provider("absent", "Liger", broken, lambda device: f"not on {device}"), batch)
    absent.prepare([])
    assert absent.record()["refused"] == "not on cuda"
    with pytest.raises(RuntimeError, match="no GPU"):
        Contender("loss", Provider(OURS, OURS, broken), batch).prepare([])


def test_the_table_says_how_long_how_many_and_why_not():
    def one(name, median, **more):
        seconds = {"median": median, "lower_quartile": median / 2, "upper_quartile": 2 * median, "rounds": 3}
        found = {"call": "egpo_loss", "provider": name, "family": name, "refused": None, "seconds": seconds}
        return found | {"launches": ["kernel"] * 2, "operations": ["add"] * 5} | more

    results = [one("ours", 2e-4), one("theirs", 1e-4), one("absent", 1, refused="not installed")]
    results.append(one("ours", 4e-4, call="token_log_probs, no gradient"))
    shape = {"sequences": 1, "length": 2, "vocab": 3, "hidden": 4, "dtype": "bf16", "responses": 5}
    text = markdown({"machine": MACHINE, "rivals": {"trl": "1"}, "shape": shape, "rounds": 3, "results": results})
    assert "| `egpo_loss` | ours | 200 us (100 to 400) | 2 | 5 | 1.00 |" in text
    assert "| `egpo_loss` | theirs | 100 us (50 to 200) | 2 | 5 | 0.50 |" in text
    assert "| `egpo_loss` | absent | not installed | - | - | - |" in text
    assert "| `token_log_probs`, no gradient | ours | 400 us (200 to 800) | 2 | 5 | 1.00 |" in text
    assert "median of 3 rounds" in text and "abacus" in text


def test_rounds_are_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        host.main(["--rounds", "0"])
    assert "--rounds" in capsys.readouterr().err


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="is refused where kernels are interpreted")
def test_launches_are_not_stubbed_where_kernels_are_interpreted():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), stubbed():
        pass


STUBBED = """
import torch, triton, triton.language as tl
from benchmarks.counts.stubbed import stubbed
from egpo_kernels.engine import dispatch
from egpo_kernels.inputs import validation

@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["n"])
@triton.jit
def copy_kernel(to_ptr, from_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + offs, tl.load(from_ptr + offs, mask=offs < n), mask=offs < n)

def launch():
    copy_kernel[lambda meta: (triton.cdiv(3, meta["BLOCK"]),)](to, torch.ones(3), 3)

to, cpu = torch.zeros(3), torch.device("cpu")
before = dispatch.TRITON_DEVICES, validation.checks_values(cpu)
for times in (1, 2):
    with stubbed() as launched:
        assert not validation.checks_values(cpu) and dispatch.TRITON_DEVICES == ("cpu",)
        for _ in range(times):
            launch()
    print(launched, to.tolist())
compiled = list(copy_kernel.fn.device_caches[-1][0].values())
print(len(compiled), "cubin" in compiled[0].asm, before == (dispatch.TRITON_DEVICES, validation.checks_values(cpu)))
print(set(copy_kernel.fn.device_caches))
"""


def test_a_stubbed_kernel_is_compiled_once_launched_by_name_and_never_run(tmp_path):
    (tmp_path / "stubbed_kernel.py").write_text(STUBBED)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import stubbed_kernel"
    assert in_a_fresh_process("-c", code).splitlines() == [
        "['copy_kernel'] [0.0, 0.0, 0.0]",
        "['copy_kernel', 'copy_kernel'] [0.0, 0.0, 0.0]",
        "1 True True",
        "{-1}",
    ]
