"""What a sampler kept: numbers by hand, exact zeros, rows without a record, what the metrics say, what is refused."""

import math

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.inputs import validation
from tests.support.accuracy import assert_bits
from tests.support.batches import BACKENDS, EVERY_BACKEND, FAST, FAST_BACKEND, make_batch
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
@pytest.mark.parametrize("kept", [(TOKEN,), (TOKEN, TOKEN)[:1]])
@pytest.mark.parametrize("others", [0.0, math.nan, -math.inf])
def test_a_singleton_is_exactly_nothing_and_counts(others, kept, backend):
    """Log-prob, entropy and gradient are 0, whatever the row's other logits are; denominators know the token."""
    z = (others, 7.5, others, others)
    assert one_row(kept, backend, z) == (0.0, 0.0, [0.0] * 4)
    logits = torch.tensor([[z, Z]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    tokens, support = torch.full((1, 2), TOKEN, device=DEVICE), support_of(kept, ())
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


# What is refused, and what becomes of it where values may not be looked at.


def bad(ids, offsets):
    return SamplingSupport(torch.tensor(ids, device=DEVICE), torch.tensor(offsets, device=DEVICE))


ROWS = 16
GOOD = list(range(ROWS + 1))
TOKENS = [0] * ROWS
REFUSED = {
    "no support": ((torch.zeros(2), torch.zeros(3)), TypeError, r"support is tuple; it must be SamplingSupport"),
    "ids that are no numbers": (
        SamplingSupport([1, 2], torch.zeros(17, dtype=torch.long)), TypeError,
        r"support.ids is list; it must be an integer",
    ),
    "ids of another dtype": (
        SamplingSupport(torch.zeros(2), torch.zeros(17, dtype=torch.long)), TypeError,
        r"support.ids has dtype torch.float32",
    ),
    "ids in rows": (
        SamplingSupport(torch.zeros(2, 2, dtype=torch.long), torch.zeros(17, dtype=torch.long)), ValueError,
        r"support.ids has shape \[2, 2\]; it must be \[M\]",
    ),
    "another number of rows": (
        SamplingSupport(torch.zeros(2, dtype=torch.long), torch.zeros(16, dtype=torch.long)), ValueError,
        r"support.offsets has shape \[16\]; it must be \[N \+ 1\] = \[17\]",
    ),
}  # fmt: skip
VALUES = {
    "an id past the vocabulary": ([37, *TOKENS[1:]], GOOD, r"support.ids holds 37 in the row of flattened position 0"),
    "a negative id": ([*TOKENS[:4], -1, *TOKENS[5:]], GOOD, r"support.ids holds -1 in the row of flattened position 4"),
    "an id twice": (
        [5, 5, *TOKENS],
        [0, *range(3, 19)],
        r"support.ids holds 5 twice in the row of flattened position 0",
    ),
    "offsets that fall": (TOKENS, [0, 2, 1, *GOOD[3:]], r"support.offsets starts at 0 .* never decrease"),
    "offsets past the ids": (TOKENS, [*GOOD[:-1], 17], r"support.offsets .* ends at 17 over 16 ids"),
    "offsets that start late": (TOKENS, [1, *GOOD[1:]], r"support.offsets starts at 1"),
}


@pytest.mark.parametrize("support, error, message", REFUSED.values(), ids=REFUSED)
@EVERY_BACKEND
def test_a_support_that_is_none(support, error, message, backend):
    batch = make_batch()
    with pytest.raises(error, match=message):
        ek.logits_policy_loss(batch.logits, batch.tokens, batch.advantages, support=support, backend=backend)


def every_call(batch, support, backend):
    """Each function that takes a support, on the same rows."""
    logits = batch.logits.clone().requires_grad_()
    eye = torch.eye(37, device=DEVICE)
    shared = {"support": support, "backend": backend}
    return {
        "token_log_probs": lambda: ek.token_log_probs(logits, batch.tokens, **shared).log_probs,
        "logits_policy_loss": lambda: ek.logits_policy_loss(logits, batch.tokens, batch.advantages, **shared).loss,
        "egpo_loss": lambda: ek.egpo_loss(logits, batch.tokens, 2, batch.rewards, **shared).loss,
        "linear_token_log_probs": lambda: ek.linear_token_log_probs(logits, eye, batch.tokens, **shared).log_probs,
        "linear_policy_loss": lambda: ek.linear_policy_loss(logits, eye, batch.tokens, batch.advantages, **shared).loss,
        "linear_egpo_loss": lambda: ek.linear_egpo_loss(logits, eye, batch.tokens, 2, batch.rewards, **shared).loss,
    }, logits  # fmt: skip


CALLS = sorted(every_call(make_batch(), None, "portable")[0])
EVERY_CALL = pytest.mark.parametrize("call", CALLS)


@EVERY_CALL
@pytest.mark.parametrize("ids, offsets, message", VALUES.values(), ids=VALUES)
@EVERY_BACKEND
def test_values_that_cannot_be_are_refused(ids, offsets, message, call, backend, values_are_checked):
    with pytest.raises(ValueError, match=message):
        every_call(make_batch(), bad(ids, offsets), backend)[0][call]()


@EVERY_CALL
@pytest.mark.parametrize("ids, offsets, message", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("backend", FAST)
def test_where_nobody_looks_they_are_nan_and_no_memory_is_touched(ids, offsets, message, call, backend, monkeypatch):
    """An id that cannot be: its row is NaN, without a gradient. Such offsets: all is. A token twice: all is finite."""
    monkeypatch.setattr(validation, "checks_values", lambda device: False)
    ways, logits = every_call(make_batch(), bad(ids, offsets), backend)
    found = ways[call]()
    if "twice" in message:
        assert found.isfinite().all()
        return
    assert found.isnan().any()
    if found.dim():
        rows = found.isnan().reshape(-1)
        assert rows.all() if "offsets" in message else rows.sum() == 1
    elif "support.ids" in message and call == "logits_policy_loss":
        found.backward()
        row = 0 if "37" in message else 4
        assert (logits.grad.reshape(ROWS, -1)[row] == 0).all() and logits.grad.isfinite().all()


@EVERY_BACKEND
def test_what_is_recorded_for_rows_that_do_not_count_is_not_looked_at(backend):
    batch = make_batch()
    masked = int((~batch.mask).reshape(-1).nonzero()[0])
    ids = list(TOKENS)
    ids[masked] = 10**6
    ek.logits_policy_loss(
        batch.logits, batch.tokens, batch.advantages, batch.mask, support=bad(ids, GOOD), backend=backend
    )


def test_ids_behind_the_last_row_belong_to_none():
    batch = make_batch()
    results = [
        ek.token_log_probs(batch.logits, batch.tokens, support=bad(ids, GOOD)).log_probs
        for ids in (TOKENS, [*TOKENS, 99, -5])
    ]
    assert_bits(*results, "log-probs")


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    batch, support = make_batch(), bad(TOKENS, GOOD)
    before = [each.clone() for each in (*support, batch.logits, batch.tokens)]
    versions = [each._version for each in (*support, batch.logits, batch.tokens)]
    ek.logits_policy_loss(batch.logits, batch.tokens, batch.advantages, support=support, backend=backend)
    for old, version, now in zip(before, versions, (*support, batch.logits, batch.tokens), strict=True):
        assert_bits(now, old, "an input")
        assert now._version == version
