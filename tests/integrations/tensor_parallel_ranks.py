"""What each process does in `test_tensor_parallel`: one model by torch's and transformers' ways to split its head."""

import contextlib
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import Batch, Result, assert_same, fused, make_batch, make_model
from tests.integrations.ranks import leave
from tests.support.accuracy import assert_bits, assert_rounding

RANKS = 2
EVEN = {"vocab_size": 62, "num_key_value_heads": 2}
"""What transformers can split over two ranks and gather again."""


def start(rank: int, folder: Path, ways: list[str], ranks: int = RANKS) -> None:
    """Entry point of a process: one way after the other, for starting takes longer than all of them."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in names.items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for way in ways:
        try:
            WAYS[way](folder / way.replace(" ", "-"))
        except Exception as error:
            raise AssertionError(way) from error
    leave()


def pair(name: str = "Llama", **more: Any) -> tuple[nn.Module, nn.Module, Batch]:
    """Twice the same model, in float64, and a batch of an even number of tokens."""
    model = make_model(name, **more)
    batch = make_batch(model).double()
    policy = {name: value[:, :8] if value_of_tokens(value) else value for name, value in batch.policy.items()}
    batch = Batch(batch.ids[:, :8], batch.attention[:, :8], policy)
    return model.double(), copy.deepcopy(model), batch


def value_of_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def split(model: nn.Module, mesh: DeviceMesh, sequence: bool = False, **head: Any) -> nn.Module:
    """Torch's tensor parallelism of embeddings, MLPs and head; ``sequence``: the last norm is over parts of tokens."""
    plan = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), "lm_head": ColwiseParallel(**head)}
    for number, _ in enumerate(model.model.layers):
        plan[f"model.layers.{number}.mlp.gate_proj"] = plan[f"model.layers.{number}.mlp.up_proj"] = ColwiseParallel()
        plan[f"model.layers.{number}.mlp.down_proj"] = RowwiseParallel()
    if sequence:
        plan[f"model.layers.{number}"] = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1)
        )
        plan["model.norm"] = SequenceParallel(use_local_output=True)
    parallelize_module(model, mesh, plan)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def whole(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient of a parameter of all ranks: of a DTensor, or of parts that its model knows as such."""
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    if gradient.shape == like.shape:
        return gradient
    parts: list[Any] = [None] * RANKS
    dist.all_gather_object(parts, gradient)
    dim = next(dim for dim, size in enumerate(like.shape) if size != gradient.shape[dim])
    return torch.cat(parts, dim)


def step(model: nn.Module, batch: Batch, plain: nn.Module) -> Result:
    """What all ranks find together, which they must find alike."""
    output = model(batch.ids, attention_mask=batch.attention, policy=batch.policy)
    output.loss.backward()
    metrics = dict(output.metrics)
    assert not metrics.pop("vocab_group/mismatched_ranks/sum", 0)
    same_bits(torch.stack([output.loss.detach(), *metrics.values()]))
    likes = dict(plain.named_parameters())
    gradients = {name: whole(value.grad, likes[name]) for name, value in model.named_parameters()}
    model.zero_grad()
    return Result(output.loss.detach(), metrics, gradients)


def same_bits(value: Tensor) -> None:
    """All ranks of the world have this value."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value.detach())
    for rank, part in enumerate(parts):
        assert_bits(part, value.detach(), f"rank {rank}")


def check(plain: nn.Module, model: nn.Module, batch: Batch, collectives: int = 0) -> None:
    """A fused model finds what one process finds with a whole one, and is as before without a policy."""
    before = logits_of(model, batch)
    with CommDebugMode() as seen:
        fuse_policy_loss(model)
    assert seen.get_total_counts() == collectives
    assert_bits(logits_of(model, batch), before, "logits")
    assert_same(step(model, batch, plain), fused(plain, batch))
    for keep in ({}, {"logits_to_keep": 3}, {"logits_to_keep": batch.policy["mask"]}):
        check_log_probs(plain, model, batch, keep)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits = model(batch.ids, attention_mask=batch.attention).logits
    return logits.to_local() if isinstance(logits, DTensor) else logits


@torch.no_grad()
def check_log_probs(plain: nn.Module, model: nn.Module, batch: Batch, keep: dict[str, Any]) -> None:
    """Without a gradient, and of some positions."""
    tokens = batch.policy["tokens"]
    if keep:
        chosen = keep["logits_to_keep"]
        tokens = tokens[chosen] if isinstance(chosen, Tensor) else tokens[:, -chosen:]
    policy = {"tokens": tokens, "return_entropy": True, "vocab_size": 60, "mask": (tokens >= 0) & (tokens < 60)}
    found, expected = (each(batch.ids, policy=policy, **keep) for each in (model, plain))
    for one, other in zip(found, expected, strict=True):
        same_bits(one)
        assert_rounding(one, other)


def by_torch(name: str = "Llama", sequence: bool = False, **head: Any) -> Callable[[Path], None]:
    """Fused after it was split, and, last, before."""

    def run(folder: Path) -> None:
        mesh = init_device_mesh("cpu", (RANKS,))
        plain, model, batch = pair(name)
        check(plain, split(model, mesh, sequence, **head), batch)
        assert model.lm_head.weight.placements == (Shard(0),)
        model(batch.ids, policy=batch.policy).loss.backward()
        assert model.lm_head.weight.grad.placements == (Shard(0),)
        plain, model, batch = pair(name)
        split(fuse_policy_loss(model), mesh, sequence, **head)
        assert_same(step(model, batch, plain), fused(plain, batch))

    return run


WAYS = {
    "local": by_torch(),
    "local whole": by_torch("Gemma2", output_layouts=Replicate()),
    "parts": by_torch("Granite", use_local_output=False),
    "whole": by_torch("Cohere", output_layouts=Replicate(), use_local_output=False),
    "tied": by_torch("Qwen3", output_layouts=Replicate()),
    "sequence local": by_torch(sequence=True, input_layouts=Shard(1)),
    "sequence whole": by_torch("Qwen3", sequence=True, input_layouts=Shard(1), output_layouts=Replicate()),
}
