"""The instruments that other tests measure kernels with, on toy kernels whose figures are known by hand."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from benchmarks.counts import offline  # noqa: E402
from benchmarks.counts.launches import VOCAB  # noqa: E402
from benchmarks.counts.offline import Compiler  # noqa: E402
from benchmarks.counts.traffic import NO_TRAFFIC, TensorTraffic, count_traffic  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


class Rows(NamedTuple):
    x_ptr: Any
    ref_ptr: Any
    row_stride: Any


@triton.jit
def sum_rows_kernel(rows, out_ptr, vocab, SWEEPS: tl.constexpr, BLOCK_V: tl.constexpr):
    """One row a program: the sum of x, plus that of ref where there is one, over SWEEPS identical sweeps."""
    row = tl.program_id(0)
    start_of_row = tl.cast(row, tl.int64) * rows.row_stride
    offs_v = tl.arange(0, BLOCK_V)
    full = vocab // BLOCK_V * BLOCK_V
    total = 0.0
    for _ in tl.static_range(SWEEPS):
        for start in range(0, full, BLOCK_V):
            total += tl.sum(tl.load(rows.x_ptr + start_of_row + start + offs_v).to(tl.float32))
        if full < vocab:
            valid_v = full + offs_v < vocab
            x = tl.load(rows.x_ptr + start_of_row + full + offs_v, mask=valid_v, other=0.0)
            total += tl.sum(x.to(tl.float32))
        if rows.ref_ptr is not None:
            total += tl.sum(tl.load(rows.ref_ptr + offs_v, mask=offs_v < vocab, other=0.0).to(tl.float32))
    tl.store(out_ptr + row, total)


@triton.jit
def copy_block_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def histogram_kernel(bins_ptr, index_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + offs, mask=offs < n, other=0)
    tl.atomic_add(bins_ptr + index, 1, mask=offs < n)


@triton.jit
def increment_rows_kernel(x_ptr, row_stride, LANES: tl.constexpr):
    """x[row, lane] += 1, through a pointer block of its own."""
    at = x_ptr + tl.program_id(0) * row_stride + tl.arange(0, LANES)
    tl.store(at, tl.load(at) + 1)


@triton.jit
def spill_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Holds BLOCK values while it reduces them, more than the few registers that its test leaves it."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    high = tl.max(x)
    tl.store(y_ptr + offs, tl.exp2(x - high) / tl.sum(tl.exp2(x - high)))


def sum_rows(x, ref=None, sweeps=1, block=16):
    out = torch.empty(len(x))
    sum_rows_kernel[(len(x),)](Rows(x, ref, x.stride(0)), out, x.shape[1], sweeps, block)
    return out


interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts in the interpreter")


@interpreted
def test_masked_lanes_do_not_count_and_a_fresh_output_is_known_afterwards():
    x = torch.randn(3, 37)
    with count_traffic() as traffic:
        out = sum_rows(x)
    torch.testing.assert_close(out, x.sum(1))
    assert traffic.kernels == {"sum_rows_kernel": 1}
    # 3 x 37 and 3 elements of 4 bytes.
    assert traffic.of(x) == TensorTraffic(1, loaded=444, loaded_once=444, stored=0, stored_once=0)
    assert traffic.of(out) == TensorTraffic(1, loaded=0, loaded_once=0, stored=12, stored_once=12)
    assert traffic.of(torch.randn(3, 37)) == NO_TRAFFIC
    assert traffic.total == TensorTraffic(1, loaded=444, loaded_once=444, stored=12, stored_once=12)


@interpreted
def test_a_second_sweep_counts_twice_and_a_second_launch_loads_anew():
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    with count_traffic() as traffic:
        sum_rows(x, sweeps=2)
        sum_rows(x)
    assert [launch.of(x)[:3] for launch in traffic.launches] == [(1, 256, 128), (1, 128, 128)]
    assert traffic.of(x)[:3] == (2, 384, 256)
    assert traffic.kernels == {"sum_rows_kernel": 2}


@interpreted
def test_a_tensor_that_programs_share_is_loaded_once_in_the_launch():
    x, ref = torch.randn(4, 16), torch.randn(16)
    with count_traffic() as traffic:
        sum_rows(x, ref)
    assert traffic.of(ref)[:3] == (1, 256, 64)


@interpreted
def test_a_strided_view_counts_its_elements_and_not_the_gaps():
    whole = torch.randn(6, 40)
    view = whole[::2, 3:33]
    with count_traffic() as traffic:
        sum_rows(view)
    assert traffic.of(view)[:3] == (1, 360, 360)  # 3 x 30 x 4
    assert traffic.of(whole)[:3] == (1, 360, 360)
    assert traffic.of(whole[1::2]) == NO_TRAFFIC
    assert traffic.of(whole[:, :3]) == NO_TRAFFIC
    assert traffic.of(whole[0, 2:5]).loaded == 8
    assert traffic.of(whole.t()[5]).loaded == 12
    assert traffic.of(view[:1].expand(9, 30)).loaded == 120
    assert traffic.rows_loaded(whole) == [0, 2, 4]


@interpreted
def test_bytes_count_whatever_the_dtype_of_the_asking_view():
    x = torch.arange(16, dtype=torch.int32)
    y = torch.zeros(16, dtype=torch.int32)
    with count_traffic() as traffic:
        copy_block_kernel[(2,)](x, y, BLOCK=4)
    assert torch.equal(y[:8], x[:8])
    assert traffic.of(x.view(torch.uint8)[1:3]).loaded == 2
    assert traffic.of(y.view(torch.int64)[2:])[3:] == (16, 16)


@interpreted
def test_an_update_in_place_is_loaded_and_stored():
    x = torch.zeros(4, 16)
    with count_traffic() as traffic:
        increment_rows_kernel[(2,)](x, x.stride(0), LANES=8)
    assert traffic.of(x) == TensorTraffic(1, 64, 64, 64, 64)
    assert traffic.of(x[2:]) == NO_TRAFFIC


@interpreted
def test_an_atomic_loads_and_stores():
    bins, index = torch.zeros(4, dtype=torch.int32), torch.tensor([1, 1, 3])
    with count_traffic() as traffic:
        histogram_kernel[(1,)](bins, index, 3, BLOCK=4)
    assert bins.tolist() == [0, 2, 0, 1]
    assert traffic.of(bins) == TensorTraffic(1, loaded=12, loaded_once=8, stored=12, stored_once=8)
    assert traffic.of(index)[:3] == (1, 24, 24)


@interpreted
def test_reused_memory_does_not_inherit_traffic_and_counting_keeps_no_data_alive():
    memory = np.zeros((4, 16), np.float32)
    with count_traffic() as traffic:
        freed = torch.from_numpy(memory)
        freed_storage = StorageWeakRef(freed.untyped_storage())
        sum_rows(freed)
        del freed
        gc.collect()  # the interpreter holds a launch's storages in a reference cycle
        assert freed_storage.expired()
        # Many, because one of them gets the freed storage's identity if that is free to be given out.
        reuses = [torch.from_numpy(memory) for _ in range(100)]
        assert [traffic.of(reused) for reused in reuses] == [NO_TRAFFIC] * 100
        sum_rows(reuses[0])
    assert traffic.of(reuses[0])[:3] == (1, 256, 256)
    assert traffic.of(reuses[1]) == NO_TRAFFIC


@interpreted
def test_an_access_outside_every_argument_is_refused():
    x, y = torch.zeros(8), torch.zeros(8)
    message = "copy_block_kernel: 4 of 4 loads lie outside every tensor argument"
    with pytest.raises(InterpreterError, match=message), count_traffic():
        copy_block_kernel[(3,)](x, y, BLOCK=4)


@interpreted
def test_nothing_is_counted_after_the_block():
    x = torch.randn(2, 16)
    with count_traffic() as traffic:
        pass
    sum_rows(x)
    assert traffic.launches == []


def compiled(target, kernel, *args, **options):
    """What becomes of a launch with these arguments, of which one is as large as logits."""
    compiler = Compiler(target)
    with compiler.catching():
        kernel[(1,)](*args, **options)
    (row,) = compiler.launched
    return row


def compile_sum_rows(target, stride=VOCAB, vocab=VOCAB, with_ref=False):
    """Rows of bfloat16 that lie ``stride`` apart."""
    x = torch.empty(2, stride, dtype=torch.bfloat16)
    rows = Rows(x, x if with_ref else None, x.stride(0))
    return compiled(target, sum_rows_kernel, rows, torch.empty(2), vocab, 1, 2048, num_warps=8)


def check_widths():
    for target in ("sm_80", "sm_90", "sm_100"):
        # 2048 bf16 over 256 threads are 8 each, one 16-byte load: one in the loop, one in the tail.
        printed, dump = [], offline._dump
        with mock.patch.object(offline, "_dump", lambda *given: printed.append(dump(*given)) or printed[-1]):  # noqa: B023
            wide = compile_sum_rows(target)
        # In the disassembler's own words, whatever reads them.
        assert sum("LDG.E.128" in line for text in printed for line in text.splitlines()) == 2
        assert wide["load_widths"] == {16: 2}, (target, wide)
        assert wide["store_widths"] == {4: 1}
        assert (wide["spill_stores"], wide["spill_loads"], wide["stack"]) == (0, 0, 0)
        assert 8 <= wide["registers"] <= 128
        assert wide["shared"] > 0  # the partial sums of the warps
    # An odd vocabulary narrows the tail only; an odd stride everything.
    assert compile_sum_rows("sm_90", vocab=VOCAB - 1)["load_widths"] == {16: 1, 2: 8}
    assert compile_sum_rows("sm_90", stride=VOCAB + 1)["load_widths"] == {2: 16}
    # A pointer that is None in one launch and given in the other.
    assert compile_sum_rows("sm_90", with_ref=True)["load_widths"] == {16: 3}


def check_amd():
    wide = compile_sum_rows("gfx942")
    # 512 threads of 4 elements.
    assert wide["load_widths"] == {8: 2}, wide
    assert wide["store_widths"] == {4: 1}
    assert wide["registers"] > 0
    assert (wide["spill_stores"], wide["spill_loads"]) == (0, 0)


def check_spills():
    x, y = torch.empty(VOCAB), torch.empty(VOCAB)
    free = compiled("sm_90", spill_kernel, x, y, 8192, num_warps=4)
    tight = compiled("sm_90", spill_kernel, x, y, 8192, num_warps=4, maxnreg=32)
    assert (free["spill_stores"], free["spill_loads"]) == (0, 0)
    assert tight["registers"] <= 32 < free["registers"]
    assert tight["spill_stores"] > 0
    assert tight["spill_loads"] > 0
    # The stack is there for the spills and for nothing else.
    assert (free["stack"], tight["stack"] % 8) == (0, 0)
    assert tight["stack"] > 0


def test_offline_compilation():
    """In another process, because this one interprets kernels; in one, because starting it takes longest."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    checks = "import tests.support.test_support as t; t.check_widths(); t.check_amd(); t.check_spills()"
    done = subprocess.run([sys.executable, "-c", checks], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@interpreted
def test_an_interpreting_process_cannot_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        Compiler("sm_90")
