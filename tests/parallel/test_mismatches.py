"""Ranks that do not fit one another: NaN and a metric on all of them, and nobody waits for ever; what is refused."""

import pytest
import torch

import egpo_kernels as ek
from tests.parallel.split import over_ranks
from tests.support.batches import BACKENDS, BOTH_TERMS, EVERY_BACKEND, FAST_BACKEND, SEQUENCE, make_batch
from tests.support.device import DEVICE

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


def of_logits(batch, backend, group, start, stop, config=BOTH_TERMS, hidden=None, **changed):
    logits = batch.logits[..., start:stop].clone().requires_grad_()
    loss, metrics = ek.logits_policy_loss(
        logits, batch.tokens, batch.advantages, batch.mask, config=config,
        **options(batch, backend, group, start, **changed),
    )  # fmt: skip
    return loss, metrics, [logits]


def of_groups(batch, backend, group, start, stop, hidden=None, **changed):
    logits = batch.logits[..., start:stop].clone().requires_grad_()
    changed = {"old_log_probs": None, "ref_log_probs": None, **changed}
    loss, metrics = ek.egpo_loss(
        logits, batch.tokens, batch.groups, batch.rewards, mask=batch.mask,
        **options(batch, backend, group, start, **changed),
    )  # fmt: skip
    return loss, metrics, [logits]


def of_hidden(batch, backend, group, start, stop, config=BOTH_TERMS, frozen=False, hidden=HIDDEN, **changed):
    hidden, weight = hidden.clone().requires_grad_(), WEIGHT[start:stop].clone().requires_grad_(not frozen)
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
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        said = {"vocab_start": starts[rank], "vocab_size": vocab or VOCAB + rank}
        loss, metrics, _ = of_logits(batch, backend, group, start, stop, **said)
        assert loss.isnan() and metrics[MISMATCH] >= 1

    over_ranks(BOUNDS, own)


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


@EVERY_WAY
@EVERY_BACKEND
def test_no_tokens_at_all(way, backend):
    batch = make_batch(vocab=VOCAB)
    batch = type(batch)(*(None if field is None else field[:0] for field in batch))

    def own(rank, start, stop, group):
        loss, metrics, leaves = way(batch, backend, group, start, stop, hidden=HIDDEN[:0])
        loss.backward()
        assert loss == 0 and metrics[MISMATCH] == 0
        assert all(leaf.grad.shape == leaf.shape and (leaf.grad == 0).all() for leaf in leaves)

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
