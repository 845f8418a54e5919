"""Diagnostics: numbers worked out by hand, AUC by counting pairs, edge cases, words of refusal, pictures."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egpo_kernels import diagnostics, response_spans
from tests.support.device import DEVICE

pyplot = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pyplot.switch_backend("Agg")

EPS = torch.finfo(torch.float64).eps
# Correct 0.25, 0.75, 0.5; incorrect 0.5, 2; one without an uncertainty.
H = torch.tensor([0.25, 0.5, 0.75, 2.0, math.nan, 0.5], device=DEVICE)
CORRECT = torch.tensor([True, False, True, False, True, True], device=DEVICE)
LENGTHS = torch.tensor([1, 2, 3, 4, 5, 2], device=DEVICE)
EMPTY = torch.zeros(0, device=DEVICE)

MEASURES = {"uncertainty_gap": "correct", "roc": "correct", "length_correlation": "lengths"}
SECOND = {"correct": CORRECT, "lengths": LENGTHS}


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


# Refusals.


def refused(kind, name, function, *arguments, **named):
    with pytest.raises(kind) as caught:
        function(*arguments, **named)
    assert re.match(rf"{re.escape(name)} (is|has|holds) .*; it must be ", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", MEASURES)
def test_diagnostics_refuse_bad_sequences(name):
    function, second = getattr(diagnostics, name), MEASURES[name]
    given = SECOND[second]
    for value in (H.tolist(), None, H.long(), H > 0, H.to(torch.complex64)):
        refused(TypeError, "uncertainty", function, value, given)
    for value in (H[None], H[0], H.to_sparse()):
        refused(ValueError, "uncertainty", function, value, given)
    for value in (given.tolist(), None, given.to(torch.complex64)):
        refused(TypeError, second, function, H, value)
    for value in (given[:-1], given[None], given[0], given.to_sparse()):
        refused(ValueError, second, function, H, value)


@pytest.mark.parametrize("name", ["uncertainty_gap", "roc"])
def test_diagnostics_refuse_rewards_for_correctness(name):
    refused(TypeError, "correct", getattr(diagnostics, name), H, CORRECT.float())


def test_diagnostics_refuse_bad_spans():
    log_probs, span = torch.zeros(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    correct = torch.tensor([True, False], device=DEVICE)
    refused(TypeError, "log_probs", diagnostics.span_uncertainty, [[0.0]])
    refused(TypeError, "log_probs", diagnostics.span_uncertainty, log_probs.long())
    refused(ValueError, "log_probs", diagnostics.span_uncertainty, log_probs[0])
    refused(ValueError, "span", diagnostics.span_uncertainty, log_probs, span[:1])
    refused(TypeError, "span", diagnostics.span_uncertainty, log_probs, [1])
    refused(TypeError, "cu_seqlens", diagnostics.span_uncertainty, log_probs[0], cu_seqlens=[0, 3])
    refused(TypeError, "spans", diagnostics.roc_of_spans, log_probs, span, correct)
    refused(TypeError, "spans['answer']", diagnostics.roc_of_spans, log_probs, {"answer": None}, correct)
    refused(ValueError, "spans['answer']", diagnostics.roc_of_spans, log_probs, {"answer": span[0]}, correct)
    refused(TypeError, "log_probs", diagnostics.roc_of_spans, None, {"answer": span}, correct)
    refused(ValueError, "correct", diagnostics.roc_of_spans, log_probs, {"answer": span}, correct[:1])


# Pictures.


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    pyplot.close("all")


def words(ax):
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    return " | ".join([ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *legend])


def written(ax, path):
    """The bytes of the picture as a file."""
    ax.figure.savefig(path)
    return path.read_bytes()


def drawn(name, *arguments, **named):
    return getattr(diagnostics, f"plot_{name}")(*arguments, **named)


PICTURES = {
    "gap": (lambda: drawn("gap", H, CORRECT), ["gap", "+0.75", "nats per token", "n = 3", "n = 2", "1 without"]),
    "roc": (
        lambda: drawn("roc", {"thinking": diagnostics.roc(H, CORRECT)}),
        ["thinking: AUC 0.75", "2 incorrect, 3 correct, 1 left out", "false positives", "true positives", "chance"],
    ),
    "length": (
        lambda: drawn("length", H, LENGTHS, CORRECT),
        ["tokens", "nats per token", "Pearson +0.92", "Spearman +1.00", "correct: n = 3", "incorrect: n = 2"],
    ),
    "length, one kind": (lambda: drawn("length", H, LENGTHS), ["sequences: n = 5", "1 without"]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_diagnostics_pictures_are_labelled(name, tmp_path):
    draw, wanted = PICTURES[name]
    ax = draw()
    assert not [text for text in wanted if text.lower() not in words(ax).lower()], words(ax)
    assert ax.has_data()
    assert written(ax, tmp_path / "picture.png").startswith(b"\x89PNG")


def test_diagnostics_pictures_go_on_given_axes():
    _, axes = pyplot.subplots(1, 3)
    before = pyplot.get_fignums()
    assert drawn("gap", H, CORRECT, axes[0]) is axes[0]
    assert drawn("roc", {"all": diagnostics.roc(H, CORRECT)}, axes[1]) is axes[1]
    assert drawn("length", H, LENGTHS, ax=axes[2]) is axes[2]
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("correct", [EMPTY.bool(), torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)])
def test_diagnostics_pictures_of_little(correct, tmp_path):
    uncertainty = torch.zeros(len(correct))
    lengths = torch.ones(len(correct))
    correct = correct.cpu()
    for ax in (
        drawn("gap", uncertainty, correct),
        drawn("roc", {"all": diagnostics.roc(uncertainty, correct)}),
        drawn("length", uncertainty, lengths, correct),
    ):
        assert "not defined" in words(ax)
        assert written(ax, tmp_path / "picture.png").startswith(b"\x89PNG")


def test_diagnostics_pictures_say_what_lies_off_the_axis():
    tiny = torch.tensor([0.0, 1e-9, 1.0, 2.0])
    correct = torch.tensor([True, True, False, False])
    for ax in (drawn("gap", tiny, correct), drawn("length", tiny, torch.arange(4))):
        assert "2 below 0.0002 nats drawn at the edge" in words(ax)


def test_diagnostics_pictures_refuse_bad_curves():
    refused(TypeError, "curves", diagnostics.plot_roc, diagnostics.roc(H, CORRECT))
    refused(TypeError, "curves['all']", diagnostics.plot_roc, {"all": 0.9})


# The extra.


@pytest.mark.parametrize(
    "module, call",
    [
        ("sklearn.metrics", lambda: diagnostics.roc(H, CORRECT)),
        ("scipy.stats", lambda: diagnostics.length_correlation(H, LENGTHS)),
        ("matplotlib.pyplot", lambda: diagnostics.plot_gap(H, CORRECT)),
    ],
)
def test_diagnostics_name_the_extra_that_is_missing(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'egpo_kernels[diagnostics]'")) as caught:
        call()
    assert module in str(caught.value)


def test_diagnostics_import_is_light():
    code = "import sys, egpo_kernels.diagnostics; print(*{name.split('.')[0] for name in sys.modules})"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not {"matplotlib", "sklearn", "scipy"} & set(done.stdout.split())
