"""Launch each kernel over logits once, at a size that no cache holds: what `benchmarks.gpu.dram` has counted.

python -m benchmarks.gpu.logits_kernels cuda 8192 151936
"""

import sys
from typing import NamedTuple

import torch

from benchmarks.batches import Batch
from benchmarks.providers import our_log_probs, our_loss


class Case(NamedTuple):
    """A launch: its kernel, what it is for, and the passes over the logits it should cost."""

    kernel: str
    what: str
    reads: int
    writes: int


# In the order of the launches below.
CASES = (
    Case("logits_policy_loss_kernel", "loss and gradient", 1, 1),
    Case("rescale_kernel", "upstream as expected", 0, 0),
    Case("logits_policy_loss_kernel", "loss and gradient, in place", 1, 1),
    Case("rescale_kernel", "another upstream", 1, 1),
    Case("row_statistics_kernel", "log-probs and entropy", 1, 0),
    Case("logits_gradient_kernel", "gradient of log-probs", 1, 1),
)


def main(device: str = "cuda", tokens: str = "8192", vocab: str = "151936") -> None:
    """Launch them through the public functions, as a trainer would."""
    generator = torch.Generator(device).manual_seed(0)
    sequences = 8
    shape = (sequences, int(tokens) // sequences)
    logits = torch.empty(*shape, int(vocab), dtype=torch.bfloat16, device=device).normal_(generator=generator)
    chosen = torch.randint(int(vocab), shape, generator=generator, device=device)
    advantages = torch.linspace(-1, 1, sequences, device=device)
    batch = Batch(chosen, logits=logits.requires_grad_(), advantages=advantages)
    torch.autograd.grad(our_loss(batch, backend="triton"), batch.logits)
    torch.autograd.grad(3 * our_loss(batch, inplace_grad=True, backend="triton"), batch.logits)
    found = our_log_probs(batch, entropy=True, backend="triton")
    torch.autograd.grad(found.log_probs.sum(), batch.logits)
    print("every kernel over logits was launched")


if __name__ == "__main__":
    main(*sys.argv[1:])
