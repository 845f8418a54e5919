"""Lining up a causal model's inputs with its logits."""

from reprlib import repr as shown

import torch
from torch import Tensor

from egpo_kernels.inputs.layout import make_layout
from egpo_kernels.inputs.validation import check_dense, check_tensor


def next_token_targets(
    input_ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Align token ids with the logits of a causal model, so that logits need not be sliced.

    Slicing ``logits[:, :-1]`` works too, but the slice's backward makes a full-size copy of the gradient.

    Args:
        input_ids: The model's input ids, ``[S, T]`` (or ``[T]``), integer. For packed sequences, ``[N]`` or ``[1, N]``,
            pass ``cu_seqlens`` or ``position_ids``, so that no token becomes the target of the sequence before.
        mask: Shaped like input_ids, nonzero where the token itself is in the loss; None: every token.
        cu_seqlens: ``[S + 1]`` integer: where packed sequences begin and end; positions past the last end are masked.
        position_ids: Shaped like input_ids, integer: each token's position in its sequence. A token whose position is
            not one more than that of the token before begins a sequence.

    Returns:
        ``(tokens, mask)``: both rolled by -1 along the last dimension; mask is bool and False at the last position (of
        each sequence). If ``cu_seqlens`` on a device is malformed, tokens are -1, which the losses do not accept.

    Raises:
        ValueError: Shapes or devices that differ; a wrong value; both ``cu_seqlens`` and ``position_ids``.
        TypeError: A wrong type or dtype.
    """
    if check_dense("input_ids", input_ids, "integer").dim() < 1:
        raise ValueError("input_ids has shape []; it must be [S, T] or [T]")
    shape, device = {"the shape of input_ids": tuple(input_ids.shape)}, input_ids.device
    counts = torch.ones_like(input_ids, dtype=torch.bool)
    if mask is not None:
        counts = check_tensor("mask", mask, "real", shape, device) != 0
    tokens, counts = input_ids.roll(-1, -1), counts.roll(-1, -1)
    counts[..., -1:] = False
    if cu_seqlens is not None and position_ids is not None:
        raise ValueError(
            f"position_ids is {shown(position_ids)} with cu_seqlens, which say the same; it must be None there"
        )
    if position_ids is not None:
        places = check_tensor("position_ids", position_ids, "integer", shape, device).long()
        counts = counts & (places.roll(-1, -1) == places + 1)
    if cu_seqlens is not None:
        rows = input_ids.shape[-1]
        if input_ids.numel() != rows:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)} with cu_seqlens; it must be packed, [N] or [1, N]"
            )
        layout = make_layout("input_ids", (rows,), cu_seqlens, device)
        sequence = layout.sequence
        last = sequence.roll(-1) != sequence
        inside = torch.arange(1, rows + 1, device=device) < layout.offsets[-1]
        counts = counts & (inside & ~last)
        assert layout.poison is not None
        tokens = torch.where(layout.poison.isnan(), -1, tokens)
    return tokens, counts
