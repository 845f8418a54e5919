"""One sequence of 70000 tokens and more, past the 65535 blocks of some launches and the 2^16 of some counters."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.batches import FAST, LAYOUTS
from tests.support.device import size
from tests.support.make_case import make_case
from tests.support.runs import advantages, check, whole
from tests.support.terms import group_terms

pytestmark = pytest.mark.gpu

LENGTH = size(14, 90_000)
CASES = {
    "near": {"old": "near"},
    "on-policy": {"old": "none"},
    "sequence ratio": {"old": "near", "recipe": ek.recipes.EGPO.replace(ratio="sequence", entropy_coef=0.1)},
    "shannon": {"old": "near", "recipe": ek.recipes.EGPO.replace(statistic="shannon", reduction="seq_mean_token_mean")},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FAST)
def test_loss_gradient_and_statistics_of_groups(backend, layout, name):
    case = make_case(8, group_sizes=(3, 2), length=LENGTH, vocab=5, layout=layout, **CASES[name])
    lengths = torch.bincount(case.index[case.counted])
    assert lengths.max() > size(7, 70_000)
    exact = advantages(case.double(), "reference")
    results = (whole(case, backend), whole(case, "reference"), whole(case.double(), "reference"))
    check(case, *results, exact.advantages, group_terms(case.double(), exact))
