"""Logits of hidden states, whole (SPEC of `egpo_kernels.linear`)."""

import torch
from torch import Tensor


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float,
    logits_dtype: torch.dtype,
    mask: Tensor,
) -> Tensor:
    """``z = c tanh(x / c)`` with ``x = logit_scale (h (W + lora_scale B A)^T + bias)`` and c the softcap, 0 for none.

    Rows outside ``mask`` are replaced before any arithmetic: what they hold reaches no gradient.

    Args:
        hidden: ``[B, T, H]``.
        weight: ``[V, H]``, as bias ``[V]``, lora_a ``[r, H]`` and lora_b ``[V, r]`` of the same dtype.
        bias: Or None.
        lora_a: Or None, as lora_b.
        lora_b: Or None.
        lora_scale: What the adapters' product is multiplied by.
        logit_scale: What everything is multiplied by.
        softcap: What the logits stay below in size.
        logits_dtype: What everything is converted to before it is multiplied.
        mask: ``[N]`` with N = B T.
    """
    hidden, weight = hidden.to(logits_dtype), weight.to(logits_dtype)
    bias, lora_a, lora_b = (None if tensor is None else tensor.to(logits_dtype) for tensor in (bias, lora_a, lora_b))
    hidden = torch.where(mask.view(*hidden.shape[:2], 1), hidden, 0.0)
    z = torch.nn.functional.linear(hidden, weight, bias)
    if lora_a is not None and lora_b is not None:
        z = z + lora_scale * torch.nn.functional.linear(torch.nn.functional.linear(hidden, lora_a), lora_b)
    z = logit_scale * z
    return softcap * torch.tanh(z / softcap) if softcap else z
