"""What is refused before any exchange, on every rank; and what ranks with other sizes are told."""

import pytest
import torch

import egpo_kernels as ek
from tests.parallel.split import over_ranks
from tests.parallel.test_mismatches import BOUNDS, HIDDEN, VOCAB, WEIGHT, of_logits
from tests.support.batches import FAST_BACKEND, make_batch
from tests.support.ranks import Deadlock, in_ranks


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
    refused(ValueError, "vocab_size is 37, and logits has columns for 36 on 2 ranks", vocab_size=37)


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
    with pytest.raises(ValueError, match=r"tokens' shape is \(4, 4\) here and \(2, 4\) on rank 1 of vocab_group"):
        over_ranks(BOUNDS, own)
