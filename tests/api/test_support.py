"""What a sampler kept: numbers by hand, exact zeros, rows without a record, what the metrics say, what is refused."""

import math

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.config.results import SamplingSupport
from tests.support.accuracy import assert_bits
from tests.support.batches import EVERY_BACKEND, FAST_BACKEND, make_batch
from tests.support.device import DEVICE
from tests.support.make_case import make_case
from tests.support.runs import alone, whole

Z, TOKEN = (2.0, 1.0, 0.0, -1.0), 1
"""The worked example: full log-prob -1.440190, entropy 0.947537."""


def support_of(*rows):
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.long, device=DEVICE)
    return SamplingSupport(ids, torch.tensor([0, *map(len, rows)], device=DEVICE).cumsum(0))


def one_row(kept, backend, z=Z, token=TOKEN, **options):
    """Log-prob, entropy and gradient by the logits of one row that kept these tokens."""
    logits = torch.tensor([[z]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    tokens = torch.tensor([[token]], device=DEVICE)
    found = ek.token_log_probs(
        logits, tokens, support=support_of(kept), return_entropy=True, backend=backend, **options
    )
    found.log_probs.sum().backward()
    return found.log_probs.item(), found.entropy.item(), logits.grad[0, 0].tolist()


@EVERY_BACKEND
@pytest.mark.parametrize("kept", [(0, 1), (1, 0), (0,)], ids=["both", "in another order", "the token is missing"])
def test_the_worked_example(kept, backend):
    log_prob, entropy, gradient = one_row(kept, backend)
    assert log_prob == pytest.approx(-1.313262, abs=1e-6) and entropy == pytest.approx(0.582203, abs=1e-6)
    assert gradient[:2] == pytest.approx([-0.731059, 0.731059], abs=1e-6)
    assert gradient[2:] == [0.0, 0.0]
    assert one_row((), backend)[:2] == pytest.approx((-1.440190, 0.947537), abs=1e-6)


@EVERY_BACKEND
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_worked_example_at_a_temperature(temperature, backend):
    log_prob, _, gradient = one_row((0, 1, 3), backend, temperature=temperature)
    weights = [math.exp(z / temperature) for z in (2.0, 1.0, -1.0)]
    shares = [weight / sum(weights) for weight in weights]
    assert log_prob == pytest.approx(math.log(shares[1]))
    wanted = [-shares[0] / temperature, (1 - shares[1]) / temperature, 0.0, -shares[2] / temperature]
    assert gradient == pytest.approx(wanted)


@EVERY_BACKEND
@pytest.mark.parametrize("others", [0.0, math.nan, -math.inf])
def test_a_singleton_is_exactly_nothing_and_counts(others, backend):
    """Log-prob, entropy and gradient are 0, whatever the row's other logits are; denominators know the token."""
    z = (others, 7.5, others, others)
    assert one_row((TOKEN,), backend, z) == (0.0, 0.0, [0.0] * 4)
    logits = torch.tensor([[z, Z]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    tokens, support = torch.full((1, 2), TOKEN, device=DEVICE), support_of((TOKEN,), ())
    advantages = torch.ones(1, dtype=torch.float64, device=DEVICE)
    loss, metrics = ek.logits_policy_loss(logits, tokens, advantages, support=support, backend=backend)
    loss.backward()
    alone = torch.tensor([[Z]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    ek.logits_policy_loss(alone, tokens[:, :1], advantages, backend=backend).loss.backward()
    assert metrics["policy/tokens/sum"] == 2 and metrics["policy/nonfinite_rows/sum"] == 0
    torch.testing.assert_close(logits.grad[0, 1], alone.grad[0, 0] / 2)
    assert (logits.grad[0, 0] == 0).all()


@EVERY_BACKEND
def test_nan_matters_inside_a_set_and_not_outside(backend):
    log_prob, _, gradient = one_row((0, 1), backend, (2.0, 1.0, math.nan, math.inf))
    assert log_prob == pytest.approx(-1.313262, abs=1e-6) and gradient[2:] == [0.0, 0.0]
    log_prob, _, gradient = one_row((0, 1), backend, (math.nan, 1.0, 0.0, 0.0))
    assert math.isnan(log_prob) and gradient[2:] == [0.0, 0.0]


@EVERY_BACKEND
@pytest.mark.parametrize("size", [1e37, 1e39, 1e300])
def test_logits_that_no_float32_could_hold(size, backend):
    log_prob, entropy, gradient = one_row((0, 1), backend, (-size, -size, size, size))
    assert log_prob == pytest.approx(-math.log(2)) and entropy == pytest.approx(math.log(2))
    assert gradient == pytest.approx([-0.5, 0.5, 0.0, 0.0])


@EVERY_BACKEND
def test_minus_infinity_in_a_set(backend):
    log_prob, entropy, gradient = one_row((0, 1, 2), backend, (-math.inf, 1.0, 1.0, 9.0))
    assert log_prob == pytest.approx(-math.log(2)) and entropy == pytest.approx(math.log(2)) and gradient[0] == 0
    assert one_row((0, 1), backend, (2.0, -math.inf, 0.0, 0.0)) == (-math.inf, pytest.approx(0.0), [0.0] * 4)


# Rows without a record.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("run", [whole, alone], ids=["egpo_loss", "logits_policy_loss"])
@pytest.mark.parametrize("old", ["none", "near"])
@EVERY_BACKEND
def test_without_a_record_every_bit_is_as_without_a_support(run, old, dtype, backend):
    case = make_case(5, dtype=dtype, vocab=300, old=old, recipe=ek.recipes.EGPO.replace(entropy_coef=0.01))
    empty = SamplingSupport(torch.zeros(0, dtype=torch.long), torch.zeros(case.tokens.numel() + 1, dtype=torch.long))
    found, wanted = (
        run(case.replace(support=SamplingSupport(*(it.to(DEVICE) for it in empty))), backend),
        run(case, backend),
    )
    for name in ("loss", "gradient"):
        assert_bits(found[name], wanted[name], name)
    for key, value in wanted["metrics"].items():
        assert_bits(found["metrics"][key], value, key)
    assert found["metrics"]["support/rows/sum"] == 0 and found["metrics"]["support/kept/mean"].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FAST_BACKEND
def test_rows_without_a_record_do_not_notice_the_others(dtype, backend):
    """What they give beside rows that have one, to the last bit."""
    case = make_case(9, dtype=dtype, vocab=300, support="some")
    bare, some = alone(case.replace(support=None), backend), alone(case, backend)
    others = case.counted & ~case.recorded
    assert others.any() and case.recorded.any()
    rows = [found["gradient"].reshape(-1, 300)[others] for found in (some, bare)]
    assert_bits(*rows, "gradient")


# Metrics.


@EVERY_BACKEND
def test_metrics_of_what_was_kept(backend):
    batch = make_batch()
    rows = [(int(token),) for token in batch.tokens.reshape(-1).tolist()]
    rows[0] = (*rows[0], *[id for id in range(5) if id != rows[0][0]])
    rows[4], rows[5], rows[6] = (), tuple(id for id in (7, 8, 9) if id != rows[5][0]), (*rows[6],)
    missing = len(rows[5])
    support = support_of(*rows)
    _, metrics = ek.logits_policy_loss(
        batch.logits, batch.tokens, batch.advantages, batch.mask, support=support, backend=backend
    )
    counted = [row for row, counts in enumerate(batch.mask.reshape(-1).tolist()) if counts and rows[row]]
    sizes = [len(rows[row]) + (row == 5) for row in counted]
    assert metrics["support/rows/sum"] == len(counted)
    assert metrics["support/kept/mean"] == pytest.approx(sum(sizes) / len(sizes))
    assert metrics["support/kept/max"] == max(sizes) == max(len(rows[0]), missing + 1)
    assert metrics["support/singletons/sum"] == sizes.count(1)
    assert metrics["support/missing_tokens/sum"] == 1
    assert not [key for key in ek.logits_policy_loss(
        batch.logits, batch.tokens, batch.advantages, batch.mask, support=support, metrics="none", backend=backend
    ).metrics]  # fmt: skip
