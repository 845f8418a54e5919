"""Each public function that launches kernels, forward and backward: what it returns, and gradients, by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.api import groups, linear, logits
from egpo_kernels.command.batches import Batch
from egpo_kernels.config.settings import AdvantageConfig, LossOutput, PolicyLossConfig, Recipe

Outputs = dict[str, Tensor]

ENTROPY_UPSTREAM = 0.3
"""What comes back to every entropy."""
REFERENCE = "reference"
FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "logits": (logits.token_log_probs, logits.logits_policy_loss, logits.egpo_loss),
    "linear": (linear.linear_token_log_probs, linear.linear_policy_loss, linear.linear_egpo_loss),
}
"""By what log-probs come from: the functions of log-probs, of given advantages, of groups."""


def upstream(batch: Batch) -> Tensor:
    """What comes back to each log-prob."""
    return torch.linspace(-1.0, 2.0, batch.tokens.numel(), device=batch.tokens.device).view_as(batch.tokens)


def token_log_probs(batch: Batch, backend: str, entropy: bool) -> Outputs:
    """Values, and the gradient of logits or of hidden states and weight."""
    kind, leaves, options = _source(batch, True, False)
    call = FUNCTIONS[kind][0]
    found = call(*leaves.values(), batch.tokens, mask=batch.mask, return_entropy=entropy, backend=backend, **options)
    total = (upstream(batch).to(found.log_probs) * found.log_probs).sum()
    values = {"log_probs": found.log_probs.detach()}
    if found.entropy is not None:
        total = total + ENTROPY_UPSTREAM * found.entropy.sum()
        values["entropy"] = found.entropy.detach()
    return values | _gradients(total, leaves)


def loss(
    batch: Batch,
    backend: str,
    recipe: Recipe | PolicyLossConfig,
    *,
    old: bool = True,
    trains: bool = True,
    inplace: bool = False,
    times: float = 1.0,
    grad_scale: float = 1.0,
) -> Outputs:
    """A loss of logits or hidden states: of groups by a recipe, of the batch's own advantages by a config."""
    kind, leaves, options = _source(batch, trains, inplace and backend != REFERENCE)
    shared: dict[str, Any] = {
        "mask": batch.mask,
        "old_log_probs": batch.old_log_probs if old else None,
        "ref_log_probs": batch.ref_log_probs,
        "cu_seqlens": batch.cu_seqlens,
        "grad_scale": grad_scale,
        "backend": backend,
        **options,
    }
    if isinstance(recipe, Recipe):
        found = FUNCTIONS[kind][2](*leaves.values(), batch.tokens, batch.groups, batch.rewards, recipe=recipe, **shared)
    else:
        found = FUNCTIONS[kind][1](*leaves.values(), batch.tokens, batch.advantages, config=recipe, **shared)
    return _values(found) | _gradients(found.loss * times, leaves)


def policy_loss(batch: Batch, backend: str, config: PolicyLossConfig) -> Outputs:
    """From log-probs and entropies that are given."""
    leaves = {name: getattr(batch, name).clone().requires_grad_() for name in ("log_probs", "entropy")}
    if not config.entropy_coef:
        del leaves["entropy"]
    found = logits.policy_loss(
        leaves["log_probs"],
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        ref_log_probs=batch.ref_log_probs,
        entropy=leaves.get("entropy"),
        cu_seqlens=batch.cu_seqlens,
        config=config,
        backend=backend,
    )
    return _values(found) | _gradients(found.loss, leaves)


def group_advantages(batch: Batch, backend: str, config: AdvantageConfig) -> Outputs:
    """All that is returned; after renormalisation a weight is on a bound by accident, and where is not compared."""
    found = groups.group_advantages(
        batch.groups,
        batch.rewards,
        batch.old_log_probs,
        batch.mask,
        cu_seqlens=batch.cu_seqlens,
        entropy=batch.entropy,
        config=config,
        backend=backend,
    )
    *vectors, metrics = found
    if config.renorm == "after":
        metrics = {name: value for name, value in metrics.items() if "/at_" not in name}
    names = ("advantages", "weights", "base", "uncertainty")
    return dict(zip(names, vectors, strict=True)) | {"metrics": _stacked(metrics)}


def _source(batch: Batch, trains: bool, inplace: bool) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Which functions it is for, their first arguments, fresh, and an option that belongs to them."""
    if batch.hidden is None or batch.weight is None:
        assert batch.logits is not None
        return "logits", {"logits": batch.logits.clone().requires_grad_()}, {"inplace_grad": inplace}
    rows = batch.weight.shape[0] * batch.weight.element_size() * batch.tokens.numel()
    leaves = {"hidden": batch.hidden.clone().requires_grad_(), "weight": batch.weight.clone().requires_grad_(trains)}
    # A third of the rows at a time.
    return "linear", leaves, {"max_chunk_bytes": rows // 3}


def _gradients(total: Tensor, leaves: dict[str, Tensor]) -> Outputs:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()))
    return {f"gradient of {name}": gradient for name, gradient in zip(wanted, found, strict=True)}


def _values(found: LossOutput) -> Outputs:
    return {"loss": found.loss.detach(), "metrics": _stacked(found.metrics)}


def _stacked(metrics: dict[str, Tensor]) -> Tensor:
    return torch.stack([metrics[name] for name in sorted(metrics)])
