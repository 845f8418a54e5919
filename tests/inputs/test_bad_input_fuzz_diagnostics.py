"""Garbage for the diagnostics: a documented error that names an argument, or a result; and nothing was changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egpo_kernels import diagnostics
from tests.support.batches import LAYOUTS, make_batch
from tests.support.fuzz import CALM, attempt
from tests.support.garbage import garbage_for

pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra diagnostics)")
pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed (the extra diagnostics)")

NAMES = ["span_uncertainty", "uncertainty_gap", "roc", "roc_of_spans", "length_correlation"]
NAMES += ["plot_gap", "plot_roc", "plot_length"]


@pytest.fixture(autouse=True)
def closed_figures():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def valid(name, layout):
    """Arguments that a diagnostic accepts."""
    batch = make_batch(layout)
    correct, lengths = batch.rewards > 0.5, torch.arange(len(batch.rewards))
    uncertainty = 1.0 + lengths.to(batch.rewards)
    kinds = {"uncertainty": uncertainty, "correct": correct}
    scored = {"log_probs": batch.old_log_probs, "cu_seqlens": batch.cu_seqlens}
    return {
        "span_uncertainty": {**scored, "span": batch.mask},
        "uncertainty_gap": kinds,
        "roc": kinds,
        "roc_of_spans": {**scored, "spans": {"answer": batch.mask}, "correct": correct},
        "length_correlation": {"uncertainty": uncertainty, "lengths": lengths},
        "plot_gap": {**kinds, "ax": None},
        "plot_roc": {"curves": {"whole": diagnostics.roc(uncertainty, correct)}, "ax": None},
        "plot_length": {**kinds, "lengths": lengths, "ax": None},
    }[name]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, **CALM)
@given(data=st.data())
def test_garbage_for_diagnostics(name, data):
    arguments = valid(name, data.draw(st.sampled_from(LAYOUTS)))
    names = data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=2, unique=True))
    arguments |= {key: data.draw(garbage_for(arguments[key]), label=key) for key in names}
    attempt(getattr(diagnostics, name), arguments)
    pyplot.close("all")


def test_values_that_are_nowhere_are_refused():
    meta = torch.zeros(4, device="meta")
    with pytest.raises(ValueError, match="uncertainty is on meta; it must have values"):
        diagnostics.uncertainty_gap(meta, meta > 0)
    with pytest.raises(TypeError, match="ax is int; it must be a matplotlib Axes or None"):
        diagnostics.plot_gap(torch.ones(2), torch.tensor([True, False]), ax=3)
