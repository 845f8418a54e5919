"""An output layer whose vocabulary is split over ranks, as the caller gave it: this rank's own tensors."""

from typing import Any, NamedTuple

from torch import Tensor

from egpo_kernels.inputs.validation import is_distributed
from egpo_kernels.parallel.hidden import read_parts
from egpo_kernels.parallel.reading import Given, describe, local, read_group, read_placement, read_shard
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
        group: Any = None
        summed: tuple[int, ...] = ()
        if is_distributed(weight):
            group, summed = read_placement("weight", weight, 0).group, _by_rows(hidden, weight)
        weight, shard = read_shard("weight", weight, 0, columns, summed)
        bias, lora = _own("bias", bias, group, summed), _own_lora(lora, group, summed)
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


def _by_rows(hidden: Any, weight: Any) -> tuple[int, ...]:
    """Dimensions of a weight's mesh along which ranks have other rows, and so another part of its gradient."""
    mesh = weight.device_mesh
    if mesh.ndim == 1:
        return ()
    if not is_distributed(hidden) or hidden.device_mesh != mesh:
        raise ValueError(
            f"weight is {describe(weight)}, and hidden does not say which of its ranks have the same tokens; it must "
            "be a DTensor of the same mesh: pass one, or a weight of mesh['tp']"
        )
    pairs = enumerate(zip(hidden.placements, weight.placements, strict=True))
    return tuple(dim for dim, (states, own) in pairs if states.is_shard() and own.is_replicate())


def _own(name: str, value: Any, group: Any, summed: tuple[int, ...]) -> Any:
    """This rank's part of what has the vocabulary first; a DTensor must be split as the weight is."""
    if not is_distributed(value):
        return value
    placed = read_placement(name, value, 0)
    if getattr(placed.group, "group_name", None) != getattr(group, "group_name", None):
        raise ValueError(f"{name} is {describe(value)}; it must be split over ranks as weight is: redistribute it")
    return local(value, summed)


def _own_lora(lora: Any, group: Any, summed: tuple[int, ...]) -> Any:
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        return lora
    first, second, scale = lora
    if is_distributed(first):
        if not all(placement.is_replicate() for placement in first.placements):
            raise TypeError(f"lora[0] is {describe(first)}; it must be Replicate(): every rank needs all of it")
        first = local(first, summed)
    return first, _own("lora[1]", second, group, summed), scale


def _without_padding(columns: int, weight: Tensor, bias: Any, lora: Any) -> tuple[Tensor, Any, Any]:
    """As views: autograd fills the gradient of what is behind with zeros."""
    bias = bias[:columns] if isinstance(bias, Tensor) and bias.shape == weight.shape[:1] else bias
    if isinstance(lora, (tuple, list)) and len(lora) == 3 and isinstance(lora[1], Tensor):
        first, second, scale = lora
        fits = second.dim() == 2 and second.shape[0] == weight.shape[0]
        lora = (first, second[:columns] if fits else second, scale)
    return weight[:columns], bias, lora
