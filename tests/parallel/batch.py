"""A batch that every process has alike, and its results in one piece."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import egpo_kernels as ek
from tests.support.accuracy import assert_bits

RANKS = 4
SEQUENCES, LENGTH, VOCAB, WIDTH = 4, 6, 30, 5
CONFIG = ek.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.05)


class Batch:
    """The same on every rank, in float64, so that only rounding is left to compare."""

    def __init__(self, vocab: int = VOCAB, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (SEQUENCES, LENGTH)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.logits, self.hidden, self.weight = 2 * normal(*shape, vocab), normal(*shape, WIDTH), normal(vocab, WIDTH)
        self.tokens = torch.randint(vocab, shape, generator=generator)
        self.mask = torch.rand(shape, generator=generator) < 0.8
        self.old, self.ref = -3 * torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        self.advantages, self.num_tokens = normal(SEQUENCES), int(self.mask.sum())

    def given(self, rows: slice = slice(None)) -> dict[str, Any]:
        """What is per token or per sequence."""
        counts = {"num_tokens": self.num_tokens}
        return {"mask": self.mask[rows], "old_log_probs": self.old[rows], "ref_log_probs": self.ref[rows], **counts}

    def loss(self, logits: Tensor, rows: slice = slice(None), **options: Any) -> ek.LossOutput:
        """Of logits."""
        first = (logits, self.tokens[rows], self.advantages[rows])
        return ek.logits_policy_loss(*first, config=CONFIG, **{**self.given(rows), **options})

    def linear(self, hidden: Tensor, weight: Tensor, rows: slice = slice(None), **options: Any) -> ek.LossOutput:
        """Of hidden states."""
        first = (hidden, weight, self.tokens[rows], self.advantages[rows])
        return ek.linear_policy_loss(*first, config=CONFIG, **{**self.given(rows), **options})

    def whole(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient of all logits in this process."""
        logits = self.logits.clone().requires_grad_()
        loss = self.loss(logits).loss
        loss.backward()
        assert logits.grad is not None
        return loss.detach(), logits.grad

    def whole_linear(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients of hidden states and weight."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        loss = self.linear(hidden, weight).loss
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad


def same_everywhere(value: Tensor, group: Any = None) -> None:
    """The same bits on all ranks of a group."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value.detach(), group=group)
    for other in found:
        assert_bits(other, found[0], "among ranks")
