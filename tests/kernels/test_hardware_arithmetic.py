"""The accuracy rule under the arithmetic of NVIDIA hardware, as far off as it may be: see `hardware_arithmetic`.

Interpreted; on a GPU every accuracy test meets the real one.
"""

import pytest

pytest.importorskip("triton")

import egpo_kernels as ek
from tests.api import test_properties
from tests.config import test_recipes
from tests.gpu import test_vocabularies
from tests.support.device import ON_GPU
from tests.support.interpreter import hardware_arithmetic
from tests.support.runs import alone, check, nothing
from tests.support.strategies import DTYPES, PUBLISHED, make_case

pytestmark = pytest.mark.skipif(ON_GPU, reason="the hardware has its own")


@pytest.fixture(autouse=True)
def approximate():
    with hardware_arithmetic():
        yield


PROPERTIES = (
    "test_egpo_loss",
    "test_two_calls_in_micro_batches",
    "test_logits_policy_loss",
    "test_policy_loss",
    "test_token_log_probs",
)


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_hold(name, monkeypatch):
    # What is drawn is drawn in full by the properties' own tests.
    monkeypatch.setitem(test_properties.EXAMPLES, "triton", 0.1)
    getattr(test_properties, name)("triton")


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_recipes_hold(name, layout):
    test_recipes.test_recipes_on_every_backend(name, "triton", layout)


@pytest.mark.parametrize("name", test_vocabularies.RECIPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", test_vocabularies.VOCABULARIES)
def test_vocabularies_hold(vocab, dtype, name):
    test_vocabularies.test_accuracy(vocab, dtype, name)


@pytest.mark.parametrize("limit", [3.7, 13.1, 17.9, 27.3, 37.3])
@pytest.mark.parametrize("surrogate", ["clip", "sapo", "gmpo", "cispo"])
def test_ratios_far_away_hold(surrogate, limit):
    """Clamped log-ratios are exact, so that nothing excuses their exponential."""
    loss = ek.PolicyLossConfig(surrogate=surrogate, max_log_ratio=limit, kl_coef=0.1, kl_times_ratio=True)
    case = make_case(5, group_sizes=(4, 4), length=6, recipe=ek.Recipe(loss=loss), old="far")
    results = (alone(case, "triton"), alone(case, "reference"), alone(case.double(), "reference"))
    check(case, *results, case.double().advantages, nothing(case.double()))
