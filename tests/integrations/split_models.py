"""Models that are split over the ranks of two processes, and what these must find together and alike."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import Batch, Result, assert_same, fused, make_batch, make_model
from tests.integrations.ranks import RANKS
from tests.support.accuracy import assert_bits, assert_rounding


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
    """Torch's tensor parallelism of embeddings, MLPs and head; ``sequence``: the last norm is over parts of tokens.

    ``head``: another style in place of `ColwiseParallel`, or None, or options of that.
    """
    plan: dict[str, Any] = {"lm_head": head["head"] if "head" in head else ColwiseParallel(**head)}
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    if plan["lm_head"] is None:
        del plan["lm_head"]
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


def loaded(plain: nn.Module, folder: Path, plan: Any) -> nn.Module:
    """A model read by all ranks, each its part."""
    if dist.get_rank() == 0:
        plain.save_pretrained(folder)
    dist.barrier()
    return type(plain).from_pretrained(folder, tp_plan=plan, tp_size=RANKS, dtype=torch.float64).eval()


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


def check(plain: nn.Module, model: nn.Module, batch: Batch) -> None:
    """A fused model finds what one process finds with a whole one, and is as before without a policy."""
    before = logits_of(model, batch)
    with CommDebugMode() as seen:
        fuse_policy_loss(model)
    assert seen.get_total_counts() == 0
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
