"""Log-probability and entropy of tokens under logits (SPEC of every other backend)."""

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype


def token_log_probs(logits: Tensor, rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    """``l = log softmax(z / temperature)[y]`` and ``Ent = -sum p log p`` of each row, ``[N]``, in nats.

    With ``m = max z`` and ``s = sum exp((z - m) / temperature)``: ``l = (z_y - m) / temperature - log s`` and
    ``Ent = log s - sum p (z - m) / temperature``. Rows outside the mask are replaced before any arithmetic and are 0; a
    token outside the vocabulary has a NaN log-prob; one whose own logit is -inf has -inf and no gradient.

    Args:
        logits: ``[B, T, V]``, undivided by the temperature, any floating dtype; float64 computes in float64.
        rows: The mask and tokens, ``[N]`` with N = B T; a temperature per row replaces ``temperature``.
        temperature: Above 0.
    """
    assert rows.tokens is not None
    dtype = compute_dtype(logits.dtype)
    z = logits.reshape(-1, logits.shape[-1]).to(dtype)
    heat = torch.full_like(z[:, 0], temperature) if rows.temperature is None else rows.temperature
    heat = torch.where(rows.mask, torch.where(heat > 0, heat, torch.nan), 1.0)[:, None]
    valid = (rows.tokens >= 0) & (rows.tokens < z.shape[-1])
    column = torch.where(valid & rows.mask, rows.tokens, 0)[:, None]
    dead = z.detach().gather(-1, column)[:, 0] == -torch.inf
    z = torch.where(rows.mask[:, None], torch.where(dead[:, None], z.detach(), z), 0.0)
    m = z.detach().amax(-1, keepdim=True)
    x = (z - m) / heat
    log_s = x.exp().sum(-1).log()
    own = x.gather(-1, column)[:, 0] - log_s
    # 0 * -inf is NaN: where a probability is 0 its term is 0.
    terms = torch.where(x == -torch.inf, 0.0, (x - log_s[:, None]).exp() * torch.where(x == -torch.inf, 0.0, x))
    entropy = torch.where(m[:, 0] == -torch.inf, 0.0, log_s - terms.sum(-1))
    own = torch.where(dead, -torch.inf, torch.where(valid, own, torch.nan))
    return torch.where(rows.mask, own, 0.0), torch.where(rows.mask, entropy, 0.0)
