"""What diagnostics refuse, in which words, and the extra that may be missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from egpo_kernels import diagnostics
from tests.diagnostics.batch import CORRECT, LENGTHS, MEASURES, SECOND, H, refused
from tests.support.device import DEVICE

pyplot = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")


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
