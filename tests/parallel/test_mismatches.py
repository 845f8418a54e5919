"""Ranks that do not fit one another: NaN and a metric on all of them, and nobody waits for ever; what is refused."""

import pytest
import torch

import egpo_kernels as ek
from tests.parallel.split import over_ranks
from tests.support.batches import BACKENDS, BOTH_TERMS, EVERY_BACKEND, FAST_BACKEND, SEQUENCE, make_batch
from tests.support.device import DEVICE
from tests.support.ranks import Deadlock, in_ranks

MISMATCH = "vocab_group/mismatched_ranks/sum"
VOCAB, WIDTH = 36, 5
BOUNDS = (0, 18, 36)
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(4, 4, WIDTH, generator=GENERATOR).to(DEVICE)
WEIGHT = torch.randn(VOCAB, WIDTH, generator=GENERATOR).to(DEVICE)


def options(batch, backend, group, start, **changed):
    return {
        "old_log_probs": batch.old_log_probs, "ref_log_probs": batch.ref_log_probs, "cu_seqlens": batch.cu_seqlens,
        "backend": backend, "vocab_group": group, "vocab_start": start, "vocab_size": VOCAB, **changed,
    }  # fmt: skip


def of_logits(batch, backend, group, start, stop, config=BOTH_TERMS, **changed):
    logits = batch.logits[..., start:stop].clone().requires_grad_()
    loss, metrics = ek.logits_policy_loss(
        logits, batch.tokens, batch.advantages, batch.mask, config=config,
        **options(batch, backend, group, start, **changed),
    )  # fmt: skip
    return loss, metrics, [logits]


def of_groups(batch, backend, group, start, stop, **changed):
    logits = batch.logits[..., start:stop].clone().requires_grad_()
    changed = {"old_log_probs": None, "ref_log_probs": None, **changed}
    loss, metrics = ek.egpo_loss(
        logits, batch.tokens, batch.groups, batch.rewards, mask=batch.mask,
        **options(batch, backend, group, start, **changed),
    )  # fmt: skip
    return loss, metrics, [logits]


def of_hidden(batch, backend, group, start, stop, config=BOTH_TERMS, frozen=False, **changed):
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT[start:stop].clone().requires_grad_(not frozen)
    loss, metrics = ek.linear_policy_loss(
        hidden, weight, batch.tokens, batch.advantages, batch.mask, config=config,
        **options(batch, backend, group, start, **{"max_chunk_bytes": 6 * VOCAB * 4, **changed}),
    )  # fmt: skip
    return loss, metrics, [hidden] if frozen else [hidden, weight]


def late(batch, backend, *where, **changed):
    return of_hidden(batch, backend, *where, config=SEQUENCE, **changed)


def late_and_frozen(batch, backend, *where, **changed):
    return of_hidden(batch, backend, *where, config=SEQUENCE, frozen=True, **changed)


WAYS = {way.__name__: way for way in (of_logits, of_groups, of_hidden, late, late_and_frozen)}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def changed_mask(batch):
    mask = batch.mask.clone()
    mask[0, 0] = ~mask[0, 0]
    return batch._replace(mask=mask)


def moved_mask(batch):
    """As many rows as before."""
    mask = batch.mask.clone()
    mask[1, 0], mask[3, 3] = True, False
    mask[0, 2] = True
    return batch._replace(mask=mask)


CHANGES = {
    "one row more or less": changed_mask,
    "other rows": moved_mask,
    "no row": lambda batch: batch._replace(mask=torch.zeros_like(batch.mask)),
    "a token": lambda batch: batch._replace(tokens=(batch.tokens + 1) % VOCAB),
    "advantages and rewards": lambda batch: batch._replace(advantages=-batch.advantages, rewards=1 - batch.rewards),
}


@EVERY_WAY
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@EVERY_BACKEND
def test_one_rank_with_something_else(change, way, backend):
    """NaN on every rank, also on one without a row that counts, and a metric; no rank waits in vain."""
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        here = change(batch) if rank == 1 else batch
        found = way(here, backend, group, start, stop)
        # Backward in the same turn: with hidden states it may sum over ranks.
        loss, metrics, leaves = found
        loss.backward()
        assert loss.isnan() and metrics[MISMATCH] == 1
        assert not here.mask.any() or all(leaf.grad.isnan().any() for leaf in leaves)

    over_ranks(BOUNDS, own)


@EVERY_BACKEND
@pytest.mark.parametrize("field", ["old_log_probs", "ref_log_probs"])
def test_one_rank_with_other_log_probs(field, backend):
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        here = batch._replace(**{field: getattr(batch, field) - 1e-6}) if rank else batch
        loss, metrics, _ = of_logits(here, backend, group, start, stop)
        assert loss.isnan() and metrics[MISMATCH] == 1

    over_ranks(BOUNDS, own)


@FAST_BACKEND
def test_what_does_not_count_may_differ(backend):
    """Where a rank's padding tokens or log-probs are other ones, nothing is wrong."""
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        noise = float(rank) if rank else float("nan")
        here = batch._replace(
            tokens=torch.where(batch.mask, batch.tokens, -100 - rank),
            old_log_probs=torch.where(batch.mask, batch.old_log_probs, noise),
        )
        loss, metrics, _ = of_logits(here, backend, group, start, stop)
        assert loss.isfinite() and metrics[MISMATCH] == 0

    over_ranks(BOUNDS, own)


PLACES = {
    "a gap": ([0, 19], VOCAB),
    "an overlap": ([0, 17], VOCAB),
    "not from the first": ([1, 19], VOCAB),
    "not to the last": ([0, 18], VOCAB + 1),
    "in another order": ([18, 0], VOCAB),
    "another vocabulary": ([0, 18], None),
}


@pytest.mark.parametrize("starts, vocab", PLACES.values(), ids=PLACES)
@EVERY_BACKEND
def test_columns_that_do_not_make_a_vocabulary(starts, vocab, backend):
    """One that says another vocabulary than the others is NaN itself."""
    batch = make_batch(vocab=VOCAB)
    if backend == "reference" and vocab is None:
        pytest.skip("the specification gathers whole rows, of which there are none to be compared")

    def own(rank, start, stop, group):
        said = {"vocab_start": starts[rank], "vocab_size": vocab or VOCAB + rank}
        loss, metrics, _ = of_logits(batch, backend, group, start, stop, **said)
        return bool(loss.isnan()) and float(metrics[MISMATCH]) >= 1

    found = over_ranks(BOUNDS, own)
    assert all(found) if vocab else found[1]


@EVERY_BACKEND
def test_log_probs_alone_are_nan_everywhere(backend):
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        mask = changed_mask(batch).mask if rank else batch.mask
        where = {"backend": backend, "vocab_group": group, "vocab_start": start, "vocab_size": VOCAB}
        of_logits = ek.token_log_probs(batch.logits[..., start:stop], batch.tokens, mask=mask, **where)
        of_hidden = ek.linear_token_log_probs(HIDDEN, WEIGHT[start:stop], batch.tokens, mask=mask, **where)
        assert of_logits.log_probs.isnan().all() and of_hidden.log_probs.isnan().all()

    over_ranks(BOUNDS, own)


@EVERY_WAY
@EVERY_BACKEND
def test_nothing_that_counts_anywhere(way, backend):
    """Every rank joins the exchange; a loss of 0."""
    batch = make_batch(vocab=VOCAB)
    batch = batch._replace(mask=torch.zeros_like(batch.mask))

    def own(rank, start, stop, group):
        loss, metrics, leaves = way(batch, backend, group, start, stop)
        loss.backward()
        assert loss == 0 and metrics[MISMATCH] == 0
        assert all((leaf.grad == 0).all() for leaf in leaves)

    over_ranks(BOUNDS, own)


@FAST_BACKEND
def test_no_tokens_at_all(backend):
    def own(rank, start, stop, group):
        logits = torch.zeros(0, 4, stop - start, device=DEVICE, requires_grad=True)
        tokens, advantages = torch.zeros(0, 4, dtype=torch.long, device=DEVICE), torch.zeros(0, device=DEVICE)
        loss, metrics = ek.logits_policy_loss(logits, tokens, advantages, backend=backend, vocab_group=group)
        loss.backward()
        assert loss == 0 and metrics[MISMATCH] == 0 and logits.grad.shape == logits.shape

    over_ranks(BOUNDS, own)


@EVERY_WAY
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is not asked")
def test_a_bad_token_raises_after_the_exchange(way, backend):
    """The rank that has it; the other one, which has no reason to, is done and knows."""
    batch = make_batch(vocab=VOCAB)
    tokens = batch.tokens.clone()
    tokens[0, 0] = VOCAB
    bad = batch._replace(tokens=tokens)

    def own(rank, start, stop, group):
        if rank:
            with pytest.raises(ValueError, match=f"tokens holds {VOCAB} at flattened position 0"):
                way(bad, backend, group, start, stop)
            return
        loss, metrics, _ = way(batch, backend, group, start, stop)
        assert loss.isnan() and metrics[MISMATCH] == 1

    over_ranks(BOUNDS, own)


# Said before any exchange.


def refused(error, match, tensor=None, group=True, **said):
    """What rank 1 of two is told, by logits and by an output layer."""
    batch = make_batch(vocab=VOCAB)
    tensor = batch.logits[..., :18] if tensor is None else tensor

    def own(rank, handle):
        where = {"vocab_group": handle} if group else {}
        with pytest.raises(error, match=match):
            ek.logits_policy_loss(tensor, batch.tokens, batch.advantages, **{**where, **said})
        with pytest.raises(error, match=match.replace("logits", "weight")):
            ek.linear_policy_loss(HIDDEN, WEIGHT[:18], batch.tokens, batch.advantages, **{**where, **said})

    in_ranks(2, own)


def test_where_columns_begin_needs_where_they_end():
    refused(ValueError, "vocab_start is 3 and vocab_size is None", vocab_start=3)


def test_more_ids_than_columns():
    refused(ValueError, "vocab_size is 37, and logits has 18 columns on each of 2 ranks, 36 in all", vocab_size=37)


@pytest.mark.parametrize("start", [-1, 1.5, True, "3"])
def test_a_start_that_is_none(start):
    refused((ValueError, TypeError), "vocab_start is", vocab_start=start, vocab_size=VOCAB)


@pytest.mark.parametrize("group", [3, "tp", torch.zeros(2)], ids=["a number", "a name", "a tensor"])
def test_a_group_that_is_none(group):
    refused(
        TypeError, "vocab_group is .*; it must be a torch.distributed.ProcessGroup or a DeviceMesh", vocab_group=group
    )


def test_columns_without_the_others():
    refused(
        ValueError,
        "no other rank has any; they must be all: pass vocab_group",
        group=False,
        vocab_start=18,
        vocab_size=36,
    )


def hidden_refused(match, **said):
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        with pytest.raises((ValueError, TypeError), match=match):
            ek.linear_policy_loss(
                HIDDEN, WEIGHT[start:stop], batch.tokens, batch.advantages, **{"vocab_group": group, **said}
            )

    over_ranks(BOUNDS, own)


def test_gradients_of_hidden_states_that_cannot_be():
    hidden_refused("hidden_grad is 'mean'; it must be one of 'all_reduce'", hidden_grad="mean")
    hidden_refused("hidden_grad is 'reduce_scatter' with sequence_parallel=False", hidden_grad="reduce_scatter")
    hidden_refused(
        "hidden_grad is 'partial' with sequence_parallel=True", hidden_grad="partial", sequence_parallel=True
    )
    hidden_refused("sequence_parallel is 1", sequence_parallel=1)
    hidden_refused("sequence_parallel is True and vocab_group is None", sequence_parallel=True, vocab_group=None)


@FAST_BACKEND
def test_ranks_with_other_numbers_of_tokens(backend, monkeypatch):
    """They would wait for ever; with EGPO_KERNELS_DEBUG_GROUPS=1 each is told."""
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        here = type(batch)(*(None if field is None else field[: 4 - 2 * rank] for field in batch))
        return of_logits(here, backend, group, start, stop)

    with pytest.raises(Deadlock):
        over_ranks(BOUNDS, own)
    monkeypatch.setenv("EGPO_KERNELS_DEBUG_GROUPS", "1")
    with pytest.raises(ValueError, match=r"shape is \(4, 4\) here and \(2, 4\) on rank 1 of vocab_group"):
        over_ranks(BOUNDS, own)
