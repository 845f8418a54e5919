"""Hidden states that every rank of a split output layer has, or has a part of, and their gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from egpo_kernels.config.fields import check_bool
from egpo_kernels.inputs.validation import check_choice, is_distributed
from egpo_kernels.parallel.exchange import add_up_, gather, scatter_sum
from egpo_kernels.parallel.reading import describe, local, read_placement
from egpo_kernels.parallel.shard import Shard

GRADIENTS = ("all_reduce", "reduce_scatter", "partial")


class _GatherSequence(torch.autograd.Function):
    """Rows of all ranks along dimension ``dim``; each gets the sum of all ranks' gradients of its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dim: int, group: str, size: int) -> Tensor:
        ctx.options = (dim, group, size)
        return gather(hidden, group, size).arrived().movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dim, group, size = ctx.options
        return scatter_sum(gradient.unflatten(dim, (size, -1)).movedim(dim, 0), group, size), None, None, None


class _SumGradient(torch.autograd.Function):
    """The same tensor; its gradient is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str, size: int) -> Tensor:
        ctx.options = (group, size)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return add_up_(gradient.clone(memory_format=torch.contiguous_format), *ctx.options).arrived(), None, None


def with_summed_gradient(values: Tensor, shard: Shard) -> Tensor:
    """A tensor that all ranks have alike, of whose gradient each makes a part."""
    return _SumGradient.apply(values, shard.group, shard.size)


def read_parts(hidden: Any, hidden_grad: Any, sequence_parallel: Any, group: str | None) -> tuple[Any, str]:
    """This rank's tensor of hidden states, and which of `GRADIENTS` it gets.

    A part of the rows gets ``reduce_scatter``; a DTensor that ``group`` splits by rows is one.
    """
    sequence_parallel = check_bool("sequence_parallel", sequence_parallel)
    if hidden_grad is not None:
        hidden_grad = check_choice("hidden_grad", hidden_grad, GRADIENTS)
    if is_distributed(hidden):
        hidden, sequence_parallel = _local(hidden, group, hidden_grad, sequence_parallel)
    mode = hidden_grad or ("reduce_scatter" if sequence_parallel else "all_reduce")
    if (mode == "reduce_scatter") != sequence_parallel:
        raise ValueError(
            f"hidden_grad is {mode!r} with sequence_parallel={sequence_parallel}; it must be 'reduce_scatter' where "
            "hidden is a part of the rows (sequence_parallel=True), and nowhere else: leave it out"
        )
    if sequence_parallel and group is None:
        raise ValueError("sequence_parallel is True and vocab_group is None; it must be the group that splits the rows")
    return hidden, mode


def _local(hidden: Any, group: str | None, hidden_grad: str | None, sequence_parallel: bool) -> tuple[Tensor, bool]:
    """This rank's tensor of a DTensor, and whether ``group`` splits it by rows."""
    rows = tuple(range(hidden.dim() - 1))
    if not all(placement.is_replicate() or placement.is_shard() for placement in hidden.placements):
        raise TypeError(f"hidden is {describe(hidden)}; it must be Replicate() or Shard(): redistribute it")
    if read_placement("hidden", hidden, -1, rows).group is not None:
        raise TypeError(f"hidden is {describe(hidden)}; its width must not be split: redistribute it")
    mesh = hidden.device_mesh
    split = [dim for dim, placement in enumerate(hidden.placements) if placement.is_shard()]
    names = [mesh.get_group(dim).group_name for dim in split]
    over = group is not None and group in names
    if over and hidden.placements[split[names.index(group)]].dim != hidden.dim() - 2:
        raise TypeError(
            f"hidden is {describe(hidden)}; vocab_group must split it by tokens, dimension {hidden.dim() - 2}"
        )
    if hidden_grad == "partial" and group is not None and not over:
        summed = tuple(dim for dim in range(mesh.ndim) if mesh.get_group(dim).group_name == group)
        return local(hidden, summed), sequence_parallel
    return hidden.to_local(), sequence_parallel or over


def check_parts(hidden: Any, tokens: Any, shard: Shard) -> None:
    """Raise where the ranks' parts do not make as many rows as there are tokens: an exchange of theirs could hang."""
    if not (isinstance(hidden, Tensor) and isinstance(tokens, Tensor)) or hidden.dim() != tokens.dim() + 1:
        return  # which is said elsewhere
    own, whole = hidden.shape[-2], tokens.shape[-1]
    if own * shard.size != whole:
        raise ValueError(
            f"hidden has {own} tokens on this rank, one of {shard.size}, and there are {whole} in all; with "
            "sequence_parallel each rank must have as many: pad the tokens, and mask what is added"
        )


def gathered(hidden: Tensor, shard: Shard) -> Tensor:
    """Hidden states ``[S, T, H]`` or ``[N, H]`` of all ranks, split along the last dimension but one."""
    return _GatherSequence.apply(hidden, hidden.dim() - 2, shard.group, shard.size)
