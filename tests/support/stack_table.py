"""The table of training stacks, with the lines of each adapter: python -m tests.support.stack_table"""

from typing import NamedTuple

from tests.support.page import ROOT, draw, markdown

HEADER = ["stack", "version", "what was run, on a CPU", "adapter", "lines"]


class Stack(NamedTuple):
    """A training stack; its adapter is ``files`` of ``egpo_kernels/integrations``."""

    name: str
    page: str
    version: str
    ran: str
    files: tuple[str, ...] = ()


STACKS = (
    Stack(
        "TRL", "trl", "1.16.0",
        "whole runs, compared with stock `GRPOTrainer` step by step: every loss type, options, LoRA, two processes",
        ("trl.py", "trl_options.py", "trl_records.py"),
    ),
    Stack(
        "verl", "verl", "0.9.1",
        "its registry, its trainers' `compute_advantage`, its `ppo_loss`, its hydra config, a step of its FSDP2 worker",
        ("verl.py", "verl_losses.py"),
    ),
    Stack(
        "transformers", "transformers", "5.10.4, 5.24.0",
        "seven architectures, peft, accelerate, `torch.compile`, hooks; two processes: FSDP2, DDP, tensor parallelism",
        ("transformers.py", "fused_call.py", "heads.py", "probe.py", "surroundings.py", "tensor_parallel.py"),
    ),
    Stack("OpenRLHF", "openrlhf", "0.11.2", "its `PolicyLoss`, its experience maker", ("openrlhf.py",)),
    Stack("SkyRL", "skyrl", "0.3.0", "its registry, its losses and reductions, its trainer and batch"),
    Stack("AReaL", "areal", "1.0.4", "its actor, its losses, its packing (`make apart`)"),
    Stack("ms-swift", "ms_swift", "4.6.0", "methods of its `GRPOTrainer` (`make apart`)"),
    Stack(
        "slime", "slime", "source", "the adapter, on lists and logits like slime's; slime itself was not run",
        ("slime.py",),
    ),
    Stack("prime-rl", "prime_rl", "source", "the page's code, on stand-ins for prime-rl; prime-rl itself was not run"),
    Stack("NeMo-RL", "nemo_rl", "source", "the page's code, on stand-ins for NeMo-RL; NeMo-RL itself was not run"),
    Stack("PyTorch, accelerate", "pytorch", "2.13.0, 1.15.0", "the page's loops"),
)  # fmt: skip


def lines(file: str) -> int:
    return len((ROOT / "egpo_kernels" / "integrations" / file).read_text().splitlines())


def stack_table() -> str:
    """The table in Markdown."""
    rows = [HEADER]
    for stack in STACKS:
        files = ", ".join(f"`integrations/{file}`" for file in stack.files) or "none: the page's code"
        count = " + ".join(str(lines(file)) for file in stack.files)
        rows.append([f"[{stack.name}]({stack.page}.md)", stack.version, stack.ran, files, count or "-"])
    return markdown(rows)


if __name__ == "__main__":
    draw("stacks", stack_table())
