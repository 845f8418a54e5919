"""Supports that cannot be: refused where values may be looked at, else NaN; and odd ones that can."""

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.inputs import validation
from tests.support.accuracy import assert_bits
from tests.support.batches import BACKENDS, EVERY_BACKEND, FAST, make_batch
from tests.support.device import DEVICE


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


def every_call(batch, support, backend, **layout):
    """Each function that takes a support, on the same rows."""
    logits = batch.logits.clone().requires_grad_()
    eye = torch.eye(37, device=DEVICE)
    shared = {"support": support, "backend": backend}
    loss = shared | layout
    return {
        "token_log_probs": lambda: ek.token_log_probs(logits, batch.tokens, **shared).log_probs,
        "logits_policy_loss": lambda: ek.logits_policy_loss(logits, batch.tokens, batch.advantages, **loss).loss,
        "egpo_loss": lambda: ek.egpo_loss(logits, batch.tokens, 2, batch.rewards, **loss).loss,
        "linear_token_log_probs": lambda: ek.linear_token_log_probs(logits, eye, batch.tokens, **shared).log_probs,
        "linear_policy_loss": lambda: ek.linear_policy_loss(logits, eye, batch.tokens, batch.advantages, **loss).loss,
        "linear_egpo_loss": lambda: ek.linear_egpo_loss(logits, eye, batch.tokens, 2, batch.rewards, **loss).loss,
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


@EVERY_CALL
@EVERY_BACKEND
def test_ids_behind_the_last_row_belong_to_none(call, backend):
    """Neither in the value nor in the gradient; the last row that they are behind may have a record or none."""
    for offsets in (GOOD, [*GOOD[:-1], ROWS - 1]):
        results = []
        for ids in (TOKENS[: offsets[-1]], [*TOKENS[: offsets[-1]], 99, -5, 3, 99]):
            ways, logits = every_call(make_batch(), bad(ids, offsets), backend)
            found = ways[call]()
            found.sum().backward()
            results.append((found.detach(), logits.grad))
        for name, *values in zip(("values", "gradient"), *results, strict=True):
            assert_bits(*values, name)


@pytest.mark.parametrize("call", [name for name in CALLS if not name.endswith("log_probs")])
@EVERY_BACKEND
def test_a_sound_support_mends_no_bad_cu_seqlens(call, backend, monkeypatch):
    monkeypatch.setattr(validation, "checks_values", lambda device: False)
    batch = make_batch("packed")
    offsets = batch.cu_seqlens.clone()
    offsets[1] = offsets[2] + 1
    rows = batch.tokens.numel()
    support = bad([0] * rows, list(range(rows + 1)))
    ways, _ = every_call(batch, support, backend, cu_seqlens=offsets)
    assert ways[call]().isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    batch, support = make_batch(), bad(TOKENS, GOOD)
    before = [each.clone() for each in (*support, batch.logits, batch.tokens)]
    versions = [each._version for each in (*support, batch.logits, batch.tokens)]
    ek.logits_policy_loss(batch.logits, batch.tokens, batch.advantages, support=support, backend=backend)
    for old, version, now in zip(before, versions, (*support, batch.logits, batch.tokens), strict=True):
        assert_bits(now, old, "an input")
        assert now._version == version


@pytest.mark.parametrize("shape", [(0, 4, 7), (3, 0, 7), (0, 7)], ids=str)
@EVERY_BACKEND
def test_no_rows(shape, backend):
    """Finite and differentiable, with ids that belong to no row."""
    logits = torch.zeros(shape, device=DEVICE, requires_grad=True)
    tokens = torch.zeros(shape[:-1], dtype=torch.long, device=DEVICE)
    support, layout = bad([1, 2], [0]), {"cu_seqlens": torch.zeros(1, dtype=torch.long, device=DEVICE)}
    found = ek.token_log_probs(logits, tokens, support=support, backend=backend).log_probs
    found.sum().backward()
    assert found.shape == shape[:-1] and logits.grad.shape == shape
    advantages = torch.zeros(shape[0] if len(shape) == 3 else 0, device=DEVICE)
    loss = ek.logits_policy_loss(
        logits, tokens, advantages, support=support, backend=backend, **(layout if len(shape) == 2 else {})
    ).loss
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64], ids=str)
@EVERY_BACKEND
def test_ids_of_any_integer_dtype(dtype, backend):
    batch, support = make_batch(), bad(TOKENS, GOOD)
    given = SamplingSupport(*(each.to(dtype) for each in support))
    results = [
        ek.token_log_probs(batch.logits, batch.tokens, support=each, backend=backend).log_probs
        for each in (support, given)
    ]
    assert_bits(*results, "log-probs")


@pytest.mark.parametrize("backend", FAST)
def test_a_token_that_cannot_be_beside_a_record(backend, values_are_checked):
    batch = make_batch()
    tokens = batch.tokens.clone()
    tokens[0, 0] = 37
    with pytest.raises(ValueError, match="tokens holds 37 at flattened position 0"):
        ek.logits_policy_loss(
            batch.logits.requires_grad_(), tokens, batch.advantages, support=bad(TOKENS, GOOD), backend=backend
        )
