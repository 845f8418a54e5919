"""The ring's schedule in thousands of batches, what a wrong wait or fill does, which rows go through it, its code."""

import random

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

import torch

import egpo_kernels as ek
import egpo_kernels.triton as backend
from benchmarks.counts.collect import printed
from benchmarks.ring import HOPPER, switched_on
from egpo_kernels.triton.launch import Ring, launch_for
from tests.support.device import ON_GPU
from tests.support.gluon import Machine, number, spoilt, through_ring
from tests.support.once import made_once
from tests.support.ring_walk import Batch, source, walk
from tests.support.rows import rows_of_a_loss

KERNEL = "logits_policy_loss_kernel"


def drawn(generator):
    """Rows masked or not, with a gradient or not; any ring, with as many blocks as it has slots up to twice as many."""
    slots, rows = generator.randint(1, 6), generator.randint(1, 7)
    vocab = 4 * generator.randint(slots, 2 * slots) - generator.choice([0, 0, 2])
    counted, live = ([generator.random() < 0.7 for _ in range(rows)] for _ in range(2))
    return Batch(vocab, slots, generator.randint(1, 3), counted, live, generator.random() < 0.5)


@pytest.mark.parametrize("part", range(4))
def test_every_step_takes_its_own_block(part):
    generator, text = random.Random(part), source()
    for _ in range(1000):
        walk(drawn(generator), text)


WRONG = {
    "waits leave one more under way": ("launch.slots - 1)\n    slot", "launch.slots)\n    slot"),
    "nothing is waited for": ("async_copy.wait_group(launch.slots - 1)", "pass"),
    "an empty step makes no group": ("    async_copy.commit_group()", "        async_copy.commit_group()"),
    "a fill that is not wanted": ("ahead < blocks", "True"),
    "one fill too few": ("ahead < blocks", "ahead < blocks - 1"),
    "another slot is filled": ("base + i, row_ptr, ahead", "base + i + 1, row_ptr, ahead"),
    "a dropped block is not fetched again": ("again | next_counted", "next_counted"),
    "a masked row is fetched": ("again | next_counted", "True"),
    "the next row begins elsewhere": ("(base + 2 * dropped)", "(base + dropped)"),
    "another block of the next row": ("gl.where(again, j, j - dropped)", "j"),
    "always of the next row": ("gl.where(again, row_ptr, next_ptr)", "next_ptr"),
    "the second sweep begins elsewhere": ("place = base + dropped + j", "place = base + j"),
    "the gradient goes elsewhere": ("dropped + j, j - launch.slots", "j, j - launch.slots"),
    "a row without a gradient prepares nothing": (
        "fill_ring(ring, base, next_ptr, next_counted, vocab, launch)",
        "pass",
    ),
    "it prepares one block too few": ("for i in range(0, launch.slots)", "for i in range(0, launch.slots - 1)"),
    "what is behind a row is counted": ("< extent.vocab, z", "< extent.vocab + 2, z"),
    "what is behind a row is copied": ("mask=access * launch.width < vocab", "mask=access >= 0"),
    "what is behind a row is stored": ("inside = access * launch.width < vocab", "inside = access >= 0"),
    "rows that are not there": ("mask=after < num_rows", "mask=True"),
    "the block is taken after its slot is filled again": (
        "z = take(ring, place, launch)\n        again = j < dropped",
        "again = j < dropped\n        fill(ring, place, row_ptr, j, again, extent.vocab, launch)\n"
        "        z = take(ring, place, launch)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_schedule_is_noticed(name):
    right, wrong = WRONG[name]
    text = source()
    assert right in text
    caught, generator = 0, random.Random(0)
    for _ in range(100):
        try:
            walk(drawn(generator), text.replace(right, wrong))
        except (AssertionError, IndexError):
            caught += 1
    assert caught > 0


class Hasty(Machine):
    """Waits leave one group more under way."""

    def wait_group(self, under_way):
        super().wait_group(number(under_way) + 1)


class Forgetful(Machine):
    """One wait in eight is left out."""

    waits = 0

    def wait_group(self, under_way):
        self.waits += 1
        if self.waits % 8:
            super().wait_group(under_way)


class Lossy(Machine):
    """One copy in eight never arrives."""

    asked = 0

    def copy_block(self, slot, source_ptr, mask):
        self.asked += 1
        if self.asked % 8:
            super().copy_block(slot, source_ptr, mask)
        else:
            slot.content = spoilt(slot.dtype, slot.shape)


@pytest.mark.skipif(ON_GPU, reason="of a machine that is emulated")
@pytest.mark.parametrize("machine", [Hasty, Forgetful, Lossy])
def test_a_wrong_wait_or_fill_shows_in_the_values(machine):
    logits, rows = rows_of_a_loss(18, 2056, torch.bfloat16)
    out = torch.empty_like(logits)
    with through_ring(machine()):
        log_probs, _ = backend.logits_loss_gradient(logits, rows, ek.PolicyLossConfig(), 0.7, 2.0, True, out)
    assert log_probs.isnan().any() and out.isnan().any()


def test_rows_that_the_ring_does_not_take_go_the_usual_way():
    """Rows that are no whole accesses, start none, are too long or of wider numbers; a gradient that lies otherwise."""
    ring = Ring(num_warps=1, strips=2, slots=3)

    def launched(logits, out=None):
        with switched_on(ring):
            return launch_for(KERNEL, logits, torch.empty_like(logits) if out is None else out, may_ring=True)

    def rows(vocab, dtype=torch.bfloat16):
        return torch.zeros(2, 3, vocab, dtype=dtype)

    for vocab, slots in ((8, 1), (512, 1), (520, 2), (1536, 3), (1544, 3), (3072, 3)):
        for dtype in (torch.bfloat16, torch.float16):
            found = launched(rows(vocab, dtype))
            assert found.launch.slots == slots and found.options == {"num_warps": 1, "maxnreg": 255}
            assert found.launch.end == (2 if vocab % 512 else 0)
    for logits in (rows(7), rows(1028), rows(3080), rows(512, torch.float32), rows(512, torch.float64)):
        assert not launched(logits).launch.slots
    assert not any(launched(logits).launch.slots for logits in (rows(520)[..., 1:513], rows(516)[..., :512]))
    assert not launched(rows(512), rows(520)[..., 4:516]).launch.slots
    assert launched(rows(528)[..., 8:520], rows(512)).launch.slots == 1


def test_without_a_ring_in_the_table_no_row_goes_through_one():
    logits = torch.zeros(1, 1, 512, dtype=torch.bfloat16)
    with switched_on(None):
        assert launch_for(KERNEL, logits, logits, may_ring=True).launch.slots == 0
    assert launch_for(KERNEL, logits, logits, may_ring=True).launch.slots == 0


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return made_once(tmp_path_factory, "ring", lambda: printed("compiled_kernels", "sm_90", "ring"))


def test_the_compiled_ring_holds_its_budget(compiled):
    """Registers, shared memory, widths; of both sweeps instructions and exponentials an element. None spills."""
    assert {row["kernel"] for row in compiled} == {"ring_policy_loss_kernel"}
    assert {row["dtype"] for row in compiled} == {"bfloat16", "float16"} and len(compiled) >= 12
    ring = HOPPER.slots * HOPPER.strips * HOPPER.num_warps * 32 * 16
    for row in compiled:
        assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0, row
        # One program of 8 warps has a multiprocessor to itself.
        assert row["registers"] <= 128 and ring <= row["shared"] <= ring + 64 <= 227 * 1024, row
        # Narrow are the token's own logit, its gradient, and what a row has one of.
        assert row["load_widths"]["16"] >= 20 and row["load_widths"].get("2", 0) <= 1, row
        assert row["store_widths"]["16"] >= 12 and row["store_widths"].get("2", 0) <= 1, row
        assert row["fenced"], row
        first, second = (sweep for sweep in row["sweeps"] if sweep["special"])
        # A block's wait and the refill of its slot stand behind a barrier each.
        assert first["load_width"] == second["load_width"] == 16
        assert first["barriers"] == second["barriers"] == 2 / first["elements"]
        assert first["special"] <= 1.05 and second["special"] == 1
        reports = row.get("entropy", False)
        assert first["instructions"] <= (10.5 if reports else 8) and second["instructions"] <= (
            10.5 if reports else 8.5
        )
