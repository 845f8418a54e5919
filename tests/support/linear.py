"""A case as hidden states and an output layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import egpo_kernels as ek
from tests.support.case import Case
from tests.support.device import DEVICE

HALF = 0.5
"""A scale of the logits by which nothing is rounded."""


class Layer(NamedTuple):
    """Hidden states, as a case's layout has them, and the layer that makes logits of them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What may be differentiated, by name."""
        lora = dict(zip(("A", "B"), self.lora or (), strict=False))
        found = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias, **lora}
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    @property
    def options(self) -> dict[str, Any]:
        """All but hidden states and weight, as the public functions take them."""
        names = ("bias", "lora", "logit_scale", "logit_softcap")
        return {name: getattr(self, name) for name in names}

    def logits(self) -> Tensor:
        """All of them at once, with torch's own operations."""
        weight = self.weight
        if self.lora is not None:
            lora_a, lora_b, scale = self.lora
            weight = weight + scale * lora_b @ lora_a
        logits = self.logit_scale * torch.nn.functional.linear(self.hidden, weight, self.bias)
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def logits_as_hidden(case: Case) -> Layer:
    """Each logit is twice an entry of a hidden state; nothing is rounded. What is -inf everywhere has that bias."""
    rows, never = _finite(case)
    weight = torch.eye(rows.shape[1], dtype=rows.dtype, device=DEVICE)
    hidden = torch.where(never, 0.0, rows.view(case.logits.shape) / HALF)
    bias = torch.where(never, -torch.inf, 0.0).to(rows.dtype)
    return Layer(_like(case.logits, hidden), weight, bias, logit_scale=HALF)


def logits_as_weight(case: Case) -> Layer:
    """Each row has a hidden state of its own, which picks its logits from the weight; nothing is rounded."""
    rows, never = _finite(case)
    weight = torch.where(case.counted[:, None] & ~never, rows / HALF, 0.0).t()
    hidden = torch.eye(len(rows), dtype=rows.dtype, device=DEVICE).view(*case.tokens.shape, len(rows))
    return Layer(hidden, weight, torch.where(never, -torch.inf, 0.0).to(rows.dtype), logit_scale=HALF)


def _finite(case: Case) -> tuple[Tensor, Tensor]:
    """Logits [N, V] without what no row may look at, and which tokens are -inf in all rows that look at them."""
    rows, keeps, counted = case.logits.detach().reshape(-1, case.logits.shape[-1]), case.keeps, case.counted
    minus = (rows == -torch.inf) & keeps
    return torch.where(keeps, rows, 0.0), (minus | ~keeps)[counted].all(0) & minus[counted].any(0)


def _like(logits: Tensor, values: Tensor) -> Tensor:
    """The values in memory that is strided as the logits are."""
    made = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    return made.copy_(values)


def run(case: Case, layer: Layer, wanted: tuple[str, ...], backend: str, groups: bool, **options) -> dict:
    """Loss, metrics, and the gradients of the leaves that are `wanted`, by the linear functions."""
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in layer.leaves.items()}
    layer = with_leaves(layer, leaves)
    shared = {
        **case.loss_arguments(),
        **layer.options,
        "mask": case.mask,
        "temperature": case.temperature,
        "support": case.support,
        "backend": backend,
    }
    shared |= {"grad_scale": case.grad_scale, **options}
    first = (layer.hidden, layer.weight, case.tokens)
    if groups:
        shared |= {"entropy_mask": case.entropy_mask, "correct": case.correct, "recipe": case.recipe}
        loss, metrics = ek.linear_egpo_loss(*first, case.groups, case.rewards, **shared)
    else:
        loss, metrics = ek.linear_policy_loss(*first, case.advantages, config=case.recipe.loss, **shared)
    loss.backward(case.upstream.to(loss.dtype))
    return {"loss": loss.detach(), "metrics": metrics} | {name: leaves[name].grad for name in wanted}


def with_leaves(layer: Layer, leaves: dict[str, Tensor]) -> Layer:
    """The same layer made of other tensors."""
    lora = None if layer.lora is None else (leaves["A"], leaves["B"], layer.lora[2])
    changes = {name: leaves[name] for name in ("hidden", "weight", "bias") if name in leaves}
    return layer._replace(**changes, lora=lora)
