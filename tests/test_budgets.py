"""Every kernel compiled for an H100/H200 without one: registers do not spill, logits move 16 bytes at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOGITS_KERNELS = {"row_statistics_kernel", "logits_gradient_kernel", "logits_policy_loss_kernel"}


def launches(*arguments):
    """What `benchmarks.counts.compiled_kernels` prints, in a process that compiles kernels instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.counts.compiled_kernels", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    return launches("sm_90")


def test_every_kernel_of_the_package_is_compiled(compiled):
    sources = (ROOT / "egpo_kernels" / "triton").glob("*.py")
    defined = {
        line.removeprefix("def ").split("(")[0]
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert defined >= LOGITS_KERNELS
    assert {row["kernel"] for row in compiled} == defined


def test_no_kernel_spills(compiled):
    spilling = [row for row in compiled if row["spill_stores"] or row["spill_loads"]]
    assert not spilling


def test_logits_move_sixteen_bytes_at_a_time(compiled):
    rows = [row for row in compiled if row["kernel"] in LOGITS_KERNELS and row["dtype"] == "bfloat16"]
    assert len(rows) >= 12
    for row in rows:
        assert row["load_widths"].get("16", 0) > 0, row
        # Only the token's own logit is loaded, and its gradient stored, two bytes wide.
        assert row["load_widths"].get("2", 0) <= 1, row
        assert row["store_widths"].get("2", 0) <= 1, row
        if row["kernel"] != "row_statistics_kernel":
            assert row["store_widths"].get("16", 0) > 0, row


def test_no_length_count_or_coefficient_recompiles_a_kernel():
    rows = launches("sm_90", "values")
    assert len({row["kernel"] for row in rows}) >= 8
    assert {row["number"] for row in rows} == {1}


def test_no_logit_is_overwritten_before_every_warp_has_read_the_tokens_own(compiled):
    """In place the gradient lands where the token's logit lay: a barrier must stand before the first store."""
    rows = [row for row in compiled if row["kernel"] in LOGITS_KERNELS - {"row_statistics_kernel"}]
    assert rows and all(row["fenced"] for row in rows)
