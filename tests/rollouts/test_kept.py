"""Kept sets from padded rows, from engines' records and from logits, against plain Python sets."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.support.device import DEVICE


def sets_of(support):
    """Each row's ids, sorted."""
    ids, offsets = support.ids.tolist(), support.offsets.tolist()
    return [sorted(ids[first:last]) for first, last in itertools.pairwise(offsets)]


# Padded rows.


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_pack_support(data):
    fill = data.draw(st.sampled_from([-1, -100, 0]))
    rows, width = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 6))
    ids = [[data.draw(st.sampled_from([fill, 0, 1, 2, 9])) for _ in range(width)] for _ in range(rows)]
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    given = torch.tensor(ids, dtype=dtype, device=DEVICE).reshape(rows, width)
    wanted = [sorted(set(row) - {fill}) for row in ids]
    found = ek.pack_support(given, fill)
    assert sets_of(found) == wanted and found.ids.device == given.device
    if rows % 2 == 0:
        again = ek.pack_support(given.view(2, rows // 2, width), fill)
        assert sets_of(again) == wanted


@pytest.mark.parametrize(
    "ids, fill, error, message",
    [
        (torch.zeros(3, dtype=torch.long), -1, ValueError, r"ids has shape \[3\]; it must be \[S, T, K\] or \[N, K\]"),
        (torch.zeros(3, 2), -1, TypeError, "ids has dtype torch.float32; it must be an integer"),
        ([[1]], -1, TypeError, "ids is list"),
        (torch.zeros(3, 2, dtype=torch.long), None, TypeError, "fill is None; it must be an int"),
        (torch.zeros(3, 2, dtype=torch.long), 0.5, TypeError, "fill is 0.5"),
    ],
)
def test_pack_support_refuses(ids, fill, error, message):
    with pytest.raises(error, match=message):
        ek.pack_support(ids, fill)


# Records.


def as_record(data, kept):
    """A response's sets as some engine returns them: ids and offsets, or a list for each token."""
    flat, ends = [id for own in kept for id in own], np.cumsum([0, *map(len, kept)])
    make = data.draw(st.sampled_from([list, np.array, torch.tensor, tuple]))
    return make(flat) if flat else [], make(ends.tolist())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_support_from_lists(data):
    count, length = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 5))
    packed, listed = data.draw(st.booleans()), data.draw(st.booleans())
    lengths = [data.draw(st.integers(0, length)) for _ in range(count)] if packed else [length] * count
    starts, records, wanted = [], [], []
    for size in lengths:
        start = data.draw(st.integers(0, size))
        tokens = data.draw(st.integers(0, size - start))
        kept = [data.draw(st.lists(st.integers(0, 9), max_size=3, unique=True)) for _ in range(tokens)]
        nothing = data.draw(st.integers(0, 4)) == 0
        starts.append(start)
        records.append(None if nothing else kept)
        rows = [[] for _ in range(size)]
        rows[start : start + tokens] = [[] if nothing else sorted(own) for own in kept]
        wanted += rows
    options = {"starts": starts, "length": length}
    if packed:
        tail = data.draw(st.sampled_from([None, 0, 2]))
        options["length"] = None if tail is None else sum(lengths) + tail
        options["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths).tolist()])
        wanted += [[]] * (tail or 0)
    if listed:
        found = ek.support_from_lists(records, **options)
    else:
        pairs = [(None, None) if record is None else as_record(data, record) for record in records]
        ids, offsets = [list(part) for part in zip(*pairs, strict=True)] or ([], [])
        found = ek.support_from_lists(ids, offsets, **options)
    assert sets_of(found) == wanted
    assert found.ids.dtype == found.offsets.dtype == torch.int64 and found.ids.device.type == "cpu"


REFUSED = {
    "no list": ((torch.zeros(2), None), {}, TypeError, "token_ids is Tensor; it must be a list"),
    "another number of offsets": (([[1]], []), {}, ValueError, "offsets has 0 entries; it must have 1"),
    "ids without offsets": (([torch.tensor([1])], None), {}, TypeError, r"token_ids\[0\] is Tensor without offsets"),
    "floats": (([[1.5]], [[0, 1]]), {}, TypeError, r"token_ids\[0\] is \[1.5\]; it must be a list of integers"),
    "lists in ids": (([[[1], [2, 3]]], [[0, 1]]), {}, TypeError, r"token_ids\[0\] is .*; it must be a list of int"),
    "offsets that fall": (([[1, 2]], [[0, 2, 1, 2]]), {}, ValueError, r"offsets\[0\] is \[0, 2, 1, 2\] over 2 ids"),
    "offsets that end early": (([[1, 2]], [[0, 1]]), {}, ValueError, r"offsets\[0\] is \[0, 1\] over 2 ids"),
    "no offsets": (([[1, 2]], [[]]), {}, ValueError, r"offsets\[0\] is \[\] over 2 ids"),
    "a record too long": (([[[1]] * 5], None), {}, ValueError, r"token_ids\[0\] has a record of 5 tokens"),
    "a start too late": (([[[1]] * 2], None), {"starts": 3}, ValueError, r"of 2 tokens from row 3 on, .* has 4 rows"),
    "a start before": (([[[1]]], None), {"starts": [-1]}, ValueError, r"of 1 tokens from row -1 on"),
    "other starts": (([[[1]]], None), {"starts": [0, 1]}, ValueError, "starts has 2 entries; it must be an int"),
    "no layout": (([[[1]]], None), {"length": None}, ValueError, "length and cu_seqlens are None"),
    "other cu_seqlens": (
        ([[[1]]], None), {"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, r"cu_seqlens is \[0, 2, 4\]; it must be",
    ),
    "fewer rows than sequences": (
        ([[[1]]], None), {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "length is 4 with cu_seqlens that end at 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("given, options, error, message", REFUSED.values(), ids=REFUSED)
def test_support_from_lists_refuses(given, options, error, message):
    with pytest.raises(error, match=message):
        ek.support_from_lists(*given, **({"length": 4} | options))


# Logits.


def filtered(z, top_k, top_p, min_p):
    """One row's kept ids, filter after filter, in Python's floats."""
    kept = [v for v in range(len(z)) if z[v] > -math.inf]
    if top_k is not None:
        last = sorted((z[v] for v in kept), reverse=True)[:top_k][-1:]
        kept = [v for v in kept if z[v] >= last[0]]
    order = sorted(kept, key=lambda v: (-z[v], v))
    top = z[order[0]]
    if top_p is not None:
        shares = [math.exp(z[v] - top) for v in order]
        held, few = 0.0, []
        for v, share in zip(order, shares, strict=True):
            if held < top_p or not few:
                few.append(v)
            held += share / sum(shares)
        order = few
    return sorted(v for v in order if min_p is None or math.exp(z[v] - top) >= min_p)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_top_p_support(data):
    vocab, rows = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 4))
    levels = st.sampled_from([-math.inf, -2.0, 0.0, 0.25, 1.0, 3.0])
    z = [[data.draw(levels) for _ in range(vocab)] for _ in range(rows)]
    for row in z:
        row[data.draw(st.integers(0, vocab - 1))] = 2.0  # something is possible
    options = {
        "top_k": data.draw(st.sampled_from([None, 1, 2, 5, 50])),
        # Away from any sum of the levels' shares, at which rounding would decide.
        "top_p": data.draw(st.sampled_from([None, 1e-6, 0.3141, 0.9173, 1.0])),
        "min_p": data.draw(st.sampled_from([None, 0.0, 0.05, 0.3, 1.0])),
    }
    heat = data.draw(st.sampled_from([1.0, 0.5]))
    logits = torch.tensor(z, dtype=torch.float64, device=DEVICE).reshape(rows, vocab)
    if not any(value is not None for value in options.values()):
        return
    found = ek.top_p_support(logits, temperature=heat, **options)
    wanted = [filtered([value / heat for value in row], **options) for row in z]
    assert sets_of(found) == [[] if len(kept) == vocab else kept for kept in wanted]
    per_row = torch.full((rows,), heat, dtype=torch.float64, device=DEVICE)
    assert sets_of(ek.top_p_support(logits, temperature=per_row, **options)) == sets_of(found)


def test_all_of_the_probability_leaves_nothing_out():
    """However little of it a token has."""
    logits = torch.tensor([[0.0, -50.0, -100.0, -torch.inf]], device=DEVICE)
    assert sets_of(ek.top_p_support(logits, top_p=1.0)) == [[0, 1, 2]]


def test_one_temperature_for_each_sequence():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    heats = torch.tensor([0.5, 2.0], device=DEVICE)
    found = sets_of(ek.top_p_support(logits, top_p=0.8, temperature=heats))
    apart = [ek.top_p_support(one, top_p=0.8, temperature=heat) for one, heat in zip(logits, (0.5, 2.0), strict=True)]
    assert found == sets_of(apart[0]) + sets_of(apart[1])


@pytest.mark.parametrize("heat", [0.0, -1.0, torch.nan])
def test_a_temperature_that_is_none(heat):
    with pytest.raises(ValueError, match="temperature holds a number that is not above 0"):
        ek.top_p_support(torch.zeros(1, 3), top_p=0.9, temperature=torch.tensor([heat]))


def test_a_sequence_without_a_record_may_start_anywhere():
    """As of a response of no tokens: its prompt's length less 1 is -1."""
    found = ek.support_from_lists([None, [[1]], []], length=4, starts=[-1, 0, 9])
    assert sets_of(found) == [[]] * 4 + [[1]] + [[]] * 7


def test_top_p_support_in_chunks(monkeypatch):
    logits = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole = ek.top_p_support(logits, top_p=0.9)
    monkeypatch.setattr("egpo_kernels.rollouts.kept.CHUNK_BYTES", 1)
    assert sets_of(ek.top_p_support(logits, top_p=0.9)) == sets_of(whole) and whole.offsets.shape == (11,)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "top_k, top_p and min_p are None; one of them must say"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_k": 1.5}, TypeError, "top_k is 1.5"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ({"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ({"min_p": -0.1}, ValueError, "min_p is -0.1"),
        ({"top_p": 0.5, "temperature": 0}, ValueError, "temperature is 0"),
        ({"top_p": 0.5, "temperature": torch.ones(3)}, ValueError, r"temperature has shape \[3\]"),
    ],
)
def test_top_p_support_refuses(options, error, message):
    with pytest.raises(error, match=message):
        ek.top_p_support(torch.zeros(2, 4), **options)


def test_top_p_support_refuses_what_is_no_logits():
    with pytest.raises(ValueError, match=r"logits has shape \[4\]; it must be \[S, T, V\] or \[N, V\]"):
        ek.top_p_support(torch.zeros(4), top_k=1)
