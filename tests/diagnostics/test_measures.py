"""Diagnostics as numbers: worked out by hand, AUC by counting pairs, edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egpo_kernels import diagnostics, response_spans
from tests.diagnostics.batch import CORRECT, EMPTY, LENGTHS, H
from tests.support.device import DEVICE

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
EPS = torch.finfo(torch.float64).eps


# By hand.


@pytest.mark.gpu
def test_diagnostics_gap_by_hand():
    found = diagnostics.uncertainty_gap(H, CORRECT)
    assert found.correct == (3, 0.5, 0.375, 0.5, 0.625)
    assert found.incorrect == (2, 1.25, 0.875, 1.25, 1.625)
    assert found.gap == 0.75
    assert found.left_out == 1


@pytest.mark.gpu
def test_diagnostics_roc_by_hand():
    # Incorrect against correct: 0.5 wins 1, ties 1, loses 1; 2 wins 3: 4.5 of 6 pairs.
    found = diagnostics.roc(H, CORRECT)
    assert found.auc == 0.75
    assert (found.correct, found.incorrect, found.left_out) == (3, 2, 1)
    assert found.thresholds == (math.inf, 2.0, 0.75, 0.5, 0.25)
    assert found.true_positive_rate == (0, 0.5, 0.5, 1, 1)
    assert found.false_positive_rate == (0, 0, 1 / 3, 2 / 3, 1)


@pytest.mark.gpu
def test_diagnostics_correlation_by_hand():
    # H - 0.8 = (-0.55, -0.3, -0.05, 1.2, -0.3), length - 2.4 = (-1.4, -0.4, 0.6, 1.6, -0.4): products sum to 2.9,
    # squares to 1.925 and 5.2. Ranks (1, 2.5, 4, 5, 2.5) are the same on both sides.
    found = diagnostics.length_correlation(H, LENGTHS)
    assert abs(found.pearson - 2.9 / math.sqrt(1.925 * 5.2)) <= 4 * EPS
    assert abs(found.spearman - 1) <= 4 * EPS
    assert (found.sequences, found.left_out) == (5, 1)


@pytest.mark.gpu
def test_diagnostics_span_uncertainty_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -math.inf, math.nan], [-1.0, -1.0, -1.0]], device=DEVICE)
    span = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]], device=DEVICE)
    whole = [7 / 3, math.nan, 1.0]
    for given_span, wanted in ((span, [2.5, 0.5, math.nan]), (None, whole)):
        found = diagnostics.span_uncertainty(log_probs, given_span)
        torch.testing.assert_close(found.cpu(), torch.tensor(wanted), equal_nan=True)
        packed = None if given_span is None else given_span.reshape(-1)
        found = diagnostics.span_uncertainty(
            log_probs.reshape(-1), packed, cu_seqlens=torch.tensor([0, 3, 6, 9], device=DEVICE)
        )
        torch.testing.assert_close(found.cpu(), torch.tensor(wanted), equal_nan=True)


@pytest.mark.gpu
def test_diagnostics_span_uncertainty_reads_no_further_than_the_last_sequence():
    log_probs = torch.tensor([-1.0, -3.0, math.nan], device=DEVICE)
    found = diagnostics.span_uncertainty(log_probs, cu_seqlens=torch.tensor([0, 0, 2], device=DEVICE))
    assert found[0].isnan() and found[1] == 2


@pytest.mark.gpu
def test_diagnostics_roc_of_spans():
    # Thinking tells nothing (both kinds 1), the answer tells all; the third sequence has no answer.
    log_probs = -torch.tensor([[1.0, 0.1], [1.0, 3.0], [1.0, 9.0]], device=DEVICE)
    thinking = torch.tensor([[True, False]] * 3, device=DEVICE)
    answer = torch.tensor([[False, True], [False, True], [False, False]], device=DEVICE)
    correct = torch.tensor([True, False, True], device=DEVICE)
    found = diagnostics.roc_of_spans(log_probs, {"thinking": thinking, "answer": answer}, correct)
    assert list(found) == ["thinking", "answer"]
    assert (found["thinking"].auc, found["thinking"].correct, found["thinking"].left_out) == (0.5, 2, 0)
    assert (found["answer"].auc, found["answer"].correct, found["answer"].left_out) == (1.0, 1, 1)


@pytest.mark.gpu
def test_diagnostics_of_thinking_and_answer():
    # Tag 9. H of thinking: 1 and 2, of the answer: 4 and 1; the third has no tag and counts as a whole (3) in both.
    tokens = torch.tensor([[5, 9, 6], [5, 9, 6], [5, 6, 6]], device=DEVICE)
    log_probs = -torch.tensor([[1.0, 1.0, 4.0], [2.0, 2.0, 1.0], [3.0, 3.0, 3.0]], device=DEVICE)
    correct = torch.tensor([True, False, False], device=DEVICE)
    spans = response_spans(tokens, 9)
    found = diagnostics.roc_of_spans(log_probs, {"thinking": spans.thinking, "answer": spans.answer}, correct)
    assert (found["thinking"].auc, found["answer"].auc, spans.untagged.item()) == (1.0, 0.0, 1)


# Properties.

# Few distinct values, so that ties are common; whole numbers of 1/64, so that sums are exact.
batches = st.lists(st.tuples(st.integers(0, 640), st.booleans()), max_size=24).map(
    lambda rows: (
        torch.tensor([row[0] / 64 for row in rows], dtype=torch.float64),
        torch.tensor([row[1] for row in rows], dtype=torch.bool),
    )
)


def pairs_won(uncertainty, correct):
    wrong, right = uncertainty[~correct].tolist(), uncertainty[correct].tolist()
    won = [(w > r) + (w == r) / 2 for w in wrong for r in right]
    return sum(won) / len(won) if won else math.nan


def same(left, right):
    return (math.isnan(left) and math.isnan(right)) or abs(left - right) <= 64 * EPS


@settings(deadline=None)
@given(batches)
def test_diagnostics_auc_is_the_share_of_pairs_won(batch):
    assert same(diagnostics.roc(*batch).auc, pairs_won(*batch))


@settings(deadline=None)
@given(batches, st.sampled_from([torch.exp, torch.sqrt, lambda h: 3 * h - 7, lambda h: h**3]))
def test_diagnostics_auc_and_spearman_see_only_the_order(batch, rising):
    uncertainty, correct = batch
    lengths = torch.arange(len(uncertainty))
    assert diagnostics.roc(rising(uncertainty), correct).auc == pytest.approx(
        diagnostics.roc(uncertainty, correct).auc, abs=0, nan_ok=True
    )
    ranks = [diagnostics.length_correlation(h, lengths).spearman for h in (uncertainty, rising(uncertainty))]
    assert same(*ranks)


@settings(deadline=None)
@given(batches)
def test_diagnostics_swapped_labels_turn_gap_and_auc(batch):
    uncertainty, correct = batch
    one, other = (diagnostics.uncertainty_gap(uncertainty, it) for it in (correct, ~correct))
    assert same(one.gap, -other.gap)
    assert same(diagnostics.roc(uncertainty, correct).auc, 1 - diagnostics.roc(uncertainty, ~correct).auc)


@settings(deadline=None)
@given(batches, st.integers(0, 2**32 - 1))
def test_diagnostics_do_not_depend_on_the_order_of_sequences(batch, seed):
    uncertainty, correct = batch
    order = torch.randperm(len(correct), generator=torch.Generator().manual_seed(seed))
    assert same(diagnostics.roc(*batch).auc, diagnostics.roc(uncertainty[order], correct[order]).auc)
    moved = diagnostics.uncertainty_gap(uncertainty[order], correct[order])
    assert same(diagnostics.uncertainty_gap(*batch).gap, moved.gap)


# Edges. Warnings are errors here.


@pytest.mark.parametrize("kind", [True, False])
def test_diagnostics_one_kind_only(kind):
    correct = torch.full_like(CORRECT, kind)
    gap, curve = diagnostics.uncertainty_gap(H, correct), diagnostics.roc(H, correct)
    assert math.isnan(gap.gap)
    assert (gap.correct.sequences, gap.incorrect.sequences) == ((5, 0) if kind else (0, 5))
    assert (curve.correct, curve.incorrect, curve.left_out) == ((5, 0, 1) if kind else (0, 5, 1))
    assert math.isnan(curve.auc)
    assert curve.thresholds == curve.true_positive_rate == curve.false_positive_rate == ()


@pytest.mark.parametrize("uncertainty", [EMPTY, torch.full((6,), math.nan), torch.full((6,), -math.inf)])
def test_diagnostics_nothing_usable(uncertainty):
    size = len(uncertainty)
    correct, lengths = CORRECT[:size].to(uncertainty.device), LENGTHS[:size].to(uncertainty.device)
    gap = diagnostics.uncertainty_gap(uncertainty, correct)
    assert math.isnan(gap.gap) and math.isnan(gap.correct.mean) and gap.left_out == size
    assert math.isnan(diagnostics.roc(uncertainty, correct).auc)
    found = diagnostics.length_correlation(uncertainty, lengths)
    assert math.isnan(found.pearson) and math.isnan(found.spearman)
    assert (found.sequences, found.left_out) == (0, size)


@pytest.mark.parametrize(
    "uncertainty, lengths",
    [
        (torch.tensor([1.0]), torch.tensor([3])),
        (torch.tensor([1.0, 2.0]), torch.tensor([3, 3])),
        (torch.tensor([1.0, 1.0, math.nan]), torch.tensor([3, 4, 5])),
        (torch.tensor([1.0, 1.0 + 2**-50], dtype=torch.float64), torch.tensor([3, 4])),
        (torch.tensor([0.0, 0.0]), torch.tensor([0, 0])),
    ],
    ids=["one", "lengths", "uncertainty", "rounding", "zeros"],
)
def test_diagnostics_constants_have_no_correlation(uncertainty, lengths):
    found = diagnostics.length_correlation(uncertainty, lengths)
    assert math.isnan(found.pearson) and math.isnan(found.spearman)


def test_diagnostics_length_that_is_not_finite_is_left_out():
    lengths = torch.tensor([1.0, math.inf, 3.0])
    found = diagnostics.length_correlation(torch.tensor([1.0, 9.0, 2.0]), lengths)
    assert (found.sequences, found.left_out) == (2, 1)
    assert abs(found.pearson - 1) <= 4 * EPS


def test_diagnostics_empty_padding():
    found = diagnostics.span_uncertainty(torch.zeros(3, 0, device=DEVICE))
    assert found.shape == (3,) and found.isnan().all()
    assert diagnostics.span_uncertainty(torch.zeros(0, 4, device=DEVICE)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_diagnostics_take_every_float(dtype):
    assert diagnostics.uncertainty_gap(H.to(dtype), CORRECT).gap == 0.75
    assert diagnostics.roc(H.to(dtype), CORRECT).auc == 0.75
    assert diagnostics.length_correlation(H.to(dtype), LENGTHS).sequences == 5
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert diagnostics.span_uncertainty(-H[None].to(dtype)).dtype == wanted


def test_diagnostics_leave_inputs_and_graph_alone():
    uncertainty = H.clone().requires_grad_()
    log_probs = -H[None].clone().requires_grad_()
    before = [it.detach().clone() for it in (uncertainty, CORRECT, LENGTHS)]
    diagnostics.uncertainty_gap(uncertainty, CORRECT)
    diagnostics.roc(uncertainty, CORRECT)
    diagnostics.length_correlation(uncertainty, LENGTHS)
    assert not diagnostics.span_uncertainty(log_probs).requires_grad
    for now, then in zip((uncertainty.detach(), CORRECT, LENGTHS), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
