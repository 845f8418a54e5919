"""What a split vocabulary costs a rank, counted: exchanges, their bytes, passes over its logits, products, memory."""

import pytest
import torch

import egpo_kernels as ek
from benchmarks.counts.traffic import count_traffic
from egpo_kernels.linear.head import Head
from egpo_kernels.parallel import sharded
from egpo_kernels.parallel.exchange import Pending
from tests.support.batches import BOTH_TERMS, FAST_BACKEND, NEEDS_TRITON, SEQUENCE
from tests.support.cost import peak_bytes, products
from tests.support.device import DEVICE
from tests.support.ranks import in_ranks

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counted where kernels are interpreted")
ROWS, VOCAB, WIDTH, RANKS = 12, 4000, 16, 2
OWN = VOCAB // RANKS
CONFIGS = {
    "token": BOTH_TERMS,
    "sequence": SEQUENCE,
    "gmpo": ek.recipes.GMPO.loss,
    "per token": ek.PolicyLossConfig(reduction="none"),
}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


class Batch:
    """Three sequences of four tokens."""

    def __init__(self, dtype=torch.float32, rows=ROWS):
        generator = torch.Generator().manual_seed(0)
        shape = (rows // 4, 4)
        self.logits = torch.randn(*shape, VOCAB, generator=generator).to(dtype)
        self.tokens = torch.randint(VOCAB, shape, generator=generator)
        log_probs = self.logits.float().log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]
        # Near enough that nothing is clipped: every row has a gradient.
        self.old, self.ref = (log_probs + 1e-3 * torch.randn(shape, generator=generator) for _ in range(2))
        self.advantages = torch.randn(shape[0], generator=generator)
        self.hidden = torch.randn(*shape, WIDTH, generator=generator).to(dtype)
        self.weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)

    def given(self, config, backend, group):
        return {
            "old_log_probs": self.old,
            "ref_log_probs": self.ref,
            "config": config,
            "backend": backend,
            "vocab_group": group,
        }

    def loss(self, logits, config, backend, group, **options):
        given = self.given(config, backend, group)
        return ek.logits_policy_loss(logits, self.tokens, self.advantages, **given, **options).loss.sum()

    def own(self, rank):
        return self.logits[..., rank * OWN : (rank + 1) * OWN].clone().requires_grad_()

    def linear(self, hidden, weight, config, backend, group, **options):
        given = self.given(config, backend, group)
        return ek.linear_policy_loss(hidden, weight, self.tokens, self.advantages, **given, **options).loss.sum()


def told(rows):
    """Bytes that a rank tells: a line for each row, and one for each 1024 of them."""
    return 16 * (rows + max(1, -(-rows // 1024)))


# Exchanges.


@EVERY_CONFIG
@FAST_BACKEND
def test_one_all_gather_in_forward_and_none_in_backward(config, backend):
    """16 bytes a token from each other rank; as many for a ratio per sequence, which costs nothing more here."""
    batch = Batch()

    def own(rank, group):
        loss = batch.loss(batch.own(rank), config, backend, group)
        forward = list(group.world.calls)
        loss.backward()
        return [call for call in forward if call[0] == rank], [call for call in group.world.calls if call[0] == rank]

    for rank, (forward, all_calls) in enumerate(in_ranks(RANKS, own).results):
        assert forward == all_calls == [(rank, "all_gather", told(ROWS))]


@FAST_BACKEND
def test_without_an_entropy_as_many(backend):
    """So that a rank that wants one, and another that does not, are told instead of left waiting."""
    batch = Batch()
    calls = in_ranks(
        RANKS,
        lambda rank, group: ek.token_log_probs(batch.own(rank), batch.tokens, backend=backend, vocab_group=group),
    ).calls
    assert [call[1:] for call in calls] == [("all_gather", told(ROWS))] * RANKS


@pytest.mark.parametrize("changed", [None, 3, 1500, 2099])
@FAST_BACKEND
def test_a_header_for_each_thousand_rows(changed, backend):
    """So that ranks that do not fit are found in any of them."""
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(2100, 4, generator=generator), torch.randint(4, (2100,), generator=generator)
    counted = torch.arange(2100) % 300 == 0  # interpreted, the others take no time

    def own(rank, group):
        mask = counted.clone()
        if rank and changed is not None:
            mask[changed] = ~mask[changed]
        here = logits[:, 2 * rank : 2 * rank + 2]
        found = ek.token_log_probs(here, tokens, mask=mask, backend=backend, vocab_group=group)
        return bool(found.log_probs.isnan().all())

    found = in_ranks(2, own)
    assert found.results == [changed is not None] * 2 and {call[2] for call in found.calls} == {told(2100)}


CHUNK_ROWS = 5


def in_chunks(backend):
    """Two chunks of logits, and what a backend holds beside a row."""
    return {"max_chunk_bytes": CHUNK_ROWS * OWN * 4 * (2 if backend == "triton" else 4)}


HEADS = {"trains": (True, True, 3), "frozen": (True, False, 2), "weight alone": (False, True, 2)}


@pytest.mark.parametrize("of_hidden, of_weight, count", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("hidden_grad", ["all_reduce", "partial"])
@FAST_BACKEND
def test_one_exchange_a_chunk_and_three_products(hidden_grad, of_hidden, of_weight, count, backend):
    """Products of the rank's part of the weight, three where the head trains and two where it is frozen; the gradient
    of hidden states is summed a chunk at a time, in their own dtype, and only if that is asked for.
    """
    batch = Batch()

    def own(rank, group):
        hidden = batch.hidden.clone().requires_grad_(of_hidden)
        weight = batch.weight[rank * OWN : (rank + 1) * OWN].clone().requires_grad_(of_weight)
        return batch.linear(hidden, weight, BOTH_TERMS, backend, group, hidden_grad=hidden_grad, **in_chunks(backend))

    def run(rank, group):
        own(rank, group).backward()

    found = in_ranks(RANKS, run)
    gathers = [call for call in found.calls if call[:2] == (0, "all_gather")]
    chunks = len(gathers)
    assert chunks > 1 and sum(call[2] for call in gathers) >= told(ROWS)
    sums = [call[2] for call in found.calls if call[:2] == (0, "all_reduce")]
    if of_hidden and hidden_grad == "all_reduce":
        assert len(sums) == chunks and sum(sums) >= ROWS * WIDTH * 4
    else:
        assert not sums
    made = []
    in_ranks(1, lambda rank, group: made.extend(products(lambda: run_alone(batch, of_hidden, of_weight, backend))))
    assert sum(rows * inner * columns for rows, inner, columns in made) == count * ROWS * OWN * WIDTH


def run_alone(batch, of_hidden, of_weight, backend):
    """One rank's products: of a group of one whose other columns are padding, which are not multiplied."""
    hidden = batch.hidden.clone().requires_grad_(of_hidden)
    weight = batch.weight.clone().requires_grad_(of_weight)
    tokens = batch.tokens % OWN
    loss, _ = ek.linear_policy_loss(
        hidden, weight, tokens, batch.advantages, old_log_probs=batch.old, backend=backend, vocab_size=OWN
    )
    loss.backward()


@FAST_BACKEND
def test_a_chunk_is_exchanged_while_the_next_one_is_multiplied(backend, monkeypatch):
    batch, order = Batch(), []

    def noted(place, name, *attribute):
        function = getattr(place, *attribute)

        def call(*args, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(place, *attribute, call)

    noted(Head, "product", "project")
    noted(sharded, "begun", "gather")
    noted(Pending, "arrived", "arrived")
    weight = batch.weight.clone().requires_grad_()
    ek.linear_policy_loss(
        batch.hidden,
        weight,
        batch.tokens % OWN,
        batch.advantages,
        backend=backend,
        vocab_size=OWN,
        **in_chunks(backend),
    )
    assert order[:4] == ["product", "begun"] * 2 and order[-2:] == ["arrived"] * 2
    assert order[4:-2] == ["arrived", "product", "begun"] * ((len(order) - 6) // 3)


# Passes.


@EVERY_CONFIG
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@NEEDS_TRITON
def test_two_reads_and_one_write_of_the_own_columns(inplace, config):
    batch = Batch(torch.bfloat16)
    one_pass = ROWS * OWN * 2

    def own(rank, group):
        logits = batch.own(rank)
        start = logits * 1 if inplace else logits
        if rank:
            batch.loss(start, config, "triton", group, inplace_grad=inplace).backward()
            return None
        with count_traffic() as traffic:
            batch.loss(start, config, "triton", group, inplace_grad=inplace).backward()
        read, gradient = traffic.of(start), traffic.of(start if inplace else logits.grad)
        return read, gradient, [launch.kernel for launch in traffic.launches]

    read, gradient, kernels = in_ranks(RANKS, own).results[0]
    # Beside whole passes a token's own logit, in each of them.
    assert read.loaded_once == 2 * one_pass and 0 <= read.loaded - 2 * one_pass <= 2 * 2 * ROWS
    assert gradient.stored_once == one_pass and 0 <= gradient.stored - one_pass <= 2 * ROWS
    # Of both ranks.
    names = ("shard_headers_kernel", "shard_statistics_kernel", "merge_shards_kernel", "logits_gradient_kernel")
    assert [kernels.count(name) for name in names] == [RANKS] * 4


def test_no_second_matrix_of_the_own_columns():
    """Beside the gradient nothing of their size is held, least of all in float32; kernels hold nothing at all."""
    batch = Batch(torch.bfloat16, 4096)
    one_pass = 4096 * OWN * 2
    held = []

    def own(rank, group):
        logits = batch.own(rank)
        if rank:
            batch.loss(logits, BOTH_TERMS, "portable", group).backward()
        else:
            held.append(peak_bytes(lambda: batch.loss(logits, BOTH_TERMS, "portable", group).backward()))

    in_ranks(RANKS, own)
    assert held[0] < one_pass * 1.6
