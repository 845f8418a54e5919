"""Rows whose sampler kept some tokens: they meet those columns of the output layer alone."""

import torch
from torch import Tensor

from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.engine.kept import Parts
from egpo_kernels.formulas.kept import Grouped
from egpo_kernels.inputs.segments import segment_sum
from egpo_kernels.linear.layer import Gradients, Layer

SPLIT = 4096
"""Hidden states that are copied at a time, where adapters meet them."""


class KeptColumns:
    """Kept logits ``[E]`` as `egpo_kernels.linear.head.Head.project` makes them, in the compute dtype, never rounded;
    and what flows back through them.
    """

    def __init__(self, layer: Layer, parts: Parts) -> None:
        head = self.head = layer.head
        self.package, self.entries, self.mask = layer.package, parts.entries, parts.entries.mask
        # A copy only where rows do not follow one another in equal steps.
        self.states = layer.hidden.flatten(0, 1)
        self.columns, self.rows = self.entries.columns(head.vocab), self.entries.row_places()
        self.inner = None
        if not head.vocab:  # a rank without columns
            self.logits = layer.hidden.new_zeros(self.columns.shape, dtype=compute_dtype(head.weight.dtype))
            return
        values = self.package.gathered_products(self.states, head.weight, self.entries)
        if head.lora_a is not None and head.lora_b is not None:
            self.inner = self._inner(head.lora_a)
            values += head.lora_scale * self.package.gathered_products(self.inner, head.lora_b, self.entries)
        if head.bias is not None:
            values += head.bias[self.columns]
        values *= head.gain
        values = values.tanh_() if head.softcap else values
        # Another rank may have a row's own token.
        self.logits = values if layer.shard is None else self.package.kept_values(values, self.entries)

    def _inner(self, lora_a: Tensor) -> Tensor:
        dtype = compute_dtype(lora_a.dtype)
        return torch.cat([part.to(dtype) @ lora_a.to(dtype).t() for part in self.states.split(SPLIT)])

    def add(self, slopes: Tensor, gradients: Gradients) -> None:
        """Add what flows back through the gradient ``[E]`` of the logits; a token's part is summed in the order of
        rows.
        """
        if self.head.softcap:
            slopes = torch.ops.aten.tanh_backward(slopes, self.logits)
        if not self.head.vocab:
            gradients.more_hidden()
            return
        slopes = slopes * self.head.gain
        wanted, of_inner, by_row = gradients.of_head.wanted, None, None
        if wanted.hidden or wanted.lora_a:
            by_row = self.entries.by_row()
        if self.inner is not None and by_row is not None:
            of_inner = self._inner_gradient(slopes, by_row)
        hidden = gradients.more_hidden()
        if hidden is not None and by_row is not None:
            self._add_hidden(slopes, of_inner, by_row, hidden.flatten(0, 1))
        if wanted.of_head:
            self._add_head(slopes, of_inner, gradients.of_head.started())

    def _inner_gradient(self, slopes: Tensor, by_row: Grouped) -> Tensor:
        """Gradient ``[N, r]`` of hidden states that went through the first adapter."""
        assert self.inner is not None and self.head.lora_b is not None
        found, slopes = torch.zeros_like(self.inner), slopes * self.head.lora_scale
        self.package.add_gathered(slopes, self.head.lora_b.to(found.dtype), self.columns, by_row, found)
        return found

    def _add_hidden(self, slopes: Tensor, of_inner: Tensor | None, by_row: Grouped, out: Tensor) -> None:
        self.package.add_gathered(slopes, self.head.weight, self.columns, by_row, out)
        if of_inner is not None and self.head.lora_a is not None:
            for part, total in zip(of_inner.split(SPLIT), out.split(SPLIT), strict=True):
                total += (part @ self.head.lora_a.to(part.dtype)).to(total.dtype)

    def _add_head(self, slopes: Tensor, of_inner: Tensor | None, sums: list[Tensor | None]) -> None:
        weight, bias, lora_a, lora_b = sums
        by_id = self.entries.by_id(self.head.vocab)
        if weight is not None:
            states = self.states.to(self.head.weight.dtype)
            self.package.add_gathered(slopes, states, self.rows, by_id, weight)
        if bias is not None:
            bias += segment_sum(slopes[by_id.order], by_id.offsets).to(bias.dtype)
        if lora_a is not None and of_inner is not None:
            total = torch.zeros_like(lora_a, dtype=of_inner.dtype)
            for part, states, mask in zip(
                *(each.split(SPLIT) for each in (of_inner, self.states, self.mask)), strict=True
            ):
                # What does not count may be NaN, and 0 times that is no 0.
                total.addmm_(part.t(), torch.where(mask[:, None], states, 0.0).to(part.dtype))
            lora_a += total.to(lora_a.dtype)
        if lora_b is not None and self.inner is not None:
            self.package.add_gathered(slopes * self.head.lora_scale, self.inner, self.rows, by_id, lora_b)
