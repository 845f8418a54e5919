"""Thinking and answer spans by the closing tag, and masks of the tokens of highest entropy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import egpo_kernels as ek

TAG = 9
TOKENS = torch.tensor(
    [
        [1, 2, TAG, 4, 5],  # a tag in the middle
        [1, TAG, TAG, 4, -100],  # the last of two, and padding
        [1, 2, 3, 4, 5],  # none
        [1, 2, 3, 4, TAG],  # nothing after it
        [-100] * 5,  # no response at all
    ]
)
THINKING = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
ANSWER = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def bools(rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_response_spans_by_hand():
    spans = ek.response_spans(TOKENS, TAG)
    assert torch.equal(spans.thinking, bools(THINKING)) and torch.equal(spans.answer, bools(ANSWER))
    assert spans.untagged == 1 and spans.untagged.dim() == 0
    ends = torch.tensor([0, 5, 10, 15, 20, 25])
    # A row past the last sequence never counts, and its tag is nobody's.
    flat = torch.cat([TOKENS.reshape(-1), torch.tensor([TAG])])
    packed = ek.response_spans(flat, [TAG], cu_seqlens=ends)
    assert torch.equal(packed.thinking, torch.cat([bools(THINKING).reshape(-1), bools([0])]))
    assert torch.equal(packed.answer, torch.cat([bools(ANSWER).reshape(-1), bools([0])]))
    assert packed.untagged == 1


def test_response_spans_with_a_tag_of_several_tokens():
    tokens = torch.tensor([[7, 8, 1, 7, 8, 2], [8, 7, 7, 8, 3, 7], [8, 1, 1, 1, 1, 7]])
    spans = ek.response_spans(tokens, (7, 8))
    assert spans.thinking.sum(-1).tolist() == [5, 4, 6] and spans.answer.sum(-1).tolist() == [1, 2, 6]
    assert spans.untagged == 1, "the last 7 of a sequence and the first 8 of the next are no tag"
    # A tag that is not counted whole, as in a prompt, is none.
    mask = torch.tensor([[0, 1, 1, 1, 0, 1]] * 3)
    assert ek.response_spans(tokens, (7, 8), mask).untagged == 2
    assert ek.response_spans(tokens, [7, 8, 1, 7, 8, 2, 8]).untagged == 3


def test_response_spans_serve_as_an_entropy_mask():
    tokens = torch.tensor([[1, TAG, 2], [1, TAG, 2]])
    old = -torch.tensor([[5.0, 5.0, 1.0], [7.0, 7.0, 3.0]])
    answer = ek.response_spans(tokens, TAG).answer
    found = ek.group_advantages(2, torch.tensor([1.0, 0.0]), old, entropy_mask=answer)
    assert found.uncertainty.tolist() == [1, 3]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), max_size=4),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
)
def test_response_spans_of_a_plain_search(rows, tag):
    tokens = torch.tensor(rows, dtype=torch.long).view(-1, 6)
    spans = ek.response_spans(tokens, tag)
    for number, row in enumerate(rows):
        ends = [at + len(tag) for at in range(7 - len(tag)) if row[at : at + len(tag)] == tag]
        split = max(ends) if ends else None
        places = torch.arange(6)
        assert torch.equal(spans.thinking[number], places < (6 if split is None else split))
        assert torch.equal(spans.answer[number], places >= (0 if split is None else split))


def test_top_entropy_mask_by_hand():
    entropy = torch.tensor([[5.0, 1.0, 4.0], [2.0, 3.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    # Of 1 2 3 4 5 the highest 40 %: the 0.6 quantile lies at place 2.4, 3.4.
    assert ek.top_entropy_mask(entropy, mask, fraction=0.4).tolist() == [[True, False, True], [False, False, False]]
    assert torch.equal(ek.top_entropy_mask(entropy, mask, fraction=1.0), mask != 0)
    assert ek.top_entropy_mask(entropy, mask, fraction=1e-9).sum() == 1
    packed = ek.top_entropy_mask(entropy.reshape(-1), cu_seqlens=torch.tensor([0, 3, 5]), fraction=0.4)
    assert packed.tolist() == [True, False, True, False, False, False]


def test_top_entropy_mask_without_anything_to_choose():
    nothing = torch.zeros(2, 3)
    assert not ek.top_entropy_mask(nothing, torch.zeros(2, 3)).any()
    assert ek.top_entropy_mask(torch.zeros(0, 3)).shape == (0, 3)
    assert ek.top_entropy_mask(nothing).all(), "ties are chosen together"
    odd = torch.tensor([[math.nan, math.inf, -math.inf, 1.0, 2.0]])
    assert ek.top_entropy_mask(odd, fraction=0.5).tolist() == [[False, False, False, False, True]]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.77])
def test_top_entropy_mask_is_torchs_quantile(fraction):
    generator = torch.Generator().manual_seed(3)
    entropy = torch.rand(7, 31, dtype=torch.float64, generator=generator)
    mask = torch.rand(7, 31, generator=generator) < 0.6
    threshold = entropy[mask].quantile(1 - fraction)
    assert torch.equal(ek.top_entropy_mask(entropy, mask, fraction=fraction), mask & (entropy >= threshold))
