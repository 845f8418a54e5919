"""The benchmark command: what it compares is right before it is timed, and its figures follow from the times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import benchmarks.session as session_module
from benchmarks.__main__ import DEFAULTS, arguments
from benchmarks.pictures import FAMILIES, draw
from benchmarks.providers import NATIVE, Provider, own_providers
from benchmarks.report import make_report, markdown
from benchmarks.rivals import TRL_KERNEL, rivals
from benchmarks.session import Who, compared, run, selected
from benchmarks.workloads import WORKLOADS, Sizes, cases, sampled_rows
from egpo_kernels import logits_policy_loss
from tests.support.benchmark import CASE, LINEAR, MACHINE, case_of, fact, judged, spoilt
from tests.support.device import DEVICE

ROOT = Path(__file__).resolve().parents[2]


def broken(batch):
    raise NotImplementedError("not on Sundays\nbut otherwise")


def only_the_tokens(gradient, batch):
    kept = torch.zeros_like(gradient)
    return kept.scatter(-1, batch.tokens[..., None], gradient.gather(-1, batch.tokens[..., None]))


def zero_at_the_end(gradient, batch):
    gradient[-1, gradient.shape[1] // 2 :] = 0
    return gradient


def one_nan(gradient, batch):
    gradient[0, 0, -1] = torch.nan
    return gradient


SPOILT = {
    "zeros": lambda gradient, batch: torch.zeros_like(gradient),
    "too small": lambda gradient, batch: 0.6 * gradient,
    "only the tokens": only_the_tokens,
    "zero at the end": zero_at_the_end,
    "one nan": one_nan,
}


FACTS = {
    (CASE, "egpo_kernels"): fact([0.25, 0.5, 1.0], family="egpo_kernels", peak_bytes=12800),
    (CASE, "eager"): fact([1.5, 1.0, 0.5]),
    (CASE, "Liger"): {"family": "Liger", "refused": "needs a CUDA device"},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_provider_agrees_with_float64_or_says_why_not(workload, dtype):
    case = case_of(workload, dtype=dtype)
    providers = own_providers(workload) + rivals(workload)
    assert {"egpo_kernels", "eager"} <= {one.name for one in providers if one.unavailable("cpu") is None}
    for provider in providers:
        if provider.unavailable("cpu") is None and not provider.prepare:
            found = judged(case, provider)
            # What computes in bfloat16 is far off, and is shown to be.
            native = (
                dtype == "bf16" and workload not in LINEAR and (provider.name == NATIVE or provider.family == "TRL")
            )
            assert not found["wrong"] or native, provider.name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("workload", ["logits", "log-probs"])
def test_trls_kernel_is_right_where_it_runs_and_absent_elsewhere(workload, dtype):
    pytest.importorskip("trl")
    pytest.importorskip("triton")
    (kernel,) = (one for one in rivals(workload) if one.name.startswith(TRL_KERNEL))
    in_torch = [one for one in rivals(workload) if one.family == "TRL" and one.name != kernel.name]
    assert kernel.unavailable("cpu") == "needs a CUDA device" and kernel.unavailable("cuda") is None
    assert len(in_torch) == 2 and not any(one.unavailable("cpu") for one in in_torch)
    assert {one.unavailable("cuda") for one in in_torch} == {"takes its kernel on a CUDA device"}
    # On a CPU by Triton's interpreter, which no time is taken of.
    assert not judged(case_of(workload, dtype=dtype, device=DEVICE), kernel)["wrong"]


@pytest.mark.parametrize("workload, outputs", [("log-probs", {"log_probs"}), ("logits", {"loss", "gradient"})])
def test_what_is_without_entropy_computes_none(workload, outputs):
    without = [one for one in own_providers(workload) + rivals(workload) if one.name.endswith("(no entropy)")]
    assert {one.family for one in without} >= {"TRL"} | (
        {"egpo_kernels", "Liger"} if workload == "log-probs" else set()
    )
    for one in without:
        if one.unavailable("cpu") is None:
            assert one.run(WORKLOADS[workload].make(case_of(workload))).keys() == outputs, one.name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [50, 32000])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_wrong_gradient_is_far_off_in_every_dtype(spoil, vocab, dtype):
    case = CASE._replace(dtype=dtype, vocab=vocab)
    assert not judged(case, own_providers("logits")[0])["wrong"]
    assert judged(case, spoilt(spoil))["wrong"]


def test_a_wrong_shape_is_no_answer():
    batch = WORKLOADS["logits"].make(CASE)
    truth = WORKLOADS["logits"].truth(batch)
    found = own_providers("logits")[0].run(batch)
    with pytest.raises(ValueError, match="loss is"):
        compared(found | {"loss": found["loss"].expand(3)}, truth, None, CASE)


def test_the_truth_is_that_of_the_reference():
    batch = WORKLOADS["logits"].make(CASE)
    truth = WORKLOADS["logits"].truth(batch)
    leaf = batch.logits.detach().double().requires_grad_()
    given = (batch.tokens, batch.advantages.double(), batch.mask)
    loss = logits_policy_loss(leaf, *given, old_log_probs=batch.old_log_probs.double(), backend="reference").loss
    loss.backward()
    torch.testing.assert_close(truth["loss"], loss.detach())
    torch.testing.assert_close(truth["gradient"], sampled_rows(leaf.grad))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_who_is_compared_is_chosen_by_family_and_ours_always_is(workload):
    everyone = {one.family for one in selected(workload, Who(["all"]))}
    assert {"egpo_kernels", "eager", "torch.compile"} <= everyone <= set(FAMILIES)
    assert set(FAMILIES) == {one.family for each in WORKLOADS for one in selected(each, Who(["all"]))}
    for family in everyone:
        assert {one.family for one in selected(workload, Who([family]))} == {"egpo_kernels", family}
    assert {one.family for one in selected(workload, Who(["none"]))} == {"egpo_kernels"}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_families_that_come_last_are_measured_once(workload):
    last = ["torch.compile", "TRL"]
    early, late = (selected(workload, Who(["all"], last, late)) for late in (False, True))
    assert {one.family for one in late} <= set(last) and not {one.family for one in early} & set(last)
    names = [one.name for one in (*early, *late)]
    assert sorted(names) == sorted(one.name for one in selected(workload, Who(["all"])))


def test_a_run_times_every_provider_as_often_and_measures_memory(monkeypatch):
    refusing = Provider("refusing", "Liger", broken, lambda device: f"not on {device}")
    failing = Provider("failing", "TRL", broken)
    monkeypatch.setattr(session_module, "rivals", lambda workload: [refusing, failing, spoilt(SPOILT["zeros"])])
    own = [Provider("egpo_kernels", "egpo_kernels", own_providers("logits")[0].run), own_providers("logits")[3]]
    monkeypatch.setattr(session_module, "own_providers", lambda workload: own)
    # Its processes know only the real providers.
    monkeypatch.setattr(session_module, "_apart", lambda case, name: 7)
    facts = run([CASE, CASE._replace(tokens=32)], Who(["all"]), 3)
    for case in (CASE, CASE._replace(tokens=32)):
        for name in ("egpo_kernels", "eager"):
            assert len(facts[case, name]["seconds"]) == 3 and min(facts[case, name]["seconds"]) > 0
        assert facts[case, "refusing"]["refused"] == "not on cpu"
        assert facts[case, "failing"]["refused"] == "NotImplementedError: not on Sundays"
    assert facts[CASE, "eager"]["peak_bytes"] == 7 and "peak_bytes" not in facts[CASE, "refusing"]
    text = markdown(make_report(MACHINE, 1e9, facts))
    assert "not on cpu" in text and "not on Sundays" in text and text.count("1.0e+00 FAR OFF") == 2


def test_a_provider_that_writes_over_the_logits_is_always_timed_on_the_same_ones(monkeypatch):
    seen = []

    def overwriting(batch):
        seen.append(batch.logits.detach().clone())
        return own_providers("logits")[1].run(batch)

    ours = Provider("egpo_kernels", "egpo_kernels", overwriting, overwrites=True)
    monkeypatch.setattr(session_module, "rivals", lambda workload: [])
    monkeypatch.setattr(session_module, "own_providers", lambda workload: [ours])
    session_module.run([CASE], Who(["none"]), 3)
    # The check and three rounds.
    assert len(seen) == 4
    assert all(torch.equal(values, seen[0]) for values in seen)


@pytest.mark.parametrize("answered", [0, 1])
def test_our_own_failure_ends_the_run(answered, monkeypatch):
    calls = iter([own_providers("logits")[0].run] * answered)
    monkeypatch.setattr(session_module, "rivals", lambda workload: [])
    ours = Provider("egpo_kernels", "egpo_kernels", lambda batch: next(calls, broken)(batch))
    monkeypatch.setattr(session_module, "own_providers", lambda workload: [ours])
    with pytest.raises(RuntimeError, match="not on Sundays"):
        run([CASE], Who(["all"]), 1)


def test_a_run_that_ends_early_has_told_what_it_knew(monkeypatch):
    calls = iter([own_providers("logits")[0].run] * 3)
    monkeypatch.setattr(session_module, "rivals", lambda workload: [Provider("failing", "TRL", broken)])
    ours = Provider("egpo_kernels", "egpo_kernels", lambda batch: next(calls, broken)(batch))
    monkeypatch.setattr(session_module, "own_providers", lambda workload: [ours])
    told = []
    with pytest.raises(RuntimeError, match="not on Sundays"):
        run([CASE], Who(["all"]), 9, lambda facts: told.append(make_report(MACHINE, 1e9, facts)["results"]))
    # The check, which times nothing; two rounds after it; the round that failed.
    assert [[one["provider"] for one in results] for results in told] == [
        ["failing"], *[["egpo_kernels", "failing"]] * 3
    ]  # fmt: skip
    assert told[-1][0]["seconds"]["rounds"] == 2


def test_figures_follow_from_the_times():
    report = json.loads(json.dumps(make_report(MACHINE, 102400.0, FACTS)))
    ours, eager, liger = report["results"]
    assert ours["seconds"] == {"median": 0.5, "lower_quartile": 0.375, "upper_quartile": 0.75, "rounds": 3}
    assert ours["times_eager"] == 2.0 and eager["times_eager"] == 1.0
    # 64 rows of 50 float32 logits, read and written once: 25600 bytes in half a second, a copy does twice that.
    assert ours["bytes"]["moved"] == 25600 and ours["bandwidth"] == 51200 and ours["of_copy_bandwidth"] == 0.5
    assert liger["refused"] == "needs a CUDA device" and "seconds" not in liger
    text = markdown(report)
    assert (
        "| egpo_kernels | 500 ms (375 ms to 750 ms) | 2.00 | 5.12e-05 GB/s (50%) | 0 MiB (1.00 e) | 1.0e-07 |" in text
    )
    assert "| Liger | needs a CUDA device |" in text


def test_reports_older_than_hidden_states_are_read():
    report = json.loads(json.dumps(make_report(MACHINE, 1e9, FACTS)))
    for one in report["results"]:
        del one["hidden"]
    assert markdown(report) == markdown(make_report(MACHINE, 1e9, FACTS))


def test_pictures_are_drawn(tmp_path):
    drawn_files = draw(make_report(MACHINE, 1e9, FACTS), tmp_path)
    assert [path.name for path in drawn_files] == ["logits.png", "logits-scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn_files)


def test_cases_lead_with_the_largest_and_vary_one_size_at_a_time():
    sizes = Sizes(["bf16"], [16, 64], [32, 128], [(32, 8, 96), (16, 4, 64)])
    found = list(cases("logits", "cpu", sizes))
    assert [(one.tokens, one.vocab) for one in found] == [(64, 128), (16, 128), (64, 32)]
    assert {one.dtype for one in cases("advantages", "cpu", sizes)} == {"fp32"}
    found = list(cases("linear", "cpu", sizes))
    assert [(one.tokens, one.hidden, one.vocab) for one in found] == sizes.linear


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--tokens", "12"], "--tokens"), (["--vocab", "1"], "--vocab"), (["--rounds", "0"], "--rounds"),
        (["--linear", "12x8x9"], "--linear"), (["--linear", "64x8"], "--linear"), (["--linear", "64x1x9"], "--linear"),
        (["--dtype", "fp8"], "--dtype"), (["--rivals", "nobody"], "--rivals"), (["everything"], "what"),
        (["--rivals", "eager", "--last", "TRL"], "--last"), (["--last", "nobody"], "--last"),
    ],
)  # fmt: skip
def test_arguments_are_refused_by_name(given, named, capsys):
    with pytest.raises(SystemExit):
        arguments(given)
    assert named in capsys.readouterr().err


def test_arguments_have_each_devices_defaults():
    options = arguments(["logits", "--device", "cpu", "--dtype", "bf16", "--rivals", "eager,TRL"])
    assert (options.what, options.dtype, options.rivals) == ("logits", ["bf16"], ["eager", "TRL"])
    assert options.tokens == [64, 256, 512] and options.rounds == 7
    assert options.linear == DEFAULTS["cpu"]["linear"] == [(2048, 576, 49152)]


def test_the_command_writes_its_report(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "advantages", "--device", "cpu", "--tokens", "16", "--rounds", "2"]
    options = ["--rivals", "eager", "--last", "eager", "--out", str(tmp_path)]
    done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Measured after all others, in rounds of their own: eager." in (tmp_path / "benchmarks.md").read_text()
    assert {"benchmarks.json", "benchmarks.md", "advantages.png"} <= {path.name for path in tmp_path.iterdir()}
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [one["provider"] for one in report["results"]] == ["egpo_kernels", "egpo_kernels, no metrics", "eager"]
    if sys.platform == "linux":
        assert all(one["peak_bytes"] >= 0 for one in report["results"])
    assert report["copy_bandwidth"] > 0 and report["machine"]["torch"] == torch.__version__
