"""Logits of which a sampler kept some (SPEC of every other backend)."""

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.formulas.kept import has_record, row_of_id


def kept_logits(logits: Tensor, rows: Rows, ids: Tensor, offsets: Tensor) -> Tensor:
    """``z_v`` where v is in ``K_t``, -inf elsewhere, with ``K_t`` the recorded ids of row t and its token ("Keep
    Sampling Mask", DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

    A row without a record keeps everything; one whose record holds an id outside the vocabulary is NaN.

    Args:
        logits: ``[B, T, V]``.
        rows: The mask and tokens, ``[N]`` with N = B T.
        ids: ``[M]``.
        offsets: ``[N + 1]``; row t recorded ``ids[offsets[t] : offsets[t + 1]]``.
    """
    assert rows.tokens is not None
    (batch, length, vocab), ids = logits.shape, ids.long()
    count = batch * length
    row, valid = row_of_id(offsets, ids.shape[0]), (ids >= 0) & (ids < vocab)
    keep, broken = (torch.zeros(count + 1, size, dtype=torch.bool, device=ids.device) for size in (vocab, 1))
    keep[row[valid], ids[valid]] = True
    broken[row[~valid]] = True
    keep = keep[:count].scatter(1, rows.tokens.clamp(0, vocab - 1)[:, None], True) | ~has_record(offsets)[:, None]
    z = torch.where(keep.view(logits.shape), logits, -torch.inf)
    return torch.where(broken[:count].view(batch, length, 1), torch.nan, z)
