"""The specification asked for numbers that are worked out by hand: `backend="reference"` in float64."""

import torch

import egpo_kernels as ek
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig

H = (1.0, 2.0, 4.0, 1.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, *expected):
    torch.testing.assert_close(actual.double().reshape(-1), tensor(*expected), rtol=1e-9, atol=1e-9, equal_nan=True)


def advantages(rewards, uncertainties=None, groups=None, correct=None, **settings):
    """`group_advantages` of sequences of two tokens whose NLL averages to `uncertainties`: 0.5 H and 1.5 H."""
    old = None if uncertainties is None else -tensor(*uncertainties)[:, None] * tensor(0.5, 1.5)
    if old is None:
        settings["weight"] = "none"
    return ek.group_advantages(
        len(rewards) if groups is None else groups,
        tensor(*rewards),
        old,
        correct=None if correct is None else torch.tensor(correct),
        config=AdvantageConfig(**settings),
        backend="reference",
    )


def token_loss(ratios, advantage, **settings):
    """Per-token losses and their slopes dL/dl, for one sequence with these ratios."""
    log_probs = tensor(*ratios).log()[None].requires_grad_()
    extra = {name: settings.pop(name) for name in ("ref_log_probs", "entropy", "rollout_weights") if name in settings}
    config = PolicyLossConfig(**{"reduction": "none", **settings})
    losses, metrics = ek.policy_loss(
        log_probs, torch.zeros_like(log_probs), tensor(advantage), config=config, backend="reference", **extra
    )
    losses.sum().backward()
    return losses.detach(), log_probs.grad, metrics
