"""How many rows a chunk has: what a row takes, what is never exceeded, what a GPU's memory and tiles make of it."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import egpo_kernels as ek
from egpo_kernels import portable
from egpo_kernels.linear import chunks, sizes
from egpo_kernels.linear.head import Head, Wanted
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.cost import products

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
MANY = 10**9
GIB, DEFAULT = 1 << 30, 256 << 20
CARD = 80 * GIB
"""Memory of a GPU."""


def kind_of(vocab=1000, logits=FP32, weight=None, capped=False, trains=False, apart=False):
    return sizes.Kind(vocab, logits, weight or logits, capped, trains, apart)


# Bytes.


ROWS = [
    (kind_of(), 4000),
    (kind_of(logits=BF16), 2000),
    (kind_of(logits=FP64), 8000),
    # The gradient as it is multiplied.
    (kind_of(logits=FP32, weight=BF16), 6000),
    # A softcap's derivative needs the logits beside their gradient.
    (kind_of(capped=True), 8000),
    (kind_of(logits=FP32, weight=BF16, capped=True), 10000),
]


@pytest.mark.parametrize("kind, per_row", ROWS)
def test_as_many_rows_as_fit(kind, per_row):
    assert kind.row_bytes == per_row
    assert sizes.chunk_rows(kind, MANY, 10 * per_row, None, 0) == 10
    assert sizes.chunk_rows(kind, MANY, 11 * per_row - 1, None, 0) == 10
    assert sizes.chunk_rows(kind, MANY, 1, None, 0) == 1


def test_one_chunk_needs_no_float32():
    """Several need float32 copies beside them, where 16-bit products cannot be summed in float32 by themselves."""
    kind = kind_of(logits=BF16, trains=True, apart=True)
    assert sizes.chunk_rows(kind, 30, 60_000, None, 0) == 30
    assert sizes.chunk_rows(kind, 31, 60_000, None, 0) == 8  # 10 fit, in 4 chunks
    assert sizes.chunk_rows(kind._replace(sums_apart=False), 31, 60_000, None, 0) == 16


def test_scratch_is_part_of_a_chunk():
    """All of it, or, where that leaves less room, as much as so few rows need: twice a row in float32."""
    assert sizes.chunk_rows(kind_of(), MANY, 40_000, None, 8_000) == 8
    assert sizes.chunk_rows(kind_of(), MANY, 40_000, None, 10**9) == 3
    assert sizes.chunk_rows(kind_of(logits=BF16), MANY, 40_000, None, 10**9) == 4
    assert sizes.chunk_rows(kind_of(logits=FP64), MANY, 48_000, None, 10**9) == 2


HEADS = [
    (FP32, 0.0, Wanted.only_hidden(), 4000),
    (FP32, 0.0, Wanted(True, True, False, False, False), 4000),
    (BF16, 0.0, Wanted.only_hidden(), 2000),
    # A CPU cannot add a product of 16-bit matrices to a float32 one.
    (BF16, 0.0, Wanted(True, True, False, False, False), 6000),
    (BF16, 0.0, Wanted(True, False, False, True, True), 6000),
    (FP32, 30.0, Wanted.only_hidden(), 8000),
]


@pytest.mark.parametrize("dtype, softcap, wanted, per_row", HEADS)
def test_a_head_says_what_its_rows_take(dtype, softcap, wanted, per_row):
    weight = torch.empty(1000, 4, dtype=dtype)
    head = Head(weight, None, None, None, 1.0, 1.0, softcap, dtype)
    assert chunks.chunk_rows(head, wanted, 10 * per_row, 0, MANY) == 10


# Defaults.


CPU_DEFAULTS = [
    (kind_of(), DEFAULT // 4000),
    (kind_of(151936), DEFAULT // (151936 * 4)),
    (kind_of(151936, BF16), 883),
    (kind_of(151936, trains=True), 4096),
    # Adapters that train are small.
    (kind_of(151936, BF16, apart=True), DEFAULT // (151936 * 6)),
]


@pytest.mark.parametrize("kind, rows", CPU_DEFAULTS)
def test_a_cpu_has_256_mebibytes(kind, rows):
    total = 100 * rows
    assert sizes.chunk_rows(kind, total, None, None, 0) == rows
    assert sizes.chunk_rows(kind, total, DEFAULT, None, 0) == min(
        rows, DEFAULT // (kind.row_bytes + 4000 * kind.sums_apart)
    )


GPU_DEFAULTS = [
    # 2.5 GiB hold 8833 rows, of several chunks 8704, and fewer are shared evenly.
    (kind_of(151936, BF16), MANY, CARD, 8704),
    (kind_of(151936, BF16), 8192, CARD, 8192),
    (kind_of(151936, BF16), 8834, CARD, 4608),
    (kind_of(151936, BF16), 17409, CARD, 5888),
    (kind_of(151936, FP32, BF16), MANY, CARD, 2816),
    # A small card: 2048 rows all the same, and 4096 where the weight trains.
    (kind_of(151936, BF16), MANY, 8 * GIB, 2048),
    (kind_of(151936, BF16), 2049, 8 * GIB, 1280),
    (kind_of(151936, BF16, trains=True), MANY, 8 * GIB, 4096),
    (kind_of(151936, FP32, trains=True), MANY, 24 * GIB, 4096),
    (kind_of(151936, FP32), MANY, 24 * GIB, 2048),
    (kind_of(256, FP32), MANY, 24 * GIB, 786_176),
]


@pytest.mark.parametrize("kind, total, memory, rows", GPU_DEFAULTS)
def test_a_gpu_has_a_share_of_its_memory(kind, total, memory, rows):
    assert sizes.chunk_rows(kind, total, None, memory, 0) == rows


def test_the_bound_of_256_mebibytes_on_a_gpu():
    """883 rows fit: 3 tiles of them, not 883 and a rest of 245."""
    kind = kind_of(151936, BF16)
    assert sizes.chunk_rows(kind, MANY, DEFAULT, CARD, 0) == 768
    assert sizes.chunk_rows(kind, 8192, DEFAULT, CARD, 0) == 768
    assert sizes.chunk_rows(kind, 4 * 883 - 1, DEFAULT, CARD, 0) == 768
    assert sizes.chunk_rows(kind, 883, DEFAULT, CARD, 0) == 883
    assert sizes.chunk_rows(kind, 884, DEFAULT, CARD, 0) == 512
    assert sizes.chunk_rows(kind, 8192, DEFAULT, None, 0) == 820


@pytest.mark.parametrize("memory", [None, 1, 8 * GIB, CARD, 10**15])
@pytest.mark.parametrize("bound", [None, 1, DEFAULT])
def test_no_rows_and_one(bound, memory):
    for total in (0, 1):
        assert sizes.chunk_rows(kind_of(151936, BF16), total, bound, memory, 0) == 1


KINDS = st.builds(
    kind_of,
    vocab=st.integers(1, 300_000),
    logits=st.sampled_from([BF16, FP32, FP64]),
    weight=st.sampled_from([BF16, FP32]),
    capped=st.booleans(),
    trains=st.booleans(),
    apart=st.booleans(),
)
TOTALS = st.one_of(st.sampled_from([0, 1, 255, 256, 257, 2048, 2049, 8192]), st.integers(0, 10**6), st.just(10**12))
BOUNDS = st.none() | st.integers(1, 1 << 20) | st.integers(1 << 20, 1 << 34)
MEMORIES = st.none() | st.integers(1, 1 << 30) | st.integers(1 << 30, 1 << 40)


@settings(max_examples=1000, derandomize=True, deadline=None)
@given(KINDS, TOTALS, BOUNDS, MEMORIES, st.sampled_from([0, 5 << 20, 512 << 20]))
def test_every_size(kind, total, bound, memory, scratch):
    rows = sizes.chunk_rows(kind, total, bound, memory, scratch)
    assert rows == sizes.chunk_rows(kind, total, bound, memory, scratch) >= 1
    limit = bound or (DEFAULT if memory is None else memory // 32)
    count = max(-(-total // rows), 1)
    per_row = kind.row_bytes + (4 * kind.vocab if kind.sums_apart and count > 1 else 0)
    double = FP64 if kind.logits_dtype == FP64 else FP32
    beside = 2 * kind.vocab * double.itemsize
    most, least = max((limit - scratch) // per_row, limit // (per_row + (beside if scratch else 0))), 1
    if bound is None:
        least = max(4096 if kind.weight_trains else 1, 2048 if memory is not None else 1)
    assert rows <= max(most, least)
    assert rows <= least or rows * per_row + min(scratch, rows * beside) <= limit
    # Shared evenly, by as few chunks as the bound and the tiles allow.
    tile = 256 if memory is not None and max(most, least) >= 256 else 1
    if count == 1:
        assert rows == max(total, 1)
    else:
        assert rows % tile == 0
        allowed = max(most, least) // tile * tile
        assert count == -(-total // allowed)
        assert rows - total / count < tile + 1


# Devices.


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_devices_that_do_not_tell_their_memory(device):
    assert sizes.device_memory(torch.device(device)) is None


@pytest.mark.parametrize("device", ["cuda:3", "xpu:1"])
def test_all_of_a_gpus_memory_is_asked_for_once(device, monkeypatch):
    """What is free of it decides nothing."""
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(total_memory=CARD)

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(get_device_properties=properties))
    sizes.device_memory.cache_clear()
    try:
        assert [sizes.device_memory(torch.device(device)) for _ in range(3)] == [CARD] * 3
    finally:
        sizes.device_memory.cache_clear()
    assert asked == [torch.device(device)]


# The walk.


def step(trains, **options):
    """Loss and gradients of a batch of more rows than a tile has."""
    generator = torch.Generator().manual_seed(0)
    leaves = {"hidden": torch.randn(1, 700, 4, generator=generator), "weight": torch.randn(11, 4, generator=generator)}
    leaves = {name: leaf.requires_grad_(name in trains) for name, leaf in leaves.items()}
    tokens = torch.randint(11, (1, 700), generator=generator)
    advantages = torch.randn(1, 700, generator=generator)
    loss = ek.linear_policy_loss(*leaves.values(), tokens, advantages, backend="portable", **options).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: leaves[name].grad for name in trains}}


WALKS = [(300, [256, 256, 188]), (600, [512, 188]), (255, [234, 234, 232]), (700, [700])]


@pytest.mark.parametrize("trains", [("hidden", "weight"), ("hidden",)], ids=["trains", "frozen"])
@pytest.mark.parametrize("fit, rows", WALKS)
def test_tiles_of_rows(fit, rows, trains, monkeypatch):
    """The walk of a GPU, on a CPU that says it has a GPU's memory."""
    whole = step(trains)
    monkeypatch.setattr(sizes, "device_memory", lambda device: CARD)
    monkeypatch.setattr(portable, "scratch_bytes", lambda logits: 0)
    found = {}
    seen = products(lambda: found.update(step(trains, max_chunk_bytes=fit * 11 * 4)))
    assert [one[0] for one in seen if one[1:] == (4, 11)] == rows
    again = step(trains, max_chunk_bytes=fit * 11 * 4)
    for name, value in whole.items():
        assert_rounding(found[name], value)
        assert_bits(again[name], found[name], name)
