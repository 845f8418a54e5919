"""Diagnostics as pictures: labelled, on given axes, of little or nothing."""

import pytest
import torch

from egpo_kernels import diagnostics
from tests.diagnostics.batch import CORRECT, EMPTY, LENGTHS, H, refused

pyplot = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pyplot.switch_backend("Agg")


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
