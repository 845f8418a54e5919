"""A step that two processes split: the command, and what it takes for the same."""

import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")
pytest.importorskip("rich", reason="rich is not installed (make demo installs it)")

from demo.tensor_parallel import ROUNDING, Step, report
from tests.support.page import ROOT

FOUND = Step(-0.2, 18.3, -1.7, -1.0)
LAYERS = 4


def test_the_command():
    command = [sys.executable, "-m", "demo.tensor_parallel", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Both processes found the same bits." in done.stdout and "The steps are the same." in done.stdout


@pytest.mark.parametrize("name", Step._fields)
def test_what_is_the_same(name, capsys):
    """As much as rounding may make of it, and no more."""
    bound = 2 * ROUNDING * max(1, abs(getattr(FOUND, name)))
    for share, same in ((0.9, True), (1.1, False), (float("nan"), False)):
        other = FOUND._replace(**{name: getattr(FOUND, name) + share * bound})
        assert report(FOUND, [other, other], LAYERS) == same
        assert ("The steps are the same." in capsys.readouterr().out) == same
    assert not report(FOUND, [FOUND, FOUND._replace(**{name: getattr(FOUND, name) + 1e-12})], LAYERS)
