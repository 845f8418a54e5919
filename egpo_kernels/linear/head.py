"""The output layer: logits of hidden states, and what flows back into hidden states and layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype

SLAB = 4096
"""Rows of a 16-bit weight that are float32 at a time, where products cannot be summed up in float32 otherwise."""


class Head(NamedTuple):
    """``z = softcap tanh(raw / softcap)`` with ``raw = logit_scale (h (W + lora_scale B A)^T + bias)``.

    ``weight [V, H]``, ``bias [V]``, ``lora_a [r, H]``, ``lora_b [V, r]``; a softcap of 0 is none. Scaling costs no pass
    over the logits: what is made here is ``z / cooling``, and the temperature is divided by the same. Products are of
    the weight's dtype, the logits and their gradient of ``logits_dtype``, that or float32.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    logit_scale: float
    softcap: float
    logits_dtype: torch.dtype

    @property
    def vocab(self) -> int:
        """Vocabulary size."""
        return self.weight.shape[0]

    @property
    def gain(self) -> float:
        """What the product of hidden states and weight is multiplied by."""
        return self.logit_scale / self.softcap if self.softcap else 1.0

    @property
    def cooling(self) -> float:
        """What the temperature is divided by."""
        return self.softcap or self.logit_scale

    def cooled(self, rows: Rows, temperature: float) -> tuple[Rows, float]:
        """Rows and temperature for the logits that `project` makes."""
        heats = None if rows.temperature is None else rows.temperature / self.cooling
        return rows._replace(temperature=heats), temperature / self.cooling

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """Write ``z / cooling`` of ``hidden [R, H]`` to ``out [R, V]``."""
        if self.bias is None:
            _product(out, hidden, self.weight, 0.0, self.gain)
        elif out.dtype == self.weight.dtype:
            torch.addmm(self.bias, hidden, self.weight.t(), beta=self.gain, alpha=self.gain, out=out)
        else:
            _product(out.copy_(self.bias), hidden, self.weight, self.gain, self.gain)
        if self.lora_a is not None and self.lora_b is not None:
            # In the logits' dtype, which 16 bits in between would spoil; adapters are small.
            inner = hidden.to(out.dtype) @ self.lora_a.to(out.dtype).t()
            out.addmm_(inner, self.lora_b.to(out.dtype).t(), alpha=self.gain * self.lora_scale)
        if self.softcap:
            out.tanh_()

    def uncap_(self, gradient: Tensor, capped: Tensor) -> None:
        """Turn the gradient of what `project` made into that of what was capped, in place."""
        if self.softcap:
            torch.ops.aten.tanh_backward(gradient, capped, grad_input=gradient)

    def hidden_gradient(self, gradient: Tensor, out: Tensor) -> None:
        """Write dL/dh to ``out [R, H]`` from the ``gradient [R, V]`` that `uncap_` left."""
        torch.addmm(out, gradient, self.weight, beta=0, alpha=self.gain, out=out)
        if self.lora_a is not None and self.lora_b is not None:
            out.addmm_(gradient @ self.lora_b, self.lora_a, alpha=self.gain * self.lora_scale)


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool

    @classmethod
    def nothing(cls) -> "Wanted":
        """Values alone."""
        return cls(False, False, False, False, False)

    @classmethod
    def only_hidden(cls) -> "Wanted":
        """A frozen head."""
        return cls(True, False, False, False, False)

    @property
    def of_head(self) -> bool:
        """Whether anything of the head trains."""
        return any(self[1:])


def sums_apart(weight: Tensor) -> bool:
    """Whether a product of 16-bit matrices can be added to a float32 one only after they are made float32."""
    half = weight.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    at_once = weight.device.type == "cuda" and torch.version.hip is None and not half
    return weight.dtype.itemsize < 4 and not at_once


def _product(out: Tensor, left: Tensor, weight: Tensor, beta: float, alpha: float) -> None:
    """``out [R, V] = beta out + alpha left weight^T``; where out is wider, 16-bit products are summed up in it."""
    if out.dtype == weight.dtype:
        torch.addmm(out, left, weight.t(), beta=beta, alpha=alpha, out=out)
    elif not sums_apart(weight):
        torch.addmm(out, left, weight.t(), out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        wide = left.to(out.dtype)
        for part, slab in zip(out.split(SLAB, 1), weight.split(SLAB), strict=True):
            torch.addmm(part, wide, slab.to(out.dtype).t(), beta=beta, alpha=alpha, out=part)


class HeadGradients:
    """Gradients of the head, summed over chunks in float32 (float64): rounding each chunk's would bias training.

    Where there is ``once`` only something to add, it is rounded once anyway. The first product is written to memory
    that holds anything, which ``beta = 0`` does not read.
    """

    def __init__(self, head: Head, wanted: Wanted, once: bool) -> None:
        self.head, self.wanted = head, wanted
        dtype = head.weight.dtype if once else compute_dtype(head.weight.dtype)
        self.widens = not once and sums_apart(head.weight)
        self.sums = [
            None if tensor is None or not asked else tensor.new_empty(tensor.shape, dtype=dtype)
            for tensor, asked in zip(head[:4], wanted[1:], strict=True)
        ]
        self.beta = 0.0

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add what flows back through ``gradient [R, V]`` into the logits of ``hidden [R, H]``."""
        if not self.wanted.of_head:
            return
        head, gain = self.head, self.head.gain
        weight, bias, lora_a, lora_b = self.sums
        if self.widens:
            gradient, hidden = gradient.float(), hidden.float()
        if weight is not None:
            self._accumulate_(weight, gradient.t(), hidden, gain)
        if bias is not None:
            column = gradient.sum(0, dtype=compute_dtype(bias.dtype))
            bias.add_(column, alpha=gain) if self.beta else bias.copy_(column.mul_(gain))
        if lora_a is not None and head.lora_b is not None:
            inner = gradient @ head.lora_b.to(gradient.dtype)
            self._accumulate_(lora_a, inner.t(), hidden, gain * head.lora_scale)
        if lora_b is not None and head.lora_a is not None:
            inner = hidden @ head.lora_a.to(hidden.dtype).t()
            self._accumulate_(lora_b, gradient.t(), inner, gain * head.lora_scale)
        self.beta = 1.0

    def started(self) -> list[Tensor | None]:
        """The sums, to be added to: zeros if nothing was."""
        if not self.beta:
            self.beta = 1.0
            for total in self.sums:
                if total is not None:
                    total.zero_()
        return self.sums

    def _accumulate_(self, total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
        if total.dtype == left.dtype:
            total.addmm_(left, right, beta=self.beta, alpha=alpha)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, beta=self.beta, alpha=alpha, out=total)

    def rounded(self) -> list[Tensor]:
        """The sums in the dtype of what they are gradients of; empty where none was asked for."""
        weight, sums = self.head.weight, self.started()
        return [weight.new_empty(0) if found is None else found.to(weight.dtype) for found in sums]
