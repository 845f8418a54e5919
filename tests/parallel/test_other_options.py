"""Ranks that come with other settings, numbers or kept sets than the first: NaN on all, and nobody waits for ever."""

import pytest
import torch

import egpo_kernels as ek
from tests.parallel.split import over_ranks
from tests.parallel.test_mismatches import BOUNDS, HIDDEN, MISMATCH, VOCAB, WEIGHT, of_groups, of_hidden, of_logits
from tests.support.batches import BOTH_TERMS, EVERY_BACKEND, FAST_BACKEND, make_batch
from tests.support.device import DEVICE

OTHERS = {
    "temperature": {"temperature": 2.0},
    "a clip": {"config": ek.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.02, clip_low=0.1)},
    "metrics": {"metrics": "none"},
    "a count": {"num_tokens": 17},
    "a vocabulary": {"vocab_size": VOCAB - 1},
}


def assert_told(loss, metrics):
    assert loss.isnan()
    assert not metrics or metrics[MISMATCH] >= 1


@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("way", [of_logits, of_hidden])
@FAST_BACKEND
def test_one_rank_with_another_setting(way, changed, backend):
    batch = make_batch(vocab=VOCAB)
    batch = batch._replace(tokens=batch.tokens.clamp(max=VOCAB - 2))

    def own(rank, start, stop, group):
        assert_told(*way(batch, backend, group, start, stop, **(changed if rank else {}))[:2])

    over_ranks(BOUNDS, own)


RECIPE = ek.recipes.EGPO.replace(kl_coef=0.1)
OF_GROUPS = {
    "groups": lambda batch: {"groups": 1 - batch.groups.roll(1)},
    "correct": lambda batch: {"correct": batch.rewards < 0.5},
    "reference log-probs": lambda batch: {"ref_log_probs": batch.ref_log_probs - 0.1},
    "rollout weights": lambda batch: {"rollout_weights": torch.full((4,), 0.5, device=DEVICE)},
    "a group size": lambda batch: {"group_size": 2},
    "a recipe": lambda batch: {"recipe": RECIPE.replace(nsr_scale=0.5)},
}


@pytest.mark.parametrize("change", OF_GROUPS.values(), ids=OF_GROUPS)
@EVERY_BACKEND
def test_on_policy_groups_that_differ(change, backend):
    """Advantages come of the one exchange, which has to tell what they are made of."""
    batch = make_batch(vocab=VOCAB)
    shared = {"ref_log_probs": batch.ref_log_probs, "recipe": RECIPE, "correct": batch.rewards > 0.5}

    def own(rank, start, stop, group):
        changed = {"groups": batch.groups, **shared, **(change(batch) if rank else {})}
        here = batch._replace(groups=changed.pop("groups"))
        assert_told(*of_groups(here, backend, group, start, stop, **changed)[:2])

    over_ranks(BOUNDS, own)


def kept(batch, extra):
    """A record of the first row: its token and two more ids."""
    rows = torch.full((batch.tokens.numel(), 3), -1, device=DEVICE)
    rows[0] = torch.tensor([int(batch.tokens.reshape(-1)[0]), *extra], device=DEVICE)
    return ek.pack_support(rows)


@pytest.mark.parametrize("way", [of_logits, of_hidden])
@FAST_BACKEND
def test_other_kept_ids(way, backend):
    batch = make_batch(vocab=VOCAB)
    batch = batch._replace(tokens=batch.tokens.clamp(max=VOCAB - 9))

    def own(rank, start, stop, group):
        support = kept(batch, (VOCAB - 1, VOCAB - 2 - rank))
        assert_told(*way(batch, backend, group, start, stop, support=support)[:2])

    over_ranks(BOUNDS, own)


@pytest.mark.parametrize("way", [of_logits, of_hidden])
@FAST_BACKEND
def test_a_record_on_one_rank_alone(way, backend):
    batch = make_batch(vocab=VOCAB)
    empty = ek.SamplingSupport(torch.zeros(0, dtype=torch.long), torch.zeros(17, dtype=torch.long))
    empty = ek.SamplingSupport(*(each.to(DEVICE) for each in empty))

    def own(rank, start, stop, group):
        support = empty if rank else kept(batch, (VOCAB - 1, VOCAB - 2))
        assert_told(*way(batch, backend, group, start, stop, support=support)[:2])

    over_ranks(BOUNDS, own)


@EVERY_BACKEND
def test_entropies_are_nan_too(backend):
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        where = {"backend": backend, "vocab_group": group, "return_entropy": True}
        mask = batch.mask.clone()
        mask[0, 0] = not rank
        logits = batch.logits[..., start:stop]
        found = ek.token_log_probs(logits, batch.tokens, mask=mask, **where)
        linear = ek.linear_token_log_probs(HIDDEN, WEIGHT[start:stop], batch.tokens, mask=mask, **where)
        for each in (found, linear):
            assert each.log_probs.isnan().all() and each.entropy[mask].isnan().all()

    over_ranks(BOUNDS, own)


def test_no_second_derivative():
    """By the specification neither: its exchange is none that autograd knows."""
    batch = make_batch(vocab=VOCAB, dtype=torch.float64)

    def own(rank, start, stop, group):
        for way in (of_logits, of_hidden):
            loss, _, leaves = way(batch, "reference", group, start, stop)
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                sum(each.square().sum() for each in first).backward()

    over_ranks(BOUNDS, own)


@EVERY_BACKEND
def test_gradients_where_columns_are_missing(backend):
    """Of the columns that are there, and NaN."""
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        loss, _, (logits,) = of_logits(batch, backend, group, start, stop - (rank == 0), config=BOTH_TERMS)
        loss.backward()
        assert logits.grad.shape == logits.shape and logits.grad[batch.mask].isnan().all()

    over_ranks(BOUNDS, own)


@EVERY_BACKEND
@pytest.mark.parametrize("lengths", [(2, 3), (3, 3)], ids=["uneven", "too many"])
def test_parts_that_do_not_make_all_tokens(lengths, backend):
    """Every rank is told, before anybody waits."""
    batch = make_batch(vocab=VOCAB)

    def own(rank, start, stop, group):
        hidden = HIDDEN[:, : lengths[rank]]
        with pytest.raises(ValueError, match=r"hidden has \d tokens on this rank, one of 2, and there are"):
            of_hidden(batch, backend, group, start, stop, hidden=hidden[:, : lengths[rank]], sequence_parallel=True)

    tokens = batch.tokens[:, :3] if lengths == (2, 3) else batch.tokens
    batch = type(batch)(
        *(field if field is None or field.dim() == 1 else field[:, : tokens.shape[1]] for field in batch)
    )
    over_ranks(BOUNDS, own)
