"""One EGPO step of a model that two processes split, and the same step of one: `python -m demo.tensor_parallel`.

SmolLM2-135M-Instruct: its MLPs, embeddings and output layer are split, the latter two over the vocabulary; its nine
attention heads are not. The exit code is 1 where the two steps differ by more than float32's rounding.
"""

import argparse
import math
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import rich.console
import torch
import torch.distributed as dist
from rich import box
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from demo.model import LanguageModel
from egpo_kernels import next_token_targets
from egpo_kernels.integrations.transformers import fuse_policy_loss

PROCESSES = 2
LEARNING_RATE = 0.001
GROUPS = {
    "Question: What is 7 + 5? Answer:": (" 12", " 13", " 75", " 12."),
    "Question: What is 9 - 4? Answer:": (" 5", " five", " 13", " 6"),
}
"""Prompts with their answers, of which the first is right."""
ROUNDING = 32 * torch.finfo(torch.float32).eps
"""Of a number, or of 1 where that is larger; each of two ways may lose half of it. Those of layers add up as errors do
that know nothing of each other: as the root of their number."""


NAMES = ("loss", "gradient norm", "log-prob of right answers", "the same after the step")


class Batch(NamedTuple):
    """Padded sequences, and what the loss is told of them."""

    ids: torch.Tensor
    attention: torch.Tensor
    policy: dict[str, torch.Tensor]


class Step(NamedTuple):
    """What one step found; log-probs are means over the tokens of the right answers."""

    loss: float
    gradient_norm: float
    right_before: float
    right_after: float


def make_batch(encode: Callable[[str], list[int]]) -> Batch:
    """All prompts with all their answers; a reward of 1 for the right one."""
    prompts = [(prompt, answer) for prompt, answers in GROUPS.items() for answer in answers]
    rows = [(encode(prompt), encode(answer)) for prompt, answer in prompts]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, inside, answered = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate(rows):
        both = len(prompt) + len(answer)
        ids[row, :both] = torch.tensor(prompt + answer)
        inside[row, :both] = answered[row, len(prompt) : both] = 1
    tokens, mask = next_token_targets(ids, answered.bool())
    groups = torch.arange(len(GROUPS)).repeat_interleave(len(rows) // len(GROUPS))
    rewards = torch.tensor([float(answer == GROUPS[prompt][0]) for prompt, answer in prompts])
    return Batch(ids, inside, {"tokens": tokens, "mask": mask, "groups": groups, "rewards": rewards})


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model with a part of its MLPs and vocabulary on each rank."""
    plan = {"lm_head": ColwiseParallel(), "model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    for number in range(model.config.num_hidden_layers):
        plan[f"model.layers.{number}.mlp.gate_proj"] = ColwiseParallel()
        plan[f"model.layers.{number}.mlp.up_proj"] = ColwiseParallel()
        plan[f"model.layers.{number}.mlp.down_proj"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)
    model.lm_head.weight = model.model.embed_tokens.weight  # which they were before each was split
    return model


def take_step(model: nn.Module, batch: Batch) -> Step:
    """Loss, gradient and update, by the model's own forward."""
    fuse_policy_loss(model)
    before = right_log_prob(model, batch)
    loss, _ = model(batch.ids, attention_mask=batch.attention, policy=batch.policy)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    whole = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in whole))
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    return Step(loss.item(), norm, before, right_log_prob(model, batch))


@torch.no_grad()
def right_log_prob(model: nn.Module, batch: Batch) -> float:
    policy = {name: batch.policy[name] for name in ("tokens", "mask")}
    log_probs = model(batch.ids, attention_mask=batch.attention, policy=policy).log_probs
    return log_probs[batch.policy["mask"] & (batch.policy["rewards"][:, None] > 0)].mean().item()


def process(rank: int, folder: Path) -> None:
    """Entry point of one of the two."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(max(1, torch.get_num_threads() // PROCESSES))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    batch = Batch(*torch.load(folder / "batch.pt"))
    found = take_step(split(model, init_device_mesh("cpu", (PROCESSES,))), batch)
    torch.save((tuple(found), peak_memory()), folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # a thread of gloo's that still runs aborts, now and then, a process that ends as usual


def peak_memory() -> float:
    """GiB that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def loaded(tiny: bool) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """A model in float32, and what turns text into its tokens: bytes, for a tiny one of random weights."""
    if not tiny:
        language = LanguageModel.load(fused_linear=False)
        return language.model, lambda text: language.tokenizer.encode(text, add_special_tokens=False)
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)), lambda text: [*text.encode()]


def report(alone: Step, ranks: list[Step], layers: int) -> bool:
    """Show what was found; whether it is the same."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "one process", f"{len(ranks)} processes", "difference", "allowed"):
        table.add_column(column, justify="right" if column else "left")
    alike = all(rank == ranks[0] for rank in ranks)
    right = alike
    for name, one, both in zip(NAMES, alone, ranks[0], strict=True):
        allowed = ROUNDING * math.sqrt(layers) * max(1.0, abs(one))
        right = right and abs(one - both) <= allowed
        table.add_row(name, f"{one:.7f}", f"{both:.7f}", f"{both - one:.1e}", f"{allowed:.1e}")
    console = rich.console.Console(highlight=False)
    console.print(table)
    console.print("Both processes found the same bits." if alike else "The processes found different numbers.")
    console.print(f"Allowed: 32 eps of float32, times the root of {layers} layers, of the number or of 1.")
    console.print("[green]The steps are the same." if right else "[red]The steps differ.")
    return right


def main() -> int:
    """Both steps; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.tensor_parallel", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small model of random weights, for a try in seconds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, encode = loaded(given.tiny)
        batch = make_batch(encode)
        model.save_pretrained(folder / "model")
        torch.save(tuple(batch), folder / "batch.pt")
        alone, layers = take_step(model, batch), model.config.num_hidden_layers
        del model
        torch.multiprocessing.spawn(process, (folder,), nprocs=PROCESSES)
        found = [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]
    right = report(alone, [Step(*step) for step, _ in found], layers)
    memory = ", ".join(f"{each:.1f}" for each in (peak_memory(), *(each for _, each in found)))
    print(f"Peak memory in GiB, of the one process and of each of the others: {memory}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
