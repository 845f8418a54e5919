"""An output layer whose vocabulary is split over ranks, as the caller gave it: this rank's own tensors."""

from typing import Any, NamedTuple

from torch import Tensor

from egpo_kernels.inputs.validation import is_distributed
from egpo_kernels.parallel.hidden import read_parts
from egpo_kernels.parallel.reading import Given, describe, read_group, read_placement, read_shard
from egpo_kernels.parallel.shard import Shard


class Split(NamedTuple):
    """Hidden states and head without padded columns, where they are split, and what becomes of the gradient of the
    hidden states, see `egpo_kernels.parallel.hidden.GRADIENTS`.
    """

    hidden: Any
    weight: Any
    bias: Any
    lora: Any
    shard: Shard | None
    hidden_grad: str


def read_split(
    hidden: Any, weight: Any, bias: Any, lora: Any, columns: Given, hidden_grad: Any, sequence_parallel: Any
) -> Split:
    """Check how head and hidden states are split; what else they must be is not looked at."""
    shard = None
    if isinstance(weight, Tensor) and weight.dim():
        _check_meant(hidden, weight, columns)
        group = read_placement("weight", weight, 0).group if is_distributed(weight) else None
        weight, shard = read_shard("weight", weight, 0, columns)
        bias, lora = _own("bias", bias, group), _own_lora(lora, group)
    if shard is not None and shard.columns < weight.shape[0]:
        weight, bias, lora = _without_padding(shard.columns, weight, bias, lora)
    name = shard.group if shard is not None else None
    if name is None and columns.group is not None:
        name = read_group("vocab_group", columns.group).group_name
    hidden, mode = read_parts(hidden, hidden_grad, sequence_parallel, name or None)
    return Split(hidden, weight, bias, lora, shard, mode)


def _check_meant(hidden: Any, weight: Any, columns: Given) -> None:
    """Raise where FSDP may have sharded a weight, whose ranks have other tokens: an exchange of theirs could hang."""
    if not is_distributed(weight) or columns.group is not None or read_placement("weight", weight, 0).group is None:
        return
    if not is_distributed(hidden) or hidden.device_mesh != weight.device_mesh:
        raise ValueError(
            f"weight is {describe(weight)}, and nothing says that its ranks have the same tokens; it must be a whole "
            "[V, H], or split over the vocabulary as vocab_group says: pass vocab_group, or, where it is sharded, call "
            "this inside the model's forward"
        )


def _own(name: str, value: Any, group: Any) -> Any:
    """This rank's part of what has the vocabulary first; a DTensor must be split as the weight is."""
    if not is_distributed(value):
        return value
    placed = read_placement(name, value, 0)
    if getattr(placed.group, "group_name", None) != getattr(group, "group_name", None):
        raise ValueError(f"{name} is {describe(value)}; it must be split as weight is")
    return value.to_local()


def _own_lora(lora: Any, group: Any) -> Any:
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        return lora
    first, second, scale = lora
    if is_distributed(first):
        if not all(placement.is_replicate() for placement in first.placements):
            raise TypeError(f"lora[0] is {describe(first)}; it must be Replicate(): every rank needs all of it")
        first = first.to_local()
    return first, _own("lora[1]", second, group), scale


def _without_padding(columns: int, weight: Tensor, bias: Any, lora: Any) -> tuple[Tensor, Any, Any]:
    """As views: autograd fills the gradient of what is behind with zeros."""
    bias = bias[:columns] if isinstance(bias, Tensor) and bias.shape == weight.shape[:1] else bias
    if isinstance(lora, (tuple, list)) and len(lora) == 3 and isinstance(lora[1], Tensor):
        first, second, scale = lora
        fits = second.dim() == 2 and second.shape[0] == weight.shape[0]
        lora = (first, second[:columns] if fits else second, scale)
    return weight[:columns], bias, lora
