"""Each public function that launches kernels, forward and backward: what it returns, and gradients, by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.api import groups, linear, logits
from egpo_kernels.command.batches import Batch
from egpo_kernels.config.results import LossOutput
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Recipe

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
    """What comes back to each log-prob: to every fourth nothing, so that its entropy alone is differentiated."""
    numbers = torch.linspace(-1.0, 2.0, batch.tokens.numel(), device=batch.tokens.device)
    numbers[::4] = 0.0
    return numbers.view_as(batch.tokens)


def token_log_probs(batch: Batch, backend: str, entropy: bool) -> Outputs:
    """Values, and the gradient of logits or of hidden states and weight."""
    kind, leaves, options = _source(batch, True, False)
    options |= {"mask": batch.mask, "return_entropy": entropy, "backend": backend}
    found = FUNCTIONS[kind][0](*leaves.values(), batch.tokens, **options)
    weights = upstream(batch).to(found.log_probs)
    # Not 0 times -inf.
    total = torch.where(weights != 0, weights * found.log_probs, 0.0 * weights).sum()
    values = {"log_probs": found.log_probs.detach()}
    if found.entropy is not None:
        total = total + ENTROPY_UPSTREAM * found.entropy.sum()
        values["entropy"] = found.entropy.detach()
    return values | _gradients(total, leaves)


def scores(batch: Batch, backend: str) -> Outputs:
    """Log-probs and entropy where no gradient is asked for."""
    kind, leaves, options = _source(batch, True, False)
    options |= {"mask": batch.mask, "return_entropy": True, "backend": backend}
    with torch.no_grad():
        found = FUNCTIONS[kind][0](*leaves.values(), batch.tokens, **options)
    return {"log_probs": found.log_probs, "entropy": found.entropy}


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
    metrics: str = "all",
) -> Outputs:
    """A loss of logits or hidden states: of groups by a recipe, of the batch's own advantages by a config."""
    kind, leaves, options = _source(batch, trains, inplace and backend != REFERENCE)
    shared: dict[str, Any] = {
        "mask": batch.mask,
        "old_log_probs": batch.old_log_probs if old else None,
        "grad_scale": grad_scale,
        "metrics": metrics,
        "backend": backend,
        **of_losses(batch),
        **options,
    }
    if isinstance(recipe, Recipe):
        shared |= {"entropy_mask": batch.entropy_mask, "correct": batch.correct, "recipe": recipe}
        found = FUNCTIONS[kind][2](*leaves.values(), batch.tokens, batch.groups, batch.rewards, **shared)
    else:
        found = FUNCTIONS[kind][1](*leaves.values(), batch.tokens, batch.advantages, config=recipe, **shared)
    return _values(found) | _gradients(found.loss * times, leaves)


def of_losses(batch: Batch) -> dict[str, Any]:
    """What every loss is given by these names."""
    names = ("ref_log_probs", "rollout_weights", "cu_seqlens", "num_tokens", "num_sequences")
    return {name: getattr(batch, name) for name in names}


def policy_loss(batch: Batch, backend: str, config: PolicyLossConfig) -> Outputs:
    """From log-probs and entropies that are given."""
    leaves = {name: getattr(batch, name).clone().requires_grad_() for name in ("log_probs", "entropy")}
    if not config.has_bonus:
        del leaves["entropy"]
    found = logits.policy_loss(
        leaves["log_probs"],
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        entropy=leaves.get("entropy"),
        config=config,
        backend=backend,
        **of_losses(batch),
    )
    return _values(found) | _gradients(found.loss.sum(), leaves)


def group_advantages(batch: Batch, backend: str, config: AdvantageConfig) -> Outputs:
    """All that is returned; after renormalisation a weight is on a bound by accident, and where is not compared."""
    found = groups.group_advantages(
        batch.groups,
        batch.rewards,
        batch.old_log_probs,
        batch.mask,
        cu_seqlens=batch.cu_seqlens,
        entropy=batch.entropy,
        entropy_mask=batch.entropy_mask,
        correct=batch.correct,
        config=config,
        backend=backend,
    )
    *vectors, metrics = found
    if config.renorm == "after":
        metrics = {name: value for name, value in metrics.items() if "/at_" not in name}
    names = ("advantages", "weights", "base", "uncertainty")
    return dict(zip(names, vectors, strict=True)) | {"metrics": _stacked(metrics)}


def _source(batch: Batch, trains: bool, inplace: bool) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Which functions it is for, their first arguments, fresh, and options of theirs."""
    if batch.hidden is None or batch.weight is None:
        assert batch.logits is not None
        options = {"temperature": batch.temperature, "inplace_grad": inplace, "support": batch.support}
        return "logits", {"logits": batch.logits.clone().requires_grad_()}, options
    rows = batch.weight.shape[0] * batch.weight.element_size() * batch.tokens.numel()
    leaves = {"hidden": batch.hidden.clone().requires_grad_(), "weight": batch.weight.clone().requires_grad_(trains)}
    # A third of the rows at a time.
    return "linear", leaves, {"temperature": batch.temperature, "max_chunk_bytes": rows // 3, "support": batch.support}


def _gradients(total: Tensor, leaves: dict[str, Tensor]) -> Outputs:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()))
    return {f"gradient of {name}": gradient for name, gradient in zip(wanted, found, strict=True)}


def _values(found: LossOutput) -> Outputs:
    """Loss and metrics, which may have been left out."""
    return {"loss": found.loss.detach()} | ({"metrics": _stacked(found.metrics)} if found.metrics else {})


def _stacked(metrics: dict[str, Tensor]) -> Tensor:
    return torch.stack([metrics[name] for name in sorted(metrics)])
