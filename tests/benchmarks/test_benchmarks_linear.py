"""The benchmarks from hidden states: the truth, what is far from it, and time over that of the bare products."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks.pictures import draw
from benchmarks.providers import GEMMS, own_providers
from benchmarks.report import make_report, markdown
from benchmarks.workloads import WORKLOADS
from egpo_kernels import linear_policy_loss
from tests.support.benchmark import LINEAR, MACHINE, case_of, fact, judged, spoilt

ROOT = Path(__file__).resolve().parents[2]
WRONG = {
    "zeros": torch.zeros_like,
    "too small": lambda gradient: 0.6 * gradient,
    "zero at the end": lambda gradient: torch.where(torch.arange(len(gradient))[:, None, None] < 7, gradient, 0.0),
    "one row": lambda gradient: gradient.index_fill(0, torch.tensor(3), 0.0),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("output", ["gradient", "weight_gradient"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_gradient_of_hidden_states_or_head_is_far_off(wrong, output, dtype):
    case = case_of("linear", dtype=dtype)
    assert not judged(case, own_providers("linear")[0])["wrong"]

    def spoil(gradient, batch):
        # Both as [8, N, H]: sequences, or parts of the vocabulary of 48.
        return wrong(gradient.view(8, -1, 16)).view(gradient.shape)

    assert judged(case._replace(vocab=48), spoilt(spoil, "linear", output))["wrong"]


@pytest.mark.parametrize("workload", LINEAR)
def test_the_truth_from_hidden_states_is_that_of_the_reference(workload):
    batch = WORKLOADS[workload].make(case_of(workload))
    truth = WORKLOADS[workload].truth(batch)
    hidden = batch.hidden.detach().double().requires_grad_()
    weight = batch.weight.detach().double().requires_grad_()
    given = (batch.tokens, batch.advantages.double(), batch.mask)
    old = batch.old_log_probs.double()
    loss = linear_policy_loss(hidden, weight, *given, old_log_probs=old, backend="reference").loss
    loss.backward()
    torch.testing.assert_close(truth["loss"], loss.detach())
    torch.testing.assert_close(truth["gradient"], hidden.grad)
    assert ("weight_gradient" in truth) == (workload == "linear")
    if workload == "linear":
        torch.testing.assert_close(truth["weight_gradient"], weight.grad)


@pytest.mark.parametrize(("workload", "products"), [("linear", 3), ("linear-frozen", 2)])
def test_time_over_that_of_the_bare_products(workload, products, tmp_path):
    case = case_of(workload)
    facts = {
        (case, "egpo_kernels"): fact([0.5], family="egpo_kernels", peak_bytes=2**20),
        (case, "eager"): fact([1.0], peak_bytes=2**21),
        (case, GEMMS): fact([0.4], family=GEMMS, error=None),
    }
    report = json.loads(json.dumps(make_report(MACHINE, 1e9, facts)))
    ours, eager, gemms = report["results"]
    assert (ours["over_gemms"], eager["over_gemms"], gemms["over_gemms"]) == (1.25, 2.5, 1.0)
    flops = products * 2 * 64 * 50 * 16
    assert ours["flops"] == {"needed": flops, "formula": f"{products} products of 2 N V H"}
    assert ours["flops_per_second"] == 2 * flops and "bandwidth" not in ours
    text = markdown(report)
    assert "| time / bare GEMMs (rate) |" in text and "*Bare GEMMs* are" in text
    assert f"[64 x 16] times [16 x 50] fp32; FLOPs: {products} products of 2 N V H" in text
    assert f"| egpo_kernels | 500 ms (500 ms to 500 ms) | 2.00 | 1.25 ({2 * flops / 1e9:.3g} GFLOP/s) | 1 MiB" in text
    assert [path.name for path in draw(report, tmp_path)] == [f"{workload}.png"]
    without = markdown(make_report(MACHINE, 1e9, {(case, "eager"): fact([1.0])}))
    assert f"| 1.00 | ({flops / 1e9:.3g} GFLOP/s) |" in without


def test_linear_is_a_head_that_trains_and_a_frozen_one(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "linear", "--device", "cpu", "--linear", "64x16x50", "--rounds", "1"]
    options = ["--dtype", "fp32", "--rivals", f"eager,{GEMMS}", "--out", str(tmp_path)]
    done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"linear.png", "linear-frozen.png"} <= {path.name for path in tmp_path.iterdir()}
    results = json.loads((tmp_path / "benchmarks.json").read_text())["results"]
    assert {one["workload"] for one in results} == {*LINEAR, "linear-support"}
    refused = {one["provider"] for one in results if one["refused"]}
    assert refused == {"egpo_kernels, chunks of 256 MiB"}  # a size for a GPU
    measured = [one for one in results if not one["refused"]]
    assert all(one["over_gemms"] > 0 and one["hidden"] == 16 and not one["wrong"] for one in measured)
