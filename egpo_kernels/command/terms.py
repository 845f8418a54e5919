"""Sizes of terms of each output, to first order, which the accuracy rule multiplies by eps.

The tests have an analysis of every step; here the exact derivative of the loss, times the largest doubt about a
log-ratio, stands for all of it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.api import logits
from egpo_kernels.command.batches import Problem
from egpo_kernels.command.calls import ENTROPY_UPSTREAM, REFERENCE, Outputs, group_advantages, of_losses, upstream
from egpo_kernels.config.settings import PolicyLossConfig, Recipe

Terms = dict[str, Tensor | float]

EVERY_RATIO = 1e9
"""Below it no ratio of the batches is clipped."""
STEPS = 4
"""Of a group-level result: mean, spread, quotient, weight, each at most as large as the largest."""


class Coefficients(NamedTuple):
    """Of a row's gradient with respect to its log-prob and entropy, ``[N]`` each, and the size of the loss, like it."""

    slope: Tensor
    bonus: Tensor
    loss: Tensor


def of_log_probs(problem: Problem) -> Coefficients:
    """Of what `egpo_kernels.command.calls.token_log_probs` differentiates."""
    slope = upstream(problem.exact).double().abs().flatten()
    return Coefficients(slope, torch.full_like(slope, ENTROPY_UPSTREAM), slope.new_zeros(()))


def of_loss(problem: Problem, recipe: Recipe | PolicyLossConfig, old: bool = True, times: float = 1.0) -> Coefficients:
    """Exact derivatives; and the loss were every advantage negative, so that no two terms cancel out."""
    batch, config = problem.exact, recipe.loss if isinstance(recipe, Recipe) else recipe
    given: dict[str, Any] = {**of_losses(batch), "backend": REFERENCE}
    advantages, old_log_probs = batch.advantages, batch.old_log_probs if old else None
    if isinstance(recipe, Recipe):
        source = batch if old else batch._replace(old_log_probs=batch.log_probs)
        advantages = group_advantages(source, REFERENCE, recipe.advantage)["advantages"]

    def derivatives(chosen: Tensor, config: PolicyLossConfig = config) -> tuple[Tensor, list[Tensor]]:
        leaves = [value.clone().requires_grad_() for value in (batch.log_probs, batch.entropy)]
        options = {**given, "entropy": leaves[1], "config": config}
        loss = logits.policy_loss(leaves[0], old_log_probs, chosen, batch.mask, **options).loss
        found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        return loss.detach().abs(), [
            torch.zeros_like(leaf) if it is None else it.abs() for it, leaf in zip(found, leaves, strict=True)
        ]

    slope, bonus = derivatives(advantages)[1]
    if config.surrogate == "sapo":
        # 1 - sigmoid, from a rounded sigmoid, loses the digits that they share.
        unclipped = PolicyLossConfig(clip_low=1.0, clip_high=EVERY_RATIO, reduction=config.reduction)
        slope = slope + 4 * derivatives(advantages, unclipped)[1][0] / problem.doubt
    size = derivatives(-advantages.abs())[0]
    return Coefficients(abs(times) * slope.flatten(), abs(times) * bonus.flatten(), size)


def of_outputs(problem: Problem, coefficients: Coefficients, exact: Outputs) -> Terms:
    """For each output its terms."""
    doubt, batch = problem.doubt, problem.exact
    rows = doubt * (coefficients.slope + coefficients.bonus)
    found: Terms = {}
    for name, value in exact.items():
        if name == "log_probs":
            found[name] = doubt
        elif name == "entropy":
            found[name] = problem.entropy
        elif name == "loss":
            found[name] = doubt * coefficients.loss
        elif name == "metrics":
            found[name] = doubt * (1 + value.abs() + coefficients.loss.sum())
        elif name == "gradient of logits":
            found[name] = (rows[:, None] * problem.spread).view(value.shape)
        elif name == "gradient of hidden":
            assert batch.weight is not None and problem.given.hidden is not None
            sizes = (rows[:, None] * problem.spread @ batch.weight.abs()).view(value.shape)
            if "gradient of weight" not in exact:
                # Where a frozen head's coefficient comes late, rows are rounded before they are scaled, and after.
                rounding = torch.finfo(problem.given.hidden.dtype).eps / 2
                sizes += value.abs() * (rounding / (4 * torch.finfo(torch.float32).eps))
            found[name] = sizes
        elif name == "gradient of weight":
            assert batch.hidden is not None
            found[name] = (rows[:, None] * problem.spread).t() @ batch.hidden.abs().flatten(0, -2)
        elif name == "gradient of log_probs":
            found[name] = doubt * coefficients.slope.view(value.shape)
        elif name == "gradient of entropy":
            found[name] = doubt * coefficients.bonus.view(value.shape)
        else:
            found[name] = STEPS * float(value.abs().nan_to_num(0.0).max())
    return found
