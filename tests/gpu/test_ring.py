"""Rows that stay in shared memory: the accuracy rule, and the same bits in place, beside any row and after a shift.

No rule of the table says so yet; here one does. On a CPU the kernel's own source is interpreted.
"""

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

import torch

import egpo_kernels as ek
import egpo_kernels.triton as backend
from egpo_kernels.config.results import Rows
from egpo_kernels.triton.launch import architecture
from tests.support.accuracy import assert_bits
from tests.support.device import DEVICE, size
from tests.support.gluon import through_ring
from tests.support.rows import assert_same, picked, picked_rows, rows_of_a_loss
from tests.support.runs import alone, check, nothing
from tests.support.strategies import make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(architecture(torch.device(DEVICE)) not in ("interpreter", "sm_90"), reason="made for sm_90"),
]

# One access, a block, less than the ring and more, the ring, more than it, and twice it.
VOCABULARIES = size((8, 512, 1000, 1536, 2056, 3072), (8, 8192, 32_000, 32_008, 106_496, 128_256, 151_936, 212_992))
LONG = size(2056, 151_936)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
RECIPES = {
    "plain": ek.recipes.GRPO,
    "dual clip, kl, entropy": ek.recipes.EGPO.replace(dual_clip=3.0, kl_coef=0.1, entropy_coef=0.05),
    "cispo": ek.recipes.EGPO.replace(surrogate="cispo", kl="k1", kl_coef=0.1),
    "sapo": ek.recipes.EGPO.replace(surrogate="sapo", clip_low=0.2, clip_high=0.2, kl="k2", kl_coef=1.0),
    "kl times ratio": ek.recipes.EGPO.replace(kl_coef=0.1, kl_times_ratio=True, kl_max=10.0),
}
CASES = {
    "plain": {},
    "clipped, temperature per token": {"old": "far", "temperature": "token"},
    "on-policy, NaN in masked rows": {"old": "none", "garbage": True},
    "-inf": {"padded_vocab": True, "temperature": "sequence"},
}


def small_case(seed, vocab, dtype, recipe, **options):
    """A batch whose upstream gradient and scale are no 1: float16 with a scale of 1 goes by two passes."""
    case = make_case(
        seed, group_sizes=(2, 1), length=3, vocab=vocab, dtype=dtype, mask="bool", recipe=recipe, **options
    )
    return case.replace(upstream=torch.full_like(case.upstream, 0.5), grad_scale=0.5)


def assert_accuracy(case):
    with through_ring():
        found = alone(case, "triton")
    plain, exact = alone(case, "reference"), alone(case.double(), "reference")
    check(case, found, plain, exact, case.double().advantages, nothing(case.double()))


@EVERY_DTYPE
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_whatever_the_vocabulary(vocab, dtype):
    assert_accuracy(small_case(vocab, vocab, dtype, RECIPES["dual clip, kl, entropy"]))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", RECIPES)
def test_whatever_the_recipe_and_the_rows(name, kind):
    for seed in range(2):
        assert_accuracy(small_case(seed, LONG, torch.bfloat16, RECIPES[name], **CASES[kind]))


CONFIG = ek.PolicyLossConfig(reduction="sum", entropy_coef=0.0)
TILTED = ek.PolicyLossConfig(reduction="sum", entropy_coef=0.1)


def results(logits, rows, out, config=CONFIG):
    with through_ring():
        log_probs, entropy = backend.logits_loss_gradient(logits, rows, config, 0.7, 2.0, True, out)
    return {"log_probs": log_probs, "entropy": entropy, "gradient": out.clone()}


@EVERY_DTYPE
@pytest.mark.parametrize("config", [CONFIG, TILTED], ids=["", "entropy in the loss"])
@pytest.mark.parametrize("vocab", [VOCABULARIES[2], LONG])
def test_in_place_and_by_strides_the_same_bits(vocab, config, dtype):
    logits, rows = rows_of_a_loss(size(18, 300), vocab, dtype)
    wanted = results(logits, rows, torch.full_like(logits, torch.nan), config)
    zero = (wanted["gradient"] == 0).all(-1).flatten()
    assert zero[~rows.mask].all() and (config is TILTED or (zero & rows.mask).any()) and not zero.all()
    apart = logits.new_full((3, logits.shape[1] + 1, vocab + 8), torch.nan)
    strided = apart[1:, 1:, :vocab]
    strided.copy_(logits)
    assert_same(results(strided, rows, torch.full_like(logits, torch.nan), config), wanted, "strided logits")
    assert_same(results(strided, rows, strided, config), wanted, "strided, in place")
    assert apart[0].isnan().all() and apart[:, 0].isnan().all() and apart[..., vocab:].isnan().all()
    assert_same(results(logits, rows, logits, config), wanted, "in place")


@EVERY_DTYPE
def test_a_row_among_any_others(dtype):
    """Also where its program takes other rows, masked or clipped ones or none, before and after it."""
    count = size(24, 300)
    logits, rows = rows_of_a_loss(count, LONG, dtype)
    logits = logits.view(count, LONG)

    def run(places):
        some = logits[places].unsqueeze(0)
        return {key: value.flatten(0, -2) if key == "gradient" else value for key, value in
                results(some, picked_rows(rows, places), torch.empty_like(some), TILTED).items()}  # fmt: skip

    full = run(list(range(count)))
    for places in ([0], [count - 1], [3, 1, 5], list(range(0, count, 3)), list(range(count))[::-1]):
        assert_same(run(places), picked(full, places), f"{len(places)} rows")


def test_results_do_not_depend_on_where_the_logits_lie():
    logits, rows = rows_of_a_loss(4, LONG, torch.bfloat16)
    logits = logits.round().clamp(-32, 32)
    first, second = (results(logits + shift, rows, torch.empty_like(logits), TILTED) for shift in (-64, 64))
    assert_same(second, first, "128 higher")


def test_rows_that_say_nothing():
    """Tokens outside the vocabulary or at -inf, rows with NaN, with +inf, with nothing but -inf."""
    logits, _ = rows_of_a_loss(10, LONG, torch.bfloat16)
    flat = logits.view(10, LONG)
    flat[2, 5] = -torch.inf
    flat[3, LONG - 1] = torch.nan
    flat[4, 0] = torch.inf
    flat[5] = -torch.inf
    flat[6, : LONG // 2] = -torch.inf
    flat[7, LONG // 2 :] = -torch.inf
    tokens = torch.tensor([-1, LONG, 5, 7, 7, 7, LONG - 1, 0, 3, 4], device=DEVICE)
    ones = torch.ones(10, device=DEVICE)
    rows = Rows(ones.bool(), tokens, None, -ones, ones, None, None, None)
    for config in (CONFIG, TILTED):
        found = results(logits, rows, torch.full_like(logits, 7.0), config)
        gradient = found["gradient"].view(10, LONG)
        assert found["log_probs"][[0, 1, 3, 4]].isnan().all() and gradient[[0, 1, 3, 4]].isnan().all()
        assert (found["log_probs"][[2, 5]] == -torch.inf).all() and (gradient[[2, 5]] == 0).all()
        assert found["entropy"][5] == 0
        # The rows beside them are none the worse.
        usual = [6, 7, 8, 9]
        some = flat[usual].unsqueeze(0)
        again = results(some, picked_rows(rows, usual), torch.empty_like(some), config)
        for name, value in again.items():
            assert value.isfinite().all()
            assert_bits(value.view(4, -1), found[name].view(10, -1)[usual], name)
