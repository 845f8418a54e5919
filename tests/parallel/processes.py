"""What each of four gloo processes does in `test_processes`: what a thread cannot show, groups, meshes and DTensors."""

import datetime
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import egpo_kernels as ek
from tests.parallel.batch import CONFIG, LENGTH, RANKS, SEQUENCES, VOCAB, Batch, same_everywhere
from tests.support.accuracy import assert_bits, assert_rounding


def of_a_group(rank: int) -> None:
    """A process group or a mesh of one dimension; loss and metrics the same bits."""
    batch, own = Batch(VOCAB + 2), slice(8 * rank, 8 * (rank + 1))
    loss, gradient = batch.whole()
    for group in (dist.group.WORLD, init_device_mesh("cpu", (RANKS,))):
        logits = batch.logits[..., own].clone().requires_grad_()
        found, metrics = batch.loss(logits, vocab_group=group)
        found.backward()
        assert_rounding(found.detach(), loss)
        assert_rounding(logits.grad, gradient[..., own])
        for value in (found, *metrics.values()):
            same_everywhere(value)


def two_groups_of_two(rank: int) -> None:
    """Sequences over two groups, the vocabulary over two ranks of each: each loss is its group's own."""
    batch, mesh = Batch(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rows, half = slice(2 * (rank // 2), 2 * (rank // 2) + 2), slice(15 * (rank % 2), 15 * (rank % 2) + 15)
    _, gradient = batch.whole()
    logits = batch.logits[rows, :, half].clone().requires_grad_()
    loss, _ = batch.loss(logits, rows, vocab_group=mesh["tp"])
    loss.backward()
    same_everywhere(loss, mesh["tp"].get_group())
    assert_rounding(logits.grad, gradient[rows, :, half])
    with pytest.raises(ValueError, match="vocab_group is a DeviceMesh of 2 dimensions"):
        batch.loss(logits, rows, vocab_group=mesh)


def of_another_group(rank: int) -> None:
    """One that this rank is no member of."""
    batch, group = Batch(), dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(TypeError, match=r"vocab_group is .*; it must be a torch\.distributed\.ProcessGroup"):
            batch.loss(batch.logits, vocab_group=group)


def distributed_logits(rank: int) -> None:
    """Split by vocabulary, evenly or not, and by sequences: gradients come as the logits do."""
    loss, gradient = Batch().whole()
    mesh, line = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (RANKS,))
    ways = {
        "uneven": (line, [Shard(2)], slice(None)),  # 8, 8, 8, 6
        "by sequences too": (mesh, [Shard(0), Shard(2)], slice(2 * (rank // 2), 2 * (rank // 2) + 2)),
        "the other way round": (mesh, [Shard(2), Shard(0)], slice(2 * (rank % 2), 2 * (rank % 2) + 2)),
        "replicated": (mesh, [Replicate(), Shard(2)], slice(None)),
        "whole": (mesh, [Replicate(), Replicate()], slice(None)),
    }
    for name, (over, placements, rows) in ways.items():
        logits = distribute_tensor(Batch().logits, over, placements).requires_grad_()
        found, metrics = Batch().loss(logits, rows)
        found.backward()
        assert isinstance(logits.grad, DTensor) and logits.grad.placements == tuple(placements), name
        assert_rounding(logits.grad.full_tensor(), gradient)
        assert name in ("by sequences too", "the other way round") or torch.allclose(found, loss, rtol=1e-13)
        assert metrics.get("vocab_group/mismatched_ranks/sum", 0) == 0
    padded = distribute_tensor(
        torch.cat([Batch().logits, torch.full((SEQUENCES, LENGTH, 3), torch.nan)], -1), line, [Shard(2)]
    )
    padded.requires_grad_()
    Batch().loss(padded, vocab_size=VOCAB)[0].backward()
    assert_rounding(padded.grad.full_tensor()[..., :VOCAB], gradient)
    assert (padded.grad.full_tensor()[..., VOCAB:] == 0).all()


def distributed_and_refused(rank: int) -> None:
    """What no path is for says its placement; it never reaches a kernel."""
    batch, line = Batch(), init_device_mesh("cpu", (RANKS,))
    with pytest.raises(TypeError, match=r"logits is a DTensor with placements \(Partial\(sum\),\)"):
        batch.loss(DTensor.from_local(batch.logits, line, [Partial()]))
    split = distribute_tensor(batch.logits, line, [Shard(2)])
    with pytest.raises(ValueError, match="vocab_group is not the group over which logits is split"):
        batch.loss(split, vocab_group=dist.new_group(list(range(RANKS))))
    with pytest.raises(ValueError, match="vocab_start is 3 with a DTensor whose columns begin at"):
        batch.loss(split, vocab_start=3)
    wide = distribute_tensor(batch.weight, line, [Shard(1)])
    with pytest.raises(TypeError, match=r"weight is a DTensor with placements \(Shard\(dim=1\),\)"):
        batch.linear(batch.hidden, wide, vocab_group=line)
    with pytest.raises(ValueError, match="pass vocab_group, or, where it is sharded, call this inside the model's"):
        batch.linear(batch.hidden, distribute_tensor(batch.weight, line, [Shard(0)]))
    with pytest.raises(TypeError, match=r"hidden is a DTensor .* its width must not be split"):
        batch.linear(distribute_tensor(batch.hidden, line, [Shard(2)]), batch.weight)
    tokens = distribute_tensor(batch.tokens, line, [Shard(0)])
    plain = {"mask": batch.mask, "old_log_probs": batch.old}
    told = r"is a DTensor with placements .*; it must be a plain tensor, this rank's: pass its to_local\(\)"
    with pytest.raises(TypeError, match="tokens " + told):
        ek.logits_policy_loss(batch.logits, tokens, batch.advantages, **plain)
    with pytest.raises(TypeError, match="tokens " + told):
        ek.linear_token_log_probs(batch.hidden, batch.weight, tokens)
    for name, value in (("mask", batch.mask), ("old_log_probs", batch.old)):
        spread = {**plain, name: distribute_tensor(value, line, [Replicate()])}
        with pytest.raises(TypeError, match=f"{name} " + told):
            ek.logits_policy_loss(batch.logits, batch.tokens, batch.advantages, **spread)
    rewards = distribute_tensor((batch.advantages > 0).double(), line, [Shard(0)])
    with pytest.raises(TypeError, match="rewards " + told):
        ek.egpo_loss(batch.logits, batch.tokens, 2, rewards)
    with pytest.raises(TypeError, match="rewards " + told):
        ek.group_advantages(2, rewards, batch.old, batch.mask)
    with pytest.raises(TypeError, match="log_probs " + told):
        ek.policy_loss(distribute_tensor(batch.old, line, [Shard(0)]), None, batch.advantages)


def distributed_head(rank: int) -> None:
    """Weight Shard(0), hidden states whole: gradients as DTensors are, summed once, by us or by whoever asks for it."""
    batch, line = Batch(), init_device_mesh("cpu", (RANKS,))
    loss, of_hidden, of_weight = batch.whole_linear()
    for hidden_grad in (None, "all_reduce", "partial"):
        hidden = distribute_tensor(batch.hidden, line, [Replicate()]).requires_grad_()
        weight = distribute_tensor(batch.weight, line, [Shard(0)]).requires_grad_()
        found, _ = batch.linear(hidden, weight, hidden_grad=hidden_grad)
        found.backward()
        assert_rounding(found.detach(), loss)
        assert hidden.grad.placements == (Partial() if hidden_grad == "partial" else Replicate(),)
        assert weight.grad.placements == (Shard(0),)
        assert_rounding(weight.grad.full_tensor(), of_weight)
        assert_rounding(hidden.grad.full_tensor(), of_hidden)


def distributed_by_sequences_too(rank: int) -> None:
    """Hidden states split by sequences: a weight's gradient is the sum over these ranks, and says so."""
    batch, mesh = Batch(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rows = slice(2 * (rank // 2), 2 * (rank // 2) + 2)
    _, of_hidden, of_weight = batch.whole_linear()
    hidden = distribute_tensor(batch.hidden, mesh, [Shard(0), Replicate()]).requires_grad_()
    weight = distribute_tensor(batch.weight, mesh, [Replicate(), Shard(0)]).requires_grad_()
    batch.linear(hidden, weight, rows)[0].backward()
    assert weight.grad.placements == (Partial(), Shard(0)) and hidden.grad.placements == (Shard(0), Replicate())
    assert_rounding(weight.grad.full_tensor(), of_weight)
    assert_rounding(hidden.grad.full_tensor(), of_hidden)
    with pytest.raises(ValueError, match="hidden does not say which of its ranks have the same tokens"):
        batch.linear(batch.hidden[rows], weight, rows, vocab_group=mesh["tp"])


def sequence_parallel(rank: int) -> None:
    """Hidden states of a part of the tokens, padded or packed, plain or DTensor: gathered once, gradients scattered."""
    pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    batch, place = Batch(), rank % 2
    loss, of_hidden, of_weight = batch.whole_linear()
    half, own = slice(3 * place, 3 * place + 3), slice(15 * place, 15 * place + 15)
    hidden, weight = batch.hidden[:, half].clone().requires_grad_(), batch.weight[own].clone().requires_grad_()
    found, _ = batch.linear(hidden, weight, vocab_group=pair, sequence_parallel=True)
    found.backward()
    assert_rounding(found.detach(), loss)
    assert_rounding(hidden.grad, of_hidden[:, half])
    assert_rounding(weight.grad, of_weight[own])
    spread = distribute_tensor(batch.hidden, pair, [Shard(1)]).requires_grad_()
    split = distribute_tensor(batch.weight, pair, [Shard(0)]).requires_grad_()
    batch.linear(spread, split)[0].backward()
    assert spread.grad.placements == (Shard(1),)
    assert_rounding(spread.grad.full_tensor(), of_hidden)
    assert_rounding(split.grad.full_tensor(), of_weight)
    flat = batch.hidden.flatten(0, 1)[12 * place : 12 * place + 12].clone().requires_grad_()
    packed = {"cu_seqlens": LENGTH * torch.arange(SEQUENCES + 1), "vocab_group": pair, "sequence_parallel": True}
    given = {name: value.flatten() if isinstance(value, Tensor) else value for name, value in batch.given().items()}
    found, _ = ek.linear_policy_loss(
        flat, batch.weight[own], batch.tokens.flatten(), batch.advantages, config=CONFIG, **given, **packed
    )
    found.backward()
    assert_rounding(flat.grad, of_hidden.flatten(0, 1)[12 * place : 12 * place + 12])


def tied_embeddings(rank: int) -> None:
    """A rank's rows of a weight that embeds too: both gradients add up."""
    batch, own = Batch(VOCAB + 2), slice(8 * rank, 8 * (rank + 1))
    whole = batch.weight.clone().requires_grad_()
    scores = batch.hidden.flatten(0, 1) @ whole.t()
    (batch.linear(batch.hidden, whole).loss + scores.tanh().sum()).backward()
    weight = batch.weight[own].clone().requires_grad_()
    loss = batch.linear(batch.hidden, weight, vocab_group=dist.group.WORLD).loss
    (loss + (batch.hidden.flatten(0, 1) @ weight.t()).tanh().sum()).backward()
    assert_rounding(weight.grad, whole.grad[own])


def compiled(rank: int) -> None:
    """In one graph, with the same bits; by two ranks, since it takes its time."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    group = mesh.get_group()
    if rank > 1:
        return
    batch, own = Batch(), slice(15 * rank, 15 * rank + 15)

    def of_logits(logits: Tensor) -> ek.LossOutput:
        return batch.loss(logits, vocab_group=group)

    def of_hidden(hidden: Tensor) -> ek.LossOutput:
        return batch.linear(hidden, batch.weight[own], vocab_group=mesh)

    for function, values in ((of_logits, batch.logits[..., own]), (of_hidden, batch.hidden)):
        results = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaf = values.clone().requires_grad_()
            loss, metrics = run(leaf)
            loss.backward()
            results.append([loss.detach(), leaf.grad, *metrics.values()])
        for one, other in zip(*results, strict=True):
            assert_bits(one, other, "compiled")


def one_rank_with_another_mask(rank: int) -> None:
    """NaN everywhere, over a transport that would wait for sizes that differ."""
    batch, own = Batch(VOCAB + 2), slice(8 * rank, 8 * (rank + 1))
    if rank == 2:
        batch.mask = batch.mask.clone()
        batch.mask[0] = ~batch.mask[0]
    group, chunks = dist.group.WORLD, {"max_chunk_bytes": 2000}
    hidden = batch.hidden.clone().requires_grad_()
    found = batch.linear(
        hidden, batch.weight[own].clone().requires_grad_(), vocab_group=group, num_tokens=None, **chunks
    )
    for loss, metrics in (batch.loss(batch.logits[..., own], vocab_group=group, num_tokens=None), found):
        assert loss.isnan() and metrics["vocab_group/mismatched_ranks/sum"] == 1
    found.loss.backward()
    assert hidden.grad.isnan().any()


def ranks_with_other_sizes(rank: int) -> None:
    """With EGPO_KERNELS_DEBUG_GROUPS=1 every rank is told, instead of waiting."""
    batch, own, few = Batch(VOCAB + 2), slice(8 * rank, 8 * (rank + 1)), slice(0, 4 - (rank == 3))
    os.environ["EGPO_KERNELS_DEBUG_GROUPS"] = "1"
    try:
        with pytest.raises(
            ValueError, match=r"tokens' shape is .* on rank \d of vocab_group; all ranks must come with the same"
        ):
            batch.loss(batch.logits[few][..., own], few, vocab_group=dist.group.WORLD)
    finally:
        del os.environ["EGPO_KERNELS_DEBUG_GROUPS"]


WAYS = {
    way.__name__: way
    for way in (
        of_a_group, two_groups_of_two, of_another_group, distributed_logits, distributed_and_refused, distributed_head,
        distributed_by_sequences_too,
        sequence_parallel, tied_embeddings, compiled, one_rank_with_another_mask, ranks_with_other_sizes,
    )
}  # fmt: skip


def start(rank: int, folder: Path) -> None:
    """Entry point of a process: all ways one after the other, and what went wrong into a file for each."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    for name, way in WAYS.items():
        try:
            way(rank)
            dist.barrier()
        except BaseException:
            (folder / f"{name}.{rank}").write_text(traceback.format_exc())
    # One that ends as usual is now and then aborted by a thread of gloo's that still runs.
    os._exit(0)
