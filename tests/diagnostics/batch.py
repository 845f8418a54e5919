"""A batch that diagnostics measure, with numbers known by hand, and the words of a refusal."""

import math
import re

import pytest
import torch

from tests.support.device import DEVICE

# Correct 0.25, 0.75, 0.5; incorrect 0.5, 2; one without an uncertainty.
H = torch.tensor([0.25, 0.5, 0.75, 2.0, math.nan, 0.5], device=DEVICE)
CORRECT = torch.tensor([True, False, True, False, True, True], device=DEVICE)
LENGTHS = torch.tensor([1, 2, 3, 4, 5, 2], device=DEVICE)
EMPTY = torch.zeros(0, device=DEVICE)

MEASURES = {"uncertainty_gap": "correct", "roc": "correct", "length_correlation": "lengths"}
SECOND = {"correct": CORRECT, "lengths": LENGTHS}


def refused(kind, name, function, *arguments, **named):
    with pytest.raises(kind) as caught:
        function(*arguments, **named)
    assert re.match(rf"{re.escape(name)} (is|has|holds) .*; it must be ", str(caught.value)), str(caught.value)
