"""Vocabularies of models, and odd ones, in every dtype: the accuracy rule against float64."""

import pytest

import egpo_kernels as ek
from tests.support.device import size
from tests.support.make_case import DTYPES, make_case
from tests.support.runs import advantages, check, whole
from tests.support.terms import group_terms

pytestmark = pytest.mark.gpu

VOCABULARIES = size((500, 769, 17001), (32000, 32003, 49152, 50257, 128256, 151665, 151936, 262144))
RECIPES = {
    "one pass": ek.recipes.EGPO.replace(kl_coef=0.1, entropy_coef=0.02),
    "two passes": ek.recipes.EGPO.replace(ratio="sequence", kl_coef=0.1, entropy_coef=0.02),
    "plain": ek.recipes.GRPO,
}


def assert_accuracy(backend, vocab, dtype, recipe):
    case = make_case(vocab, group_sizes=(2, 1), length=3, vocab=vocab, dtype=dtype, mask="bool", recipe=recipe)
    case = case.replace(rollout_weights=None)
    exact = advantages(case.double(), "reference")
    results = (whole(case, backend), whole(case, "reference"), whole(case.double(), "reference"))
    check(case, *results, exact.advantages, group_terms(case.double(), exact))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_accuracy(vocab, dtype, name):
    assert_accuracy("triton", vocab, dtype, RECIPES[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [151936, 300_000])
def test_portable_accuracy(vocab, dtype):
    assert_accuracy("portable", vocab, dtype, RECIPES["one pass"])
