"""Rows spread over ranks, one at a time: numbers by hand, ids and logits at the edges, padding, bits."""

import math

import pytest
import torch

import egpo_kernels as ek
from tests.parallel.split import over_ranks
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.batches import BACKENDS, EVERY_BACKEND, FAST_BACKEND, WAYS, make_batch
from tests.support.device import DEVICE
from tests.support.ranks import in_ranks

Z, CUTS = [2.0, 1.0, 0.0, -1.0], (0, 2, 4)
INF, NAN = math.inf, math.nan


def scored(z, token, backend, bounds=CUTS, dtype=torch.float64, upstream=(1.0, 0.0), **options):
    """Log-prob and entropy of one row, which all ranks must have alike, and its whole gradient."""

    def own(rank, start, stop, group):
        logits = torch.tensor([[z[start:stop]]], dtype=dtype, device=DEVICE, requires_grad=True)
        found = ek.token_log_probs(
            logits, torch.tensor([[token]], device=DEVICE), return_entropy=True, backend=backend,
            **{"vocab_group": group, "vocab_start": start, "vocab_size": bounds[-1], **options},
        )  # fmt: skip
        (upstream[0] * found.log_probs + upstream[1] * found.entropy).sum().backward()
        return found.log_probs.item(), found.entropy.item(), logits.grad[0, 0].tolist()

    results = over_ranks(bounds, own)
    for result in results:
        assert str(result[:2]) == str(results[0][:2])
    return *results[0][:2], [number for result in results for number in result[2]]


@EVERY_BACKEND
@pytest.mark.parametrize("bounds", [CUTS, (0, 1, 4), (0, 0, 4), (0, 4, 4), (0, 1, 2, 3, 4), (0, 2, 2, 4)], ids=str)
def test_the_worked_example(bounds, backend):
    log_prob, entropy, gradient = scored(Z, 1, backend, bounds)
    assert log_prob == pytest.approx(-1.440190, abs=1e-6) and entropy == pytest.approx(0.947537, abs=1e-6)
    shares = [math.exp(z - 2) / 1.553002 for z in Z]
    assert gradient == pytest.approx([float(place == 1) - share for place, share in enumerate(shares)], abs=1e-6)


def in_one(z, token, backend, dtype=torch.float64, upstream=(1.0, 0.0)):
    """The same of the row in one piece."""
    logits = torch.tensor([[z]], dtype=dtype, device=DEVICE, requires_grad=True)
    found = ek.token_log_probs(logits, torch.tensor([[token]], device=DEVICE), return_entropy=True, backend=backend)
    (upstream[0] * found.log_probs + upstream[1] * found.entropy).sum().backward()
    return found.log_probs.item(), found.entropy.item(), logits.grad[0, 0].tolist()


EDGES = {
    "a leading part of -inf": ([-INF, -INF, 0.5, -1.0], 2),
    "a last part of -inf": ([2.0, 1.0, -INF, -INF], 0),
    "-inf in both parts": ([2.0, -INF, -INF, 0.0], 3),
    "the token's is -inf": ([2.0, 1.0, 0.0, -INF], 3),
    "the token's is -inf, alone in its part": ([2.0, 1.0, -INF, -INF], 2),
    "all -inf": ([-INF] * 4, 1),
    "NaN elsewhere": ([2.0, NAN, 0.0, -1.0], 3),
    "NaN far below": ([2000.0, 1.0, NAN, -1.0], 0),
    "+inf": ([INF, 1.0, 0.0, -1.0], 2),
    "far apart": ([1e4, 1e4 - 1, -1e4, -1e4 + 1], 3),
    "high": ([1e4 + 2, 1e4 + 1, 1e4, 1e4 - 1], 1),
    "first of a part": (Z, 2),
    "last of a part": (Z, 3),
}


@EVERY_BACKEND
@pytest.mark.parametrize("upstream", [(1.0, 0.0), (0.5, -0.7)], ids=["log-prob", "entropy"])
@pytest.mark.parametrize("z, token", EDGES.values(), ids=EDGES)
def test_edges_are_as_in_one_piece(z, token, upstream, backend):
    found, wanted = (make(z, token, backend, upstream=upstream) for make in (scored, in_one))
    assert found[:2] == pytest.approx(wanted[:2], nan_ok=True)
    assert found[2] == pytest.approx(wanted[2], nan_ok=True)


@EVERY_BACKEND
def test_the_largest_of_16_bits(backend):
    z = [65504.0, 65472.0, -65504.0, 0.0]
    assert scored(z, 1, backend, dtype=torch.float16)[0] == pytest.approx(-32.0)


@EVERY_BACKEND
def test_far_below_all_others_at_a_low_temperature(backend):
    """What one rank has is nothing beside what another has, by more than any exponential holds."""
    found = scored([0.0, 1.0, -3e38, -3e38], 1, backend, dtype=torch.float32, temperature=1e-3)
    assert found[0] == 0 and found[1] == pytest.approx(0.0) and found[2] == pytest.approx([0.0] * 4)


@EVERY_BACKEND
def test_padding_counts_unless_the_vocabulary_says_where_it_ends(backend):
    """As every stack has it; with its size, as the sampler has it."""
    z = [*Z[:3], -1.0, 0.5, 0.25]
    counted = scored(z, 1, backend, (0, 3, 6), vocab_start=None, vocab_size=None)
    assert counted[0] == pytest.approx(1 - math.log(sum(map(math.exp, z))))
    cut = scored([*Z, NAN, INF], 1, backend, (0, 3, 6), vocab_start=None, vocab_size=4)
    assert cut[:2] == pytest.approx((-1.440190, 0.947537), abs=1e-6) and cut[2][4:] == [0.0, 0.0]


@EVERY_BACKEND
def test_a_rank_of_nothing_but_padding(backend):
    cut = scored([*Z, NAN, INF], 1, backend, (0, 2, 4, 6), vocab_start=None, vocab_size=4)
    assert cut[:2] == pytest.approx((-1.440190, 0.947537), abs=1e-6) and cut[2][4:] == [0.0, 0.0]


@EVERY_BACKEND
def test_padding_without_a_group(backend):
    """One process may have padded columns too."""
    (found, entropy, gradient), wanted = (
        scored([*Z, NAN, INF], 1, backend, (0, 6), vocab_group=None, vocab_start=None, vocab_size=4),
        in_one(Z, 1, backend),
    )
    assert (found, entropy) == pytest.approx(wanted[:2]) and gradient == pytest.approx([*wanted[2], 0.0, 0.0])


# Bits.

PATHS = {name: way for name, way in WAYS.items() if name != "from_log_probs"}


def results(path, backend, batch, **options):
    """Loss, gradient and metrics of a way from logits to a loss."""
    logits = batch.logits.detach().clone().requires_grad_()
    loss, metrics = path(batch._replace(logits=logits), backend, **options)
    loss.backward()
    return {"loss": loss.detach(), "gradient": logits.grad, **metrics}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@EVERY_BACKEND
def test_a_group_of_one_is_no_group(path, backend):
    batch = make_batch()
    found = in_ranks(1, lambda rank, group: results(path, backend, batch, vocab_group=group))
    wanted = results(path, backend, batch)
    assert not found.calls and found.results[0].keys() == wanted.keys()
    for name, value in wanted.items():
        assert_bits(found.results[0][name], value, name)


def halves(path, backend, batch):
    """On two ranks that have half of the columns each."""
    half = batch.logits.shape[-1] // 2

    def own(rank, group):
        here = batch._replace(logits=batch.logits[..., rank * half : (rank + 1) * half])
        return results(path, backend, here, vocab_group=group)

    return in_ranks(2, own)


HALVED = ("one_pass", "two_pass", "whole_groups")


@pytest.mark.parametrize("name", HALVED)
@FAST_BACKEND
def test_every_run_has_the_same_bits(name, backend):
    batch = make_batch(vocab=600)
    first, second = (halves(PATHS[name], backend, batch).results for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            assert_bits(other[name], value, name)


@FAST_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_notice_the_others(dtype, backend):
    """Its log-prob, entropy and gradient are the same bits with other rows beside it, or none."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 9, 700, generator=generator).to(DEVICE, dtype)
    tokens = torch.randint(700, (1, 9), generator=generator).to(DEVICE)

    def run(rows):
        def own(rank, group):
            here = logits[:, rows, 350 * rank : 350 * (rank + 1)].clone().requires_grad_()
            found = ek.token_log_probs(here, tokens[:, rows], return_entropy=True, backend=backend, vocab_group=group)
            (found.log_probs + 0.3 * found.entropy).sum().backward()
            return [*(each.detach()[0] for each in found), here.grad[0]]

        return in_ranks(2, own).results

    whole = run(list(range(9)))
    for rows in ([0], [4, 2], [8, 1, 0, 3]):
        for rank, parts in enumerate(run(rows)):
            for name, part, of_all in zip(("log-prob", "entropy", "gradient"), parts, whole[rank], strict=True):
                assert_bits(part, of_all[rows], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_do_not_change_what_they_are_given(backend):
    batch = make_batch(vocab=36)
    before = batch.clone()
    halves(PATHS["one_pass"], backend, batch)
    for name, one, other in zip(batch._fields, batch, before, strict=True):
        assert one is None or torch.equal(one, other), name


@FAST_BACKEND
def test_in_place_writes_over_the_logits(backend):
    """In backward; a second one is refused."""
    batch = make_batch(vocab=36)
    wanted = halves(PATHS["one_pass"], backend, batch).results

    def own(rank, group):
        leaf = batch.logits[..., 18 * rank : 18 * (rank + 1)].clone().requires_grad_()
        logits = leaf * 1
        loss, _ = PATHS["one_pass"](batch._replace(logits=logits), backend, vocab_group=group, inplace_grad=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="the gradient was handed out by an earlier backward"):
            loss.backward()
        return logits.detach(), leaf.grad

    for result, expected in zip(in_ranks(2, own).results, wanted, strict=True):
        assert_bits(result[0], expected["gradient"], "logits")
        assert_bits(result[1], expected["gradient"], "gradient")


@FAST_BACKEND
def test_micro_batches_add_up(backend):
    """Gradients accumulate on each rank's own columns."""
    batch = make_batch(vocab=36)
    counts = {"num_tokens": int(batch.mask.sum())}

    def own(rank, group):
        leaf = batch.logits[..., 18 * rank : 18 * (rank + 1)].clone().requires_grad_()
        for half in (slice(0, 2), slice(2, 4)):
            part = type(batch)(*(None if field is None else field[half] for field in batch))
            PATHS["one_pass"](part._replace(logits=leaf[half]), backend, vocab_group=group, **counts).loss.backward()
        return leaf.grad

    for found, expected in zip(
        in_ranks(2, own).results, halves(PATHS["one_pass"], backend, batch).results, strict=True
    ):
        assert_rounding(found, expected["gradient"])
