"""The numbers: gap, ROC and correlation with length. Nothing given is modified; results are Python floats and ints."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.diagnostics.extra import wanted
from egpo_kernels.formulas.uncertainty import sequence_uncertainty
from egpo_kernels.inputs.layout import counted, make_layout
from egpo_kernels.inputs.validation import check_dense, check_instance, check_tensor

CONSTANT = 1e-11
"""Values that span at most this times the largest of them count as constant: a correlation would be rounding."""


class Spread(NamedTuple):
    """Number of sequences, and mean and quartiles of their uncertainty in nats per token; NaN without sequences."""

    sequences: int
    mean: float
    lower_quartile: float
    median: float
    upper_quartile: float


class UncertaintyGap(NamedTuple):
    """``gap``: mean uncertainty of incorrect minus that of correct sequences, in nats per token; ``left_out``: the
    number of sequences whose uncertainty is not finite.
    """

    gap: float
    correct: Spread
    incorrect: Spread
    left_out: int


class Roc(NamedTuple):
    """Uncertainty as a predictor of incorrectness.

    ``auc`` is the probability that an incorrect sequence is more uncertain than a correct one; a tie counts half.
    Sequences with an uncertainty of at least ``thresholds[k]`` are predicted to be incorrect: these are the share
    ``false_positive_rate[k]`` of all correct sequences and ``true_positive_rate[k]`` of all incorrect ones. The
    thresholds fall; the first is inf. Without a sequence of each kind ``auc`` is NaN and the curve is empty.
    """

    auc: float
    false_positive_rate: tuple[float, ...]
    true_positive_rate: tuple[float, ...]
    thresholds: tuple[float, ...]
    correct: int
    incorrect: int
    left_out: int


class LengthCorrelation(NamedTuple):
    """Correlation of uncertainty with length; NaN for fewer than two ``sequences``, or if either is constant."""

    pearson: float
    spearman: float
    sequences: int
    left_out: int


def span_uncertainty(log_probs: Tensor, span: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Uncertainty H of each sequence over a span of its tokens (EGPO, arXiv 2602.22751, Eq. 5/6).

    Args:
        log_probs: Log-probs of the sampled tokens in nats, ``[S, T]`` or packed ``[N]``.
        span: Shaped like log_probs, nonzero for tokens of the span: a mask, or a span of `response_spans`. None: every
            position.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.

    Returns:
        ``[S]``, mean negative log-likelihood in nats per token, on the same device, without gradient; NaN where a
        sequence has no token in the span or a log-prob there is not finite.

    Raises:
        ValueError: A wrong shape or device.
        TypeError: A wrong type or dtype.
    """
    check_dense("log_probs", log_probs, "floating")
    layout = make_layout("log_probs", tuple(log_probs.shape), cu_seqlens, log_probs.device)
    inside = counted(None, None, layout)
    if span is not None:
        inside = inside & (layout.per_token("span", span, "real") != 0)
    values = -log_probs.detach().reshape(-1).to(compute_dtype(log_probs.dtype))
    return layout.poisoned(sequence_uncertainty(values, inside, layout.offsets))


def uncertainty_gap(uncertainty: Tensor, correct: Tensor) -> UncertaintyGap:
    """How much more uncertain incorrect sequences are than correct ones (EGPO, arXiv 2602.22751, Fig. 3).

    Args:
        uncertainty: ``[S]`` nats per token, from `group_advantages` or `span_uncertainty`. Sequences where it is not
            finite are left out; ``left_out`` is their number.
        correct: ``[S]`` bool.

    Returns:
        The gap, and for correct and for incorrect sequences their number, mean and quartiles. Without sequences of a
        kind its numbers and the gap are NaN.

    Raises:
        ValueError: A wrong shape.
        TypeError: A wrong type or dtype.
    """
    (values, right), left_out = finite_sequences(uncertainty=(uncertainty, "floating"), correct=(correct, "bool"))
    kinds = _spread(values[right]), _spread(values[~right])
    return UncertaintyGap(kinds[1].mean - kinds[0].mean, *kinds, left_out)


def roc(uncertainty: Tensor, correct: Tensor) -> Roc:
    """How well uncertainty tells incorrect sequences from correct ones (EGPO, arXiv 2602.22751, Table 3).

    Args:
        uncertainty: ``[S]`` nats per token. Sequences where it is not finite are left out; ``left_out`` is their
            number.
        correct: ``[S]`` bool.

    Returns:
        The area under the curve, the curve and the counts.

    Raises:
        ValueError: A wrong shape.
        TypeError: A wrong type or dtype.
        ImportError: scikit-learn is missing.
    """
    metrics = wanted("sklearn.metrics")
    (values, right), left_out = finite_sequences(uncertainty=(uncertainty, "floating"), correct=(correct, "bool"))
    wrong = (~right).numpy()
    correct_count, incorrect_count = int(right.sum()), int(wrong.sum())
    if not correct_count or not incorrect_count:
        return Roc(math.nan, (), (), (), correct_count, incorrect_count, left_out)
    area = float(metrics.roc_auc_score(wrong, values.numpy()))
    false_rate, true_rate, thresholds = (tuple(it.tolist()) for it in metrics.roc_curve(wrong, values.numpy()))
    return Roc(area, false_rate, true_rate, thresholds, correct_count, incorrect_count, left_out)


def roc_of_spans(
    log_probs: Tensor, spans: Mapping[str, Tensor], correct: Tensor, *, cu_seqlens: Tensor | None = None
) -> dict[str, Roc]:
    """`roc` of the uncertainty over each of several spans (EGPO, arXiv 2602.22751, Table 3).

    Args:
        log_probs: Log-probs of the sampled tokens in nats, ``[S, T]`` or packed ``[N]``.
        spans: Name -> mask shaped like log_probs: ``{"thinking": found.thinking, "answer": found.answer}`` with
            ``found = response_spans(...)``. A sequence without a token in a span is left out of that span's curve.
        correct: ``[S]`` bool.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.

    Returns:
        Name -> curve, in the order of ``spans``.

    Raises:
        ValueError: A wrong shape or device.
        TypeError: A wrong type or dtype.
        ImportError: scikit-learn is missing.
    """
    check_instance("spans", spans, Mapping)
    check_dense("log_probs", log_probs, "floating")
    shape = {"the shape of log_probs": tuple(log_probs.shape)}
    for name, span in spans.items():
        check_tensor(f"spans[{name!r}]", span, "real", shape, log_probs.device)
    return {
        name: roc(span_uncertainty(log_probs, span, cu_seqlens=cu_seqlens), correct) for name, span in spans.items()
    }


def length_correlation(uncertainty: Tensor, lengths: Tensor) -> LengthCorrelation:
    """Whether long answers are the uncertain ones: Pearson's and Spearman's correlation.

    Args:
        uncertainty: ``[S]`` nats per token.
        lengths: ``[S]`` tokens, integer or floating. Sequences where either is not finite are left out; ``left_out`` is
            their number.

    Returns:
        Both correlations, in [-1, 1], with the number of sequences. No p-value: answers to one prompt are not
        independent.

    Raises:
        ValueError: A wrong shape.
        TypeError: A wrong type or dtype.
        ImportError: scipy is missing.
    """
    stats = wanted("scipy.stats")
    (values, counts), left_out = finite_sequences(uncertainty=(uncertainty, "floating"), lengths=(lengths, "real"))
    if not _varies(values) or not _varies(counts):
        return LengthCorrelation(math.nan, math.nan, len(values), left_out)
    pair = values.numpy(), counts.numpy()
    return LengthCorrelation(
        float(stats.pearsonr(*pair).statistic), float(stats.spearmanr(*pair).statistic), len(values), left_out
    )


def finite_sequences(**given: tuple[Any, str]) -> tuple[list[Tensor], int]:
    """Check tensors ``[S]``, each name=(tensor, kind), the first of which says how long all must be.

    Returns those sequences of each on the host where all are finite (float64, or bool), and how many were left out.
    """
    kept: list[Tensor] = []
    for name, (value, kind) in given.items():
        check_dense(name, value, kind)
        if value.is_meta:
            raise ValueError(f"{name} is on meta; it must have values to look at")
        check_tensor(name, value, kind, {"[S]": tuple(kept[0].shape)} if kept else {}, value.device)
        if value.dim() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must be [S], one entry per sequence")
        value = value.detach().cpu()
        kept.append(value if kind == "bool" else value.double())
    usable = torch.stack([value.isfinite() for value in kept]).all(dim=0)
    return [value[usable] for value in kept], int((~usable).sum())


def _spread(values: Tensor) -> Spread:
    if not len(values):
        return Spread(0, *(math.nan,) * 4)
    quartiles = values.quantile(values.new_tensor([0.25, 0.5, 0.75]))
    return Spread(len(values), values.mean().item(), *quartiles.tolist())


def _varies(values: Tensor) -> bool:
    """Whether there are two values at least that differ by more than rounding."""
    if len(values) < 2:
        return False
    return bool(values.max() - values.min() > CONSTANT * values.abs().max())
