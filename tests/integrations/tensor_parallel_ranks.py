"""What each process does in `test_tensor_parallel`: one model by torch's and transformers' ways to split its head."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
)

from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import assert_same, fused
from tests.integrations.ranks import RANKS, announce, leave
from tests.integrations.split_models import check, loaded, pair, split, step
from tests.integrations.wrappers import halved, patch
from tests.support.page import blocks


def start(rank: int, folder: Path, ways: list[str]) -> None:
    """Entry point of a process: one way after the other, for starting takes longer than all of them."""
    announce(rank, 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for way in ways:
        try:
            WAYS[way](folder / way.replace(" ", "-"))
        except Exception as error:
            raise AssertionError(way) from error
    leave()


def by_torch(name: str = "Llama", sequence: bool = False, **head: Any) -> Callable[[Path], None]:
    """Fused after it was split, and before."""

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


def by_transformers(style: str | None, name: str = "Llama", vocab: int = 62) -> Callable[[Path], None]:
    """Loaded by its own plan, or with a style for the head."""

    def run(folder: Path) -> None:
        plain, model, batch = pair(name, vocab_size=vocab, num_key_value_heads=2)
        model = loaded(plain, folder, "auto" if style is None else plain.tp_plan | {"lm_head": style})
        if plain.config.tie_word_embeddings and not isinstance(model.lm_head.weight, DTensor):
            # Versions that leave it whole, and sum the gradient of hidden states all the same.
            with pytest.raises(ValueError, match=r"62 rows on rank . of 2, .* leave lm_head out of tp_plan"):
                fuse_policy_loss(model)(batch.ids, policy=batch.policy)
            return
        check(plain, model, batch)

    return run


def sharded_too(folder: Path) -> None:
    """FSDP2 over it, along another dimension of a mesh."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    for name, first in (("Llama", True), ("Qwen3", False)):
        plain, model, batch = pair(name, vocab_size=62)
        split(model, mesh["tp"], output_layouts=Replicate())
        if first:
            fuse_policy_loss(model)
        for unit in (*model.model.layers, *([model.lm_head] if first else []), model):
            fully_shard(unit, mesh=mesh["dp"])
        assert model.lm_head.weight.device_mesh.ndim == 2
        check(plain, model, batch)


def whole_head(folder: Path) -> None:
    """Of a model that is split elsewhere: as it is, and with tokens brought together before it."""
    mesh = init_device_mesh("cpu", (RANKS,))
    plain, model, batch = pair()
    split(model, mesh, head=None)
    check(plain, model, batch)
    plain, model, batch = pair()
    bring = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True)
    check(plain, split(model, mesh, sequence=True, head=bring), batch)
    plain, model, batch = pair()
    parted = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(-1))
    check(plain, split(model, mesh, head=parted), batch)


def generates(folder: Path) -> None:
    """Answers as before."""
    plain, model, batch = pair()
    split(model, init_device_mesh("cpu", (RANKS,)), output_layouts=Replicate())
    fuse_policy_loss(model)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(batch.ids, **options), plain.generate(batch.ids, **options))
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert_same(step(model, batch, plain), fused(plain, batch))
    assert seen[-1] == (1, 1, 1)


def documented(folder: Path) -> None:
    """The page's own code."""
    plain, model, batch = pair()
    names = {"model": model, "mesh": init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))}
    names |= {"fuse_policy_loss": fuse_policy_loss, "policy": batch.policy}
    exec(blocks("docs/transformers.md")[1], names | {"input_ids": batch.ids, "attention_mask": batch.attention})
    assert model.lm_head.weight.grad.placements == (Shard(0),)
    model.zero_grad()
    check(plain, model, batch)


def around_a_forward(folder: Path) -> None:
    """A style of later versions around a head that is fused already, and within what is not known."""
    styles = pytest.importorskip("transformers.distributed.tensor_parallel")
    mesh, plan = (
        init_device_mesh("cpu", (RANKS,)),
        dict.fromkeys(("lm_head.weight", "lm_head"), "colwise_gather_output"),
    )
    plain, model, batch = pair()
    check(plain, styles.apply_tensor_parallelism(fuse_policy_loss(model), mesh, plan), batch)
    _, model, _ = pair()
    patch(styles.apply_tensor_parallelism(model, mesh, plan).lm_head, halved)
    with pytest.raises(ValueError, match=r"head\.forward is tests\.integrations\.wrappers\.halved"):
        fuse_policy_loss(model)


def refused(folder: Path) -> None:
    """Alike on all ranks, and before any waits for another."""
    mesh, (_, model, batch) = init_device_mesh("cpu", (RANKS,)), pair()
    fuse_policy_loss(split(model, mesh))
    for name in ("vocab_group", "vocab_start", "hidden_grad", "sequence_parallel"):
        with pytest.raises(TypeError, match=f"policy has '{name}'; its keys must be arguments of linear_policy_loss"):
            model(batch.ids, policy=batch.policy | {name: None})
    model.lm_head._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match=r"weight is a DTensor .* nothing says that its ranks have the same tokens"):
        model(batch.ids, policy=batch.policy)

    rows = fuse_policy_loss(split(pair()[1], mesh, head=RowwiseParallel(input_layouts=Replicate())))
    with pytest.raises(TypeError, match=r"weight is a DTensor .*Shard\(dim=1\).* must be split over dimension 0"):
        rows(batch.ids, policy=batch.policy)
    _, model, _ = pair()
    distribute_module(model.lm_head, mesh, lambda name, module, mesh: None, output_fn=doubled)
    with pytest.raises(ValueError, match=r"tensor_parallel_ranks\.doubled changes what the head returns"):
        fuse_policy_loss(model)
    model = fuse_policy_loss(split_twice(pair()[1]))
    with pytest.raises(ValueError, match=r"in its forward; it must be split by a mesh of one dimension: mesh\['tp'\]"):
        model(batch.ids, policy=batch.policy)


def doubled(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return output * 2


def split_twice(model: nn.Module) -> nn.Module:
    """A head on a mesh of two dimensions, by torch's own hooks."""
    mesh, both = init_device_mesh("cpu", (1, RANKS)), (Replicate(), Replicate())

    def part(name: str, head: nn.Module, mesh: DeviceMesh) -> None:
        head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Replicate(), Shard(0)]))

    hooks = ColwiseParallel._prepare_input_fn, ColwiseParallel._prepare_output_fn
    distribute_module(
        model.lm_head, mesh, part, functools.partial(hooks[0], both, both), functools.partial(hooks[1], both, True)
    )
    return model


def refused_plans(folder: Path) -> None:
    """Of transformers, and adapters on a head that is split."""
    plain, _, _ = pair(vocab_size=62, num_key_value_heads=2)
    model = loaded(plain, folder, plain.tp_plan | {"lm_head": "rowwise"})
    with pytest.raises(ValueError, match=r"the head's style in tp_plan is a transformers.*RowwiseParallel; it must be"):
        fuse_policy_loss(model)
    peft = pytest.importorskip("peft")
    _, model, _ = pair()
    split(model, init_device_mesh("cpu", (RANKS,)))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"within the head, around Linear, stands torch\.distributed\.tensor"):
        fuse_policy_loss(model)


WAYS = {
    "local": by_torch(),
    "local whole": by_torch("Gemma2", output_layouts=Replicate()),
    "parts": by_torch("Granite", use_local_output=False),
    "whole": by_torch("Cohere", output_layouts=Replicate(), use_local_output=False),
    "tied": by_torch("Qwen3", output_layouts=Replicate()),
    "sequence local": by_torch(sequence=True, input_layouts=Shard(1)),
    "sequence whole": by_torch("Qwen3", sequence=True, input_layouts=Shard(1), output_layouts=Replicate()),
    "transformers": by_transformers(None),
    "transformers colwise": by_transformers("colwise", "Gemma2"),
    "transformers gathered": by_transformers("colwise_gather_output", "Granite"),
    "transformers uneven": by_transformers("colwise", vocab=61),
    "transformers tied": by_transformers("colwise", "Qwen3"),
    "sharded too": sharded_too,
    "whole head": whole_head,
    "generates": generates,
    "documented": documented,
    "refused": refused,
    "refused plans": refused_plans,
}
STYLES = "transformers.distributed.tensor_parallel"
if importlib.util.find_spec(STYLES):  # later versions
    WAYS["around a forward"] = around_a_forward
