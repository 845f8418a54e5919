"""What each of two processes does in `test_sharding`: its half of a batch, under the names of ways to wrap a model."""

import os
import socket
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import egpo_kernels as ek
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import Batch, Result, assert_same, fused, make_batch, make_model
from tests.support.accuracy import assert_rounding

RANKS = 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def announce(rank: int, port: int) -> None:
    """Say which process this is, to libraries that start torch.distributed themselves."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def leave() -> None:
    """End a process: one that ends as usual is now and then aborted by a thread of gloo's that still runs."""
    dist.barrier()
    os._exit(0)


def start(rank: int, folder: Path, ways: list[str]) -> None:
    """Entry point of a process: one after the other, for starting takes longer than all of them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for way in ways:
        try:
            WAYS[way](rank)
        except Exception as error:
            raise AssertionError(way) from error
    leave()


def shard(model: nn.Module, way: str, **options: object) -> nn.Module:
    """Layers apart, and the head with the root, alone or with the norm before it."""
    mesh = init_device_mesh("cpu", (RANKS,))
    units = {"root": [], "head": [model.lm_head], "norm and head": [[model.model.norm, model.lm_head]]}[way]
    for unit in (*model.model.layers, *units):
        fully_shard(unit, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def half(batch: Batch, rank: int) -> Batch:
    """One rank's sequences, in a loss over all of them; what is averaged over ranks is that much larger."""
    mine = slice(2 * rank, 2 * rank + 2)
    policy = {name: value[mine] if isinstance(value, Tensor) else value for name, value in batch.policy.items()}
    policy |= {"num_tokens": batch.policy["mask"].sum(), "num_sequences": 4, "grad_scale": RANKS}
    return Batch(batch.ids[mine], batch.attention[mine], policy)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(model: nn.Module, batch: Batch, rank: int) -> Result:
    """The loss of all ranks, and their averaged gradients by the names of the model inside."""
    mine = half(batch, rank)
    output = model(mine.ids, attention_mask=mine.attention, policy=mine.policy)
    (RANKS * output.loss).backward()
    loss = output.loss.detach().clone()
    dist.all_reduce(loss)
    names = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    return Result(loss, {}, {name: whole(parameter.grad) for name, parameter in names.items()})


def check(model: nn.Module, wrapped: nn.Module, batch: Batch, rank: int) -> None:
    """What all ranks find together is what one process finds."""
    expected = fused(model, batch)._replace(metrics={})
    assert_same(step(wrapped, batch, rank), expected)


def pair() -> tuple[nn.Module, nn.Module, Batch]:
    """Twice the same model, in float64, and a batch."""
    batch = make_batch(make_model()).double()
    return make_model().double(), make_model().double(), batch


def fsdp(way: str, last: bool) -> object:
    def run(rank: int) -> None:
        plain, model, batch = pair()
        wrapped = fuse_policy_loss(shard(model, way)) if last else shard(fuse_policy_loss(model), way)
        check(plain, wrapped, batch, rank)
        outside(model, batch)

    return run


def outside(model: nn.Module, batch: Batch) -> None:
    """Between calls the head is sharded, and its weight is refused."""
    hidden = torch.zeros(*batch.ids.shape, model.config.hidden_size, dtype=torch.float64)
    model.reshard()
    with pytest.raises(ValueError, match=r"weight is a DTensor .* where it is sharded, call this inside the model's"):
        ek.linear_policy_loss(hidden, model.lm_head.weight, batch.policy["tokens"], batch.policy["advantages"])


def mixed_precision(rank: int) -> None:
    """Weights of 16 bits: inputs are cast too, but not what is compared with log-probs."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    batch = half(make_batch(make_model()), rank)
    late = fuse_policy_loss(shard(make_model(), "head", mp_policy=policy))
    found = late(batch.ids, attention_mask=batch.attention, policy=batch.policy)
    logits = late(batch.ids, attention_mask=batch.attention).logits
    assert logits.dtype == torch.bfloat16
    expected = ek.logits_policy_loss(logits, backend="reference", **batch.policy)
    assert_rounding(found.loss, expected.loss)
    early = shard(fuse_policy_loss(make_model()), "head", mp_policy=policy)
    with pytest.raises(TypeError, match=r"has dtype torch.bfloat16; .* fuse the model after fully_shard"):
        early(batch.ids, attention_mask=batch.attention, policy=batch.policy)
    found = early(batch.ids, attention_mask=batch.attention, policy=MappingProxyType(batch.policy))
    assert_rounding(found.loss, expected.loss)


def ddp(rank: int) -> None:
    plain, model, batch = pair()
    check(plain, DistributedDataParallel(fuse_policy_loss(model)), batch, rank)


WAYS = {
    f"fsdp: head {how} {way}, fused {'last' if last else 'first'}": fsdp(way, last)
    for way, how in (("root", "with"), ("head", "by"), ("norm and head", "in"))
    for last in (True, False)
} | {"fsdp: mixed precision": mixed_precision, "ddp": ddp}
