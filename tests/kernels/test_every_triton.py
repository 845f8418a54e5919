"""Every kernel compiles, on whatever triton is installed, and those over logits give a Hopper its due.

`make tritons` has the oldest and newest; `tests/benchmarks/test_budgets.py` has the pinned version's exact figures.
"""

import pytest

pytest.importorskip("triton")

from benchmarks.counts.budgets import KERNELS
from benchmarks.counts.collect import printed
from tests.support.once import made_once

pytestmark = pytest.mark.timeout(600)

VALUES, GRADIENT, LOSS = "row_statistics_kernel", "logits_gradient_kernel", "logits_policy_loss_kernel"
# Instructions an element with the entropy reported, each sweep; the gradient of an entropy in the loss takes two more.
INSTRUCTIONS = {VALUES: [9.9], GRADIENT: [6.4], LOSS: [9.5, 6.1]}
TILT = 2.0
# An odd vocabulary has a sum for each place in an access instead of one a thread.
ODD = 1.6
BLOCKS_AHEAD = 64 << 10


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    rows = made_once(tmp_path_factory, "hopper", lambda: printed("compiled_kernels", "sm_90", "hopper"))
    return [row for row in rows if row["kernel"] in INSTRUCTIONS]


def test_every_kernel_dtype_and_vocabulary_is_there(hopper):
    seen = {(row["kernel"], row["dtype"], row["vocab"]) for row in hopper}
    assert len(seen) == 3 * 2 * 2


def test_a_sweep_costs_few_instructions(hopper):
    for row in hopper:
        limits = list(INSTRUCTIONS[row["kernel"]])
        if row["tilted"] and row["kernel"] != VALUES:
            limits[-1] += TILT
        if row["vocab"] % 8 and row["kernel"] != GRADIENT:
            limits[0] += ODD
        assert len(row["sweeps"]) == len(limits), row
        for sweep, limit in zip(row["sweeps"], limits, strict=True):
            assert sweep["instructions"] <= limit, (row, limit)
            assert sweep["special"] <= (1.26 if row["vocab"] % 8 else 1.04), row


def test_no_thread_waits_for_another_inside_a_sweep(hopper):
    """No exchange between threads; two barriers for the memory that the next blocks come to, none without."""
    for row in hopper:
        for sweep in row["sweeps"]:
            assert sweep["shuffles"] == 0, row
            assert sweep["barriers"] * sweep["elements"] <= (2 if sweep["ahead"] else 0), row


def test_blocks_are_on_their_way_while_one_is_computed(hopper):
    for row in hopper:
        if row["kernel"] != GRADIENT:
            assert row["sweeps"][0]["ahead"] and row["sweeps"][0]["in_flight"] >= BLOCKS_AHEAD, row


def test_nothing_spills_and_rows_move_sixteen_bytes_at_a_time(hopper):
    for row in hopper:
        assert row["stack"] == 0, row
        assert all(sweep["load_width"] == 16 for sweep in row["sweeps"]), row
        # An odd row's edges, and the token's own, move by themselves.
        assert row["load_widths"].get("2", 0) <= (17 if row["vocab"] % 8 else 1), row
        if row["kernel"] != VALUES:
            assert row["store_widths"]["16"] > 0 and row["store_widths"]["2"] <= (4 if row["vocab"] % 8 else 1), row


def test_every_candidate_of_the_sweep_compiles_and_what_the_library_uses_does_not_spill():
    rows = printed("compiled_kernels", "sm_90", "sweep")
    assert len(rows) > 60
    own = [row for row in rows if row["own"]]
    assert {row["kernel"] for row in own} == set(INSTRUCTIONS)
    assert not [row for row in own if row["stack"]]
    assert max(row["stack"] for row in rows) <= 64


def test_every_kernel_compiles_with_every_option():
    """An older compiler refuses what a newer one takes: plain values from a tuple of constants, functions of None."""
    assert {row["kernel"] for row in printed("compiled_kernels", "sm_90", "compiles")} == set(KERNELS)
