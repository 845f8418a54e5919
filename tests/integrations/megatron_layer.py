"""Megatron's output layer beside ours, and how Megatron is brought up in a process of `megatron_ranks`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import egpo_kernels as ek
from tests.integrations.ranks import RANKS
from tests.integrations.split_vocabulary import (
    PADDED,
    WIDTH,
    Problem,
    Sent,
    columns,
    make_problem,
    reduced,
    sent_by,
    told,
)


def megatron() -> tuple[Any, Any]:
    """Megatron's package of tensor-parallel parts, and the group."""
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    return tensor_parallel, parallel_state.get_tensor_model_parallel_group()


class Head(NamedTuple):
    """A rank's part of Megatron's output layer, and its part ``own`` of the hidden states ``[s, b, H]``."""

    problem: Problem
    layer: Any
    own: slice
    group: Any

    @property
    def states(self) -> int:
        """Bytes of all hidden states."""
        return 4 * WIDTH * self.problem.tokens

    def theirs(self, hidden: Tensor) -> Tensor:
        parts, _ = megatron()
        logits, _ = self.layer(hidden)
        tokens = self.problem.case.tokens.t().contiguous()
        return self.problem.loss(-parts.vocab_parallel_cross_entropy(logits, tokens).t())

    def ours(self, hidden: Tensor, **given: Any) -> Tensor:
        """Of hidden states ``[S, T, H]``."""
        return self.problem.our_linear_loss(hidden, self.layer.weight, vocab_group=self.group, **given)

    def check(self, loss_of: Callable[[Tensor], Tensor], forward: Sent, backward: Sent) -> None:
        """Loss and gradients, and what is sent."""
        hidden = self.problem.hidden.transpose(0, 1)[self.own].contiguous().requires_grad_()
        self.layer.weight.grad = None
        loss, sent = sent_by(lambda: loss_of(hidden))
        assert sent == forward, sent
        _, sent = sent_by(lambda: loss.backward(self.problem.case.upstream))
        assert sent == backward, sent
        part = {"weight": columns(), "hidden": (slice(None), self.own)}
        self.problem.hold(part, loss=loss, weight=self.layer.weight.grad, hidden=hidden.grad.transpose(0, 1))


def make_head(sequence_parallel: bool) -> Head:
    from megatron.core.model_parallel_config import ModelParallelConfig

    parts, group = megatron()
    problem = make_problem(ek.recipes.EGPO)
    given = {"use_cpu_initialization": True, "params_dtype": torch.float32}
    config = ModelParallelConfig(tensor_model_parallel_size=RANKS, sequence_parallel=sequence_parallel, **given)
    given = {"config": config, "init_method": lambda weight: weight.copy_(problem.weight), "bias": False}
    length, rank = problem.hidden.shape[1], dist.get_rank()
    own = slice(rank * length // RANKS, (rank + 1) * length // RANKS) if sequence_parallel else slice(None)
    return Head(problem, parts.ColumnParallelLinear(WIDTH, PADDED, **given), own, group)


def megatron_layer() -> None:
    """Gradients of weight and hidden states, and who sums the latter."""
    parts, _ = megatron()
    head = make_head(False)
    rows, summed = head.problem.tokens, [("all_reduce", head.states)]
    head.check(head.theirs, reduced(rows, 1, 1, 1), summed)
    head.check(lambda hidden: head.ours(hidden.transpose(0, 1)), [told(rows), *summed], [])
    # Next to our call: of a gradient that is not contiguous Megatron adds up a copy, and drops it.
    region = parts.copy_to_tensor_model_parallel_region
    partial = functools.partial(head.ours, hidden_grad="partial")
    head.check(lambda hidden: partial(region(hidden.transpose(0, 1))), [told(rows)], summed)


def megatron_layer_in_sequence() -> None:
    """With a part of the tokens on each rank, which Megatron gathers in backward again."""
    parts, _ = megatron()
    head = make_head(True)
    rows, gather, summed = (
        head.problem.tokens,
        [("all_gather", head.states // RANKS)],
        [("reduce_scatter", head.states)],
    )
    head.check(head.theirs, gather + reduced(rows, 1, 1, 1), gather + summed)
    ours = functools.partial(head.ours, sequence_parallel=True)
    head.check(lambda hidden: ours(hidden.transpose(0, 1)), [*gather, told(rows)], summed)
    region = parts.gather_from_sequence_parallel_region
    partial = functools.partial(head.ours, hidden_grad="partial")
    head.check(lambda hidden: partial(region(hidden).transpose(0, 1)), [*gather, told(rows)], summed)
