"""Results that must not depend on who comes first: many rows, many runs, tokens at every place of a block."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.batches import (
    Batch,
    assert_same,
    differentiate,
    one_pass,
    only_log_probs,
    two_pass,
    whole_groups,
)
from tests.support.device import DEVICE, size
from tests.support.rows import assert_same as assert_same_rows
from tests.support.rows import of_rows, picked, rows_of
from tests.support.rows import one_pass as one_pass_of_rows

pytestmark = pytest.mark.gpu

SEQUENCES, LENGTH, VOCAB = size((4, 2, 300), (16, 256, 40_009))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATHS = [one_pass, two_pass, only_log_probs, whole_groups]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def many_rows(dtype):
    """An on-policy batch; rows of logits repeat, their tokens walk over the vocabulary in steps of a prime."""
    rows = (3 * torch.randn(61, VOCAB, generator=torch.Generator().manual_seed(0))).to(dtype).to(DEVICE)
    count = torch.arange(SEQUENCES * LENGTH)
    logits = rows[(count % 61).to(DEVICE)].view(SEQUENCES, LENGTH, VOCAB)
    tokens = (count * 1009).remainder(VOCAB).view(SEQUENCES, LENGTH)
    number = torch.arange(SEQUENCES)
    mask = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    ref = torch.full((SEQUENCES, LENGTH), -11.0)
    advantages = torch.where(number % 3 == 0, 1.3, -0.7)
    fields = (tokens, mask, ref, advantages, (number % 2 == 0).float(), number // 4)
    tokens, mask, ref, advantages, rewards, groups = (field.to(DEVICE) for field in fields)
    return Batch(logits, tokens, mask, None, ref, advantages, rewards, groups, None)


@EVERY_DTYPE
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_in_place_is_out_of_place(path, dtype):
    """The gradient lands on the token's own logit, which every warp of the row must have read by then."""
    batch = many_rows(dtype)
    for run in range(size(2, 20)):
        batch = batch._replace(tokens=(batch.tokens + 37 * run).remainder(VOCAB))
        wanted = differentiate(path, batch, "triton")
        assert_same(differentiate(path, batch, "triton", inplace_grad=True), wanted)
        assert wanted.gradient.gather(-1, batch.tokens[..., None]).abs().sum() > 0


@EVERY_DTYPE
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_a_hundred_runs(path, dtype):
    batch = many_rows(dtype)
    first = differentiate(path, batch, "triton")
    for _ in range(size(1, 100)):
        found = differentiate(path, batch, "triton")
        assert_same(found, first)
        for key, value in first.metrics.items():
            assert torch.equal(found.metrics[key], value) or value.isnan(), key


@EVERY_DTYPE
@pytest.mark.parametrize("run", [of_rows, one_pass_of_rows], ids=["two_pass", "one_pass"])
def test_a_row_among_any_others(run, dtype):
    """Alone, among a few, at another place: the same bits, however many programs share the rows."""
    count, vocab = size((8, 70), (700, 50_257))
    logits, tokens, upstream = rows_of(count, vocab, dtype)
    full = run(logits, tokens, "triton", upstream)
    backwards, some = list(range(count))[::-1], list(range(0, count, 7))
    for rows in ([0], [count - 1], [3, 1, 5], some, backwards):
        found = run(logits[rows], tokens[rows], "triton", upstream[rows])
        assert_same_rows(found, picked(full, rows), f"{len(rows)} rows")


def test_many_sequences_and_groups():
    """Group statistics meet every other sequence; metrics merge partial sums of many programs."""
    sequences = size(70, 5000)
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(sequences // 8, (sequences,), generator=generator).to(DEVICE)
    rewards = torch.randint(2, (sequences,), generator=generator).float().to(DEVICE)
    old = -torch.rand(sequences, 33, generator=generator).to(DEVICE)
    first = ek.group_advantages(groups, rewards, old, backend="triton")
    plain = ek.group_advantages(groups, rewards, old, backend="portable")
    torch.testing.assert_close(first.advantages, plain.advantages)
    for _ in range(size(1, 100)):
        found = ek.group_advantages(groups, rewards, old, backend="triton")
        for name in ("advantages", "weights", "base", "uncertainty"):
            assert torch.equal(getattr(found, name), getattr(first, name)), name
