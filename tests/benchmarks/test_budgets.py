"""Every kernel compiled for GPUs that need not be there, every launch case counted, each figure held to its budget."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch
import triton

from benchmarks.counts.budgets import (
    CALLS,
    CASES,
    KERNELS,
    TARGETS,
    WIDTH,
    call_problems,
    case_problems,
    kernel_problems,
    problem,
)
from benchmarks.counts.calls import LAYOUTS, public
from benchmarks.counts.cases import PACKAGES, Case
from benchmarks.counts.collect import collect, printed, together
from benchmarks.counts.launches import VOCAB
from benchmarks.counts.measure import SMALL_PASS, counted, traffic_of
from benchmarks.counts.table import markdown
from egpo_kernels.triton import launch
from tests.support.once import made_once

# Four targets are compiled for, by one worker while another may be waiting for the result.
pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]
EXPONENTIALS = {"kept_statistics_kernel", "kept_gradient_kernel", "shard_statistics_kernel", "merge_shards_kernel"}
LOGITS_KERNELS = {"row_statistics_kernel", "logits_gradient_kernel", "logits_policy_loss_kernel"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    def make():
        with together() as pool:
            options = pool.submit(printed, "compiled_kernels", "sm_90")
            counts = collect(TARGETS, ["egpo_kernels"], pool)
            return {"options": options.result(), "counts": counts}

    return made_once(tmp_path_factory, "counts", make)


@pytest.fixture(scope="module")
def counts(made):
    return made["counts"]


@pytest.fixture(scope="module")
def options(made):
    """Every kernel of the package in every dtype and option, for an H100 or H200."""
    return made["options"]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """What every public function launches, each in a process that compiles its kernels."""
    return made_once(tmp_path_factory, "calls", lambda: printed("calls"))


@pytest.mark.parametrize("name", CALLS)
def test_a_public_function_launches_what_its_budget_says(calls, name):
    problems = call_problems(next(call for call in calls if call["name"] == name))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("more", "said"), [(1, "worse than its budget"), (-20, "better than its budget")])
def test_a_public_function_that_launches_more_or_far_less_is_a_problem(calls, more, said):
    call = dict(calls[0])
    call["operations"] = (call["operations"] + ["add"])[: len(call["operations"]) + more]
    (found,) = call_problems(call)
    assert found.startswith(f"{call['name']}: operations") and said in found


def test_no_public_function_looks_for_places_on_the_device(calls):
    """Their number would have to come to the host, which would wait for it; on CPU tensors it need not."""
    waiting = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
    assert not [call["name"] for call in calls if waiting & set(call["operations"])]


def test_every_public_function_that_computes_has_a_budget_in_each_layout(calls):
    assert [call["name"] for call in calls] == list(CALLS)
    assert len(public()) == 8
    assert {f"{name}, {layout}" for name in public() for layout in LAYOUTS} <= set(CALLS)


@pytest.mark.parametrize("name", CASES)
def test_a_case_costs_what_its_budget_says(counts, name):
    problems = case_problems(next(case for case in counts["cases"] if case["name"] == name))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_takes_what_its_budget_says(counts, kernel):
    problems = kernel_problems(counts["cases"], kernel)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("value", "said"), [(10.1, "worse than its budget"), (10, None), (8.7, None), (8.6, "better")])
def test_a_figure_that_is_off_its_budget_either_way_is_a_problem(value, said):
    found = problem("one pass", "read", value, 10)
    assert (found is None) if said is None else found.startswith(f"one pass: read {value:g}, budget 10: {said}")


def test_nothing_is_without_a_budget(counts):
    assert [case["name"] for case in counts["cases"]] == list(CASES)
    assert {row["kernel"] for case in counts["cases"] for row in case["targets"]["sm_90"]} == set(KERNELS)


@pytest.mark.parametrize("target", TARGETS)
def test_logits_move_sixteen_bytes_at_a_time_everywhere(counts, target):
    for case in counts["cases"]:
        for row in case["targets"][target]:
            if row["kernel"] in LOGITS_KERNELS:
                assert max(map(int, row["load_widths"])) == WIDTH, row
                assert all(sweep["load_width"] == WIDTH for sweep in row.get("sweeps", [])), row


def test_the_last_read_and_the_write_leave_the_cache_to_rows_still_to_be_read_again(counts):
    rows = [row for case in counts["cases"] for row in case["targets"]["sm_90"] if row["kernel"] in LOGITS_KERNELS]
    sweeps = [(row["kernel"], sweep) for row in rows for sweep in row["sweeps"]]
    assert {kernel for kernel, sweep in sweeps if sweep["stores"]} == LOGITS_KERNELS - {"row_statistics_kernel"}
    assert all(sweep["evict_first"] is (sweep["stores"] > 0) for _, sweep in sweeps)


def test_a_processor_has_one_row_at_a_time(monkeypatch):
    """Two rows on one would push each other out of the cache between their sweeps."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(
        torch, "get_device_module", lambda _: SimpleNamespace(get_device_properties=lambda _: properties)
    )
    monkeypatch.setattr(launch, "architecture", lambda _: "sm_90")
    launch.processors.cache_clear()
    try:
        launched = launch.launch_for("logits_policy_loss_kernel", torch.empty(1, 1, VOCAB, dtype=torch.bfloat16))
        device = torch.device("cuda", 0)
        counts = [launch.num_programs(launched, rows, device) for rows in (1, 132, 133, 10**6)]
        assert counts == [1, 132, 132, 132]
    finally:
        launch.processors.cache_clear()


def test_every_kernel_of_the_package_is_compiled(options):
    sources = (ROOT / "egpo_kernels" / "triton").glob("*.py")
    defined = {
        line.removeprefix("def ").split("(")[0]
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    # That one no case launches: its own budget is in tests/kernels/test_ring.py.
    defined -= {"ring_policy_loss_kernel"}
    assert defined == set(KERNELS) >= LOGITS_KERNELS
    assert {row["kernel"] for row in options} == defined


def test_no_option_spills(options):
    assert not [row for row in options if row["stack"]]


def test_no_quotient_and_no_root_is_an_approximation(options):
    """Powers of two are, as `arithmetic.exponential` has them; those of `tl.exp` would be without ftz."""
    for row in options:
        assert set(row["approximate"]) <= {"ex2.approx.ftz.f32"}, row
    seen = {row["kernel"] for row in options if row["approximate"]}
    rest = {"policy_loss_kernel", "policy_loss_gradient_kernel", "sequence_kernel"}
    assert seen == LOGITS_KERNELS | rest | EXPONENTIALS


def test_logits_move_sixteen_bytes_at_a_time_with_every_option(options):
    rows = [row for row in options if row["kernel"] in LOGITS_KERNELS and row["dtype"] == "bfloat16"]
    assert len(rows) >= 12
    for row in rows:
        assert row["load_widths"].get("16", 0) > 0, row
        # Only the token's own logit is loaded, and its gradient stored, two bytes wide.
        assert row["load_widths"].get("2", 0) <= 1, row
        assert row["store_widths"].get("2", 0) <= 1, row
        if row["kernel"] != "row_statistics_kernel":
            assert row["store_widths"].get("16", 0) > 0, row


def test_no_logit_is_overwritten_before_every_warp_has_read_the_tokens_own(options):
    """In place the gradient lands where the token's logit lay: a barrier must stand before the first store."""
    rows = [row for row in options if row["kernel"] in LOGITS_KERNELS - {"row_statistics_kernel"}]
    assert rows and all(row["fenced"] for row in rows)


def test_no_length_count_or_coefficient_recompiles_a_kernel():
    rows = printed("compiled_kernels", "sm_90", "values")
    assert len({row["kernel"] for row in rows}) >= 8
    assert {row["number"] for row in rows} == {1}


def test_the_table_shows_a_case_a_row_and_says_what_could_not_be_counted(counts):
    absent = {"name": "a loss", "library": "liger", "listed": True, "missing": "not installed"}
    table = [line for line in markdown(counts | {"cases": [*counts["cases"], absent]}).splitlines() if line[:1] == "|"]
    listed = [case["name"] for case in counts["cases"] if case["listed"]]
    assert [line.split("|")[1].strip().partition(": ")[2] for line in table[2:]] == [*listed, "a loss"]
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "not installed" in table[-1]


def test_a_rival_that_cannot_be_counted_says_why_and_ours_fails(monkeypatch):
    def broken(batch):
        raise RuntimeError("no CPU")

    monkeypatch.setitem(PACKAGES, "trl", "there-is-no-such-package")
    assert counted(Case("loss", broken, "trl"), None) == {"missing": "not installed"}
    monkeypatch.setitem(PACKAGES, "trl", "torch")
    assert counted(Case("loss", broken, "trl"), None) == {"missing": "RuntimeError: no CPU"}
    with pytest.raises(RuntimeError, match="no CPU"):
        counted(Case("loss", broken), None)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts in the interpreter")
def test_memory_as_large_as_the_logits_is_counted_at_its_peak():
    def copies(batch):
        # Two at a time, three altogether; what the logits take themselves does not count.
        one, two = (batch.logits.detach().clone() for _ in range(2))
        del one
        three = batch.logits.detach().clone()
        del two, three

    assert traffic_of(Case("copies", copies))["extra_bytes"] == 2 * SMALL_PASS
