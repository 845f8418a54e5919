"""Lining up a causal model's inputs with its logits."""

import torch
from torch import Tensor

from egpo_kernels.validation import check_dense, check_tensor


def next_token_targets(input_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Align token ids with the logits of a causal model, so that whole logits are passed and nothing is sliced.

    Slicing ``logits[:, :-1]`` works as well, but its backward makes a full-size copy of the gradient.

    Args:
        input_ids: ``[S, T]`` (or ``[T]``), integer: what the model was given.
        mask: Shaped like input_ids: nonzero where the token itself counts; None counts every token.

    Returns:
        ``(tokens, mask)``: both rolled by -1 along the last dimension, the last position masked (bool).

    Raises:
        ValueError: Shapes or devices that differ.
        TypeError: A wrong type or dtype.
    """
    if check_dense("input_ids", input_ids, "integer").dim() < 1:
        raise ValueError("input_ids has shape []; it must be [S, T] or [T]")
    shape = {"the shape of input_ids": tuple(input_ids.shape)}
    counts = torch.ones_like(input_ids, dtype=torch.bool)
    if mask is not None:
        counts = check_tensor("mask", mask, "real", shape, input_ids.device) != 0
    counts = counts.roll(-1, -1)
    counts[..., -1:] = False
    return input_ids.roll(-1, -1), counts
