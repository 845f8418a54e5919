"""Reading loops out of SASS: on a listing whose figures are counted by hand, and on a toy kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.counts.h200 import ceilings
from benchmarks.counts.sass import Sweep, innermost_loops, parse, sweeps

ROOT = Path(__file__).resolve().parents[2]


def listing(*instructions):
    """Instructions at addresses 16 bytes apart, as ``cuobjdump`` prints them."""
    lines = (f"        /*{16 * place:04x}*/    {one} ;    /* 0x0 */" for place, one in enumerate(instructions))
    return "        Function : kernel\n" + "\n".join(lines)


def read(text, itemsize):
    return sweeps(parse(text), itemsize)


SWEEPS = listing(
    "LDC R1, c[0x0][0x28]",                      # 0000
    "LDG.E.U16 R3, desc[UR4][R2.64]",            # 0010: the loop over rows begins
    "LDG.E.128 R4, desc[UR4][R2.64]",            # 0020: sweep 1, 2 x 16 bytes
    "@!P1 LDG.E.128 R8, desc[UR4][R2.64+0x10]",  # 0030
    "LDG.E R9, desc[UR4][R8.64]",                # 0040: narrow, no part of the row
    "BAR.SYNC.DEFER_BLOCKING 0x0",               # 0050
    "MUFU.EX2 R4, R4",                           # 0060
    "@P2 BRA 0x0090",                            # 0070: forward
    "MUFU.EX2 R5, R5",                           # 0080
    "@!P0 BRA 0x0020",                           # 0090
    "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]",  # 00a0: sweep 2, 16 bytes
    "SHFL.BFLY PT, R3, R3, 0x1, 0x1f",           # 00b0
    "MUFU.EX2 R6, R6",                           # 00c0
    "STG.E.EF.128 desc[UR4][R2.64], R4",         # 00d0
    "BRA.U UP0, 0x00a0",                         # 00e0
    "STG.E.128 desc[UR4][R2.64], RZ",            # 00f0: zeros
    "@!P0 BRA 0x00f0",                           # 0100
    "@P3 BRA 0x0010",                            # 0110: next row
    "EXIT",                                      # 0120
    "BRA 0x0130",                                # 0130: stops what runs past the end
)  # fmt: skip


def test_evict_first_is_said_of_a_sweep_whose_every_access_says_so():
    hinted = SWEEPS.replace("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.EF.128")
    assert [sweep.evict_first for sweep in read(hinted, itemsize=2)] == [False, True]
    assert not any(sweep.evict_first for sweep in read(hinted.replace("STG.E.EF.128", "STG.E.128"), itemsize=2))


def test_sweeps_of_a_listing():
    # bfloat16: 32 bytes are 16 elements, 16 bytes are 8; sweep 1 has 8 instructions, sweep 2 has 5.
    assert read(SWEEPS, itemsize=2) == [
        Sweep(
            16,
            16,
            instructions=8 / 16,
            special=2 / 16,
            loads=3 / 16,
            stores=0,
            barriers=1 / 16,
            shuffles=0,
            ahead=False,
            evict_first=False,
        ),
        Sweep(
            8,
            16,
            instructions=5 / 8,
            special=1 / 8,
            loads=1 / 8,
            stores=1 / 8,
            barriers=0,
            shuffles=1 / 8,
            ahead=True,
            evict_first=False,
        ),
    ]
    # float32: half the elements for the same bytes.
    assert [sweep.elements for sweep in read(SWEEPS, itemsize=4)] == [8, 4]


def test_loops_are_innermost_and_a_branch_to_itself_is_none():
    bodies = [(body[0].address, body[-1].address) for body in innermost_loops(parse(SWEEPS))]
    assert bodies == [(0x20, 0x90), (0xA0, 0xE0), (0xF0, 0x100)]


def test_two_branches_back_to_one_place_are_one_loop():
    twice = listing("LDG.E.64 R2, desc[UR4][R2.64]", "@P0 BRA 0x0000", "IADD3 R1, R1, R2, RZ", "@P1 BRA 0x0000", "EXIT")
    assert read(twice, itemsize=2) == [
        Sweep(
            4,
            8,
            instructions=1,
            special=0,
            loads=1 / 4,
            stores=0,
            barriers=0,
            shuffles=0,
            ahead=False,
            evict_first=False,
        )
    ]


def test_a_kernel_without_a_loop_is_one_sweep():
    straight = listing("LDG.E.128 R4, desc[UR4][R2.64]", "MUFU.EX2 R4, R4", "EXIT", "BRA 0x0030", "NOP", "NOP")
    assert read(straight, itemsize=4) == [Sweep(4, 16, 3 / 4, 1 / 4, 1 / 4, 0, 0, 0, False, False)]


def test_ceilings():
    # 128 lanes issue, 16 exponentials finish: 16 instructions and 2 exponentials leave 8 elements each. Two bytes read
    # and two written at 4.3 TB/s are 1.075e12 elements a second, over 132 multiprocessors at 1.98 GHz 4.1 a clock.
    issue, special, bandwidth = ceilings(instructions=16, special=2, moved_bytes=4)
    assert (issue, special, round(bandwidth, 1)) == (8, 8, 4.1)


def check_toy_kernels():
    from benchmarks.counts.launches import VOCAB
    from tests.support.test_support import compile_sum_rows

    # 2048 bfloat16 over 256 threads: one 16-byte load of 8 elements in the loop, no exponential, two barriers at most
    # for the sum over warps. The masked tail is no loop.
    (sweep,) = compile_sum_rows("sm_90")["sweeps"]
    found = [sweep[name] for name in ("elements", "load_width", "loads", "stores", "special")]
    assert found == [8, 16, 1 / 8, 0, 0]
    assert 8 < sweep["instructions"] * 8 < 100
    # With an odd stride the same 8 elements come two bytes at a time.
    (narrow,) = compile_sum_rows("sm_90", stride=VOCAB + 1)["sweeps"]
    assert [narrow[name] for name in ("elements", "load_width", "loads")] == [8, 2, 1]


def test_toy_kernels():
    """In another process, because this one interprets kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "import tests.benchmarks.test_sass as t; t.check_toy_kernels()"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
