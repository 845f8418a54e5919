"""Parts of responses: thinking and answer by the closing think tag, and the tokens of highest entropy."""

from collections.abc import Sequence
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config.fields import check_number, entries, plain
from egpo_kernels.config.results import ResponseSpans
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.inputs.layout import counted, make_layout
from egpo_kernels.inputs.segments import per_row
from egpo_kernels.inputs.validation import check_dense


def response_spans(
    tokens: Tensor,
    close_tag: int | Sequence[int],
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> ResponseSpans:
    """Split responses at their closing think tag, for ``entropy_mask`` or diagnostics (arXiv 2602.22751, Table 3).

    The split is after the last tag. A response without a tag is not split: both spans are the whole response, and
    ``untagged`` counts it.

    Args:
        tokens: ``[S, T]`` or packed ``[N]``, integer.
        close_tag: Token id of the closing tag, or its ids in order, if the tokenizer splits it into several.
        mask: Shaped like tokens, nonzero where a token is in the mask; None: where ``tokens != -100``. The tag must be
            in the mask.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.

    Returns:
        ``(thinking, answer, untagged)``: bool shaped like tokens, the tag itself in thinking; and a 0-d int64 tensor,
        the number of responses with tokens in the mask but no tag.

    Raises:
        ValueError: A wrong shape, device or value.
        TypeError: A wrong type or dtype.
    """
    tag = _check_tag(close_tag)
    check_dense("tokens", tokens, "integer")
    layout = make_layout("tokens", tuple(tokens.shape), cu_seqlens, tokens.device)
    ids = tokens.reshape(-1).long()
    counts, rows = counted(mask, ids, layout), torch.arange(layout.num_rows, device=ids.device)
    closes, sequence = counts, layout.sequence
    for back, token in enumerate(reversed(tag)):
        same_sequence = (rows >= back) & (sequence.roll(back) == sequence)
        closes = closes & same_sequence & (counts & (ids == token)).roll(back)
    shape = (max(layout.num_sequences, 1),)
    last, used = rows.new_full(shape, -1), torch.zeros(shape, dtype=torch.long, device=rows.device)
    last = last.scatter_reduce(0, sequence, torch.where(closes, rows, -1), "amax")
    used = used.scatter_reduce(0, sequence, counts.long(), "amax")
    end = per_row(last, sequence)
    thinking, answer = counts & ((end < 0) | (rows <= end)), counts & ((end < 0) | (rows > end))
    untagged = ((last < 0) & (used > 0)).sum()
    return ResponseSpans(thinking.view(layout.shape), answer.view(layout.shape), untagged)


def top_entropy_mask(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    fraction: float = 0.2,
) -> Tensor:
    """Which tokens in the mask have the highest entropy in the batch; to be multiplied into ``rollout_weights``.

    Policy gradients from high-entropy tokens only ("Beyond the 80/20 rule", arXiv 2506.01939). Multiplied into
    ``rollout_weights``, and not into the mask, it leaves the other tokens in the reduction's denominator and in the KL,
    as in TRL. First replace NaN in the weights by 1: NaN times 0 is NaN, which the losses take as 1.

    Args:
        entropy: Shannon entropy of each position in nats, ``[S, T]`` or packed ``[N]``; a non-finite one is not chosen.
        mask: Shaped like entropy, nonzero where a token is in the mask; None: everywhere.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        fraction: Share of the tokens in the mask to choose, in (0, 1]; ties with the last one chosen are chosen too.

    Returns:
        Bool, shaped like entropy.

    Raises:
        ValueError: A wrong shape, device or value.
        TypeError: A wrong type or dtype.
    """
    share = check_number("fraction", fraction, low=0.0, high=1.0, open_low=True) or 1.0
    check_dense("entropy", entropy, "floating")
    layout = make_layout("entropy", tuple(entropy.shape), cu_seqlens, entropy.device)
    values = entropy.detach().reshape(-1).to(compute_dtype(entropy.dtype))
    eligible = counted(mask, None, layout) & values.isfinite()
    if layout.num_rows == 0:
        return eligible.view(layout.shape)
    # Not torch.quantile, which takes no mask and at most 16 million values.
    ordered = torch.where(eligible, values, torch.inf).sort().values
    place = (1 - share) * (eligible.sum() - 1).clamp(min=0).to(values.dtype)
    # Two places in one index: a 0-d one would wait for the device.
    low, high = ordered[torch.stack([place.floor(), place.ceil()]).long()].unbind()
    threshold = torch.lerp(low, high, place - place.floor())
    return (eligible & (values >= threshold)).view(layout.shape)


def _check_tag(close_tag: Any) -> list[int]:
    single = plain(close_tag)
    tag = [single] if isinstance(single, int) else entries(close_tag)
    wanted = "it must be a token id (an int >= 0) or a list of them"
    if tag is None or any(isinstance(it, bool) or not isinstance(it, int) for it in tag):
        raise TypeError(f"close_tag is {shown(close_tag)}; {wanted}")
    if not tag or min(tag) < 0 or max(tag) >= 2**63:
        raise ValueError(f"close_tag is {shown(close_tag)}; {wanted}")
    return tag
