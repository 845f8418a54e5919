"""Checks of values, where looking at them costs no sync; operators make them, in a traced call too."""

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.inputs import validation
from egpo_kernels.inputs.segments import flat_rows


def _check_tokens(tokens: Tensor | None, mask: Tensor, vocab: int) -> None:
    if tokens is None:
        return
    wrong = mask & ((tokens < 0) | (tokens >= vocab))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"tokens holds {int(tokens[row])} at flattened position {row}, where the mask counts it; every counted "
            f"token must be in [0, {vocab}): mask it out"
        )


def _check_temperatures(temperature: Tensor | None, mask: Tensor) -> None:
    if temperature is None:
        return
    # Below float32's smallest normal number, 1 / temperature overflows.
    wrong = mask & ~((temperature >= torch.finfo(torch.float32).tiny) & temperature.isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"temperature holds {float(temperature[row])} at flattened position {row}; it must be positive, finite "
            "and a number that float32 can divide by"
        )


def check_rows(rows: Rows, vocab: int) -> None:
    """Raise when a counted row's token or temperature cannot be. Values are read only where that costs no sync."""
    if validation.checks_values(rows.mask.device):
        rows = flat_rows(rows)
        _check_tokens(rows.tokens, rows.mask, vocab)
        _check_temperatures(rows.temperature, rows.mask)


def check_cu_seqlens(cu_seqlens: Tensor, num_rows: int) -> None:
    """Raise when ``cu_seqlens`` does not start at 0, decreases, or ends past the last row."""
    if not validation.checks_values(cu_seqlens.device):
        return
    cu_seqlens = cu_seqlens.long()
    if cu_seqlens[0] != 0 or (cu_seqlens[1:] < cu_seqlens[:-1]).any() or cu_seqlens[-1] > num_rows:
        raise ValueError(
            f"cu_seqlens starts at {int(cu_seqlens[0])} and ends at {int(cu_seqlens[-1])} over {num_rows} packed "
            "tokens; it must start at 0, never decrease, and end at or before the last token"
        )


def check_support_offsets(offsets: Tensor, num_ids: int) -> None:
    """Raise when a support's offsets do not start at 0, decrease, or end past the last id."""
    if not validation.checks_values(offsets.device):
        return
    offsets = offsets.long()
    falls = "".join(f" and falls after row {row}" for row in (offsets[1:] < offsets[:-1]).nonzero()[:1, 0].tolist())
    if offsets[0] != 0 or falls or offsets[-1] > num_ids:
        raise ValueError(
            f"support.offsets starts at {int(offsets[0])} and ends at {int(offsets[-1])} over {num_ids} ids{falls}; it "
            "must start at 0, never decrease, and end at or before the last id"
        )


def check_kept(ids: Tensor, rows: Tensor, given: Tensor, vocab: int) -> None:
    """Raise when one of the ``ids [E]`` that were ``given`` cannot be, or is in its row twice."""
    if not validation.checks_values(ids.device):
        return
    ids, rows = ids[given], rows[given]
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"support.ids holds {int(ids[place])} in the row of flattened position {int(rows[place])}; it must be in "
            f"[0, {vocab}): leave out what only fills a row, as pack_support does"
        )
    keys = (rows * vocab + ids).sort().values
    twice = keys[1:] == keys[:-1]
    if twice.any():
        row, token = divmod(int(keys[int(twice.nonzero()[0])]), vocab)
        raise ValueError(
            f"support.ids holds {token} twice in the row of flattened position {row}; a row's ids must differ: "
            "pack_support removes what is there twice"
        )


def check_either_way(name: str, same: Tensor) -> None:
    """Raise when a tensor that may be per sequence or per token means two things, by rows ``same [N]``."""
    if validation.checks_values(same.device) and not same.all():
        raise ValueError(
            f"{name} has shape {[len(same)]}, and there are as many packed tokens as sequences; it must say which it "
            "means: pass [S, 1] for one number a sequence; for one a token append a masked token, or leave out empty "
            "sequences"
        )
