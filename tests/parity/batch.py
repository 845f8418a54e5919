"""One small batch that reaches every bound, our answer to it, and how two answers are compared."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels import PolicyLossConfig, policy_loss
from tests.parity.facts import Facts, Same, arguments, combinations
from tests.support.accuracy import assert_rounding

SETTINGS = PolicyLossConfig().to_dict()


class Batch(NamedTuple):
    """What a loss is given: per token ``[S, T]``, advantages ``[S]``."""

    log_probs: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    sampler_log_probs: Tensor
    entropy: Tensor
    weights: Tensor
    mask: Tensor
    advantages: Tensor


class Answer(NamedTuple):
    """A loss, its gradient with respect to the log-probs and, of ours, the sum of the sizes of the loss's terms."""

    loss: Tensor
    gradient: Tensor
    size: Tensor | None = None


def make_batch(empty: bool = False) -> Batch:
    """Eight responses of up to 24 tokens, two of them with a hole (a tool's output); the last one has no token left
    if ``empty``.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(8, 24, generator=generator)

    log_probs = -noise(1.5).abs() - 0.05
    lengths = torch.tensor([24, 3, 17, 1, 24, 9, 20, 0 if empty else 12])
    mask = torch.arange(24) < lengths[:, None]
    mask[2, 4:7] = mask[6, 10] = False
    old = log_probs + noise(0.5)
    old[3, 0] = log_probs[3, 0] - 0.7  # a sequence ratio of 2
    sampler = log_probs + noise(0.3)
    sampler[0, 5] = torch.nan  # not scored
    ref = log_probs + noise(0.7)
    ref[0, 3], ref[5, 2] = log_probs[0, 3] + 4, log_probs[5, 2] - 15  # k3 is above 10 there
    return Batch(
        log_probs,
        old,
        ref,
        sampler,
        noise(1.0).abs(),
        noise(0.5).exp(),
        mask,
        torch.tensor([1.2, -0.7, 0.9, -1.1, -0.4, 0.6, 0.0, -1.6]),
    )


def differentiated(function, log_probs: Tensor) -> Answer:
    """``function(log_probs)`` and its gradient."""
    leaf = log_probs.clone().requires_grad_()
    loss = function(leaf)
    loss.backward()
    return Answer(loss.detach(), leaf.grad)


def ours(batch: Batch, **given: Any) -> Answer:
    """Our loss: settings of `PolicyLossConfig` and arguments of `policy_loss`, mixed."""
    config = PolicyLossConfig(**{name: value for name, value in given.items() if name in SETTINGS})
    others = {name: value for name, value in given.items() if name not in SETTINGS}
    others.setdefault("ref_log_probs", batch.ref_log_probs if config.kl_coef else None)
    others.setdefault("entropy", batch.entropy if config.entropy_coef else None)
    others.setdefault("old_log_probs", batch.old_log_probs)

    def function(log_probs: Tensor, config: PolicyLossConfig = config) -> Tensor:
        return policy_loss(log_probs, advantages=batch.advantages, mask=batch.mask, config=config, **others).loss

    terms = function(batch.log_probs, dataclasses.replace(config, reduction="none", norm_length=None))
    size = (terms.abs() * shares(batch, config, others)).sum()
    return differentiated(function, batch.log_probs)._replace(size=size)


def shares(batch: Batch, config: PolicyLossConfig, others: dict[str, Any]) -> Tensor:
    """What the reduction multiplies each token's loss by: the gradient of a loss that is minus the log-probs."""
    plain = PolicyLossConfig(reduction=config.reduction, norm_length=config.norm_length)
    counts = {name: others[name] for name in ("num_tokens", "num_sequences") if name in others}
    down = -torch.ones_like(batch.advantages)
    return differentiated(
        lambda log_probs: policy_loss(log_probs, None, down, batch.mask, config=plain, **counts).loss, batch.log_probs
    ).gradient


def written(rows: tuple[Same, ...], side: str, names: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of several rows together, later rows winning."""
    found: dict[str, Any] = {}
    for row in rows:
        found |= arguments(getattr(row, side), names)
    return found


def assert_same(found: Answer, expected: Answer) -> None:
    """The same loss and the same gradient, to rounding: the loss to that of its terms, which may cancel."""
    assert_rounding(found.gradient, expected.gradient)
    assert_rounding(torch.stack([found.loss, found.size]), torch.stack([expected.loss, found.size]))


def assert_told_apart(batch: Batch, facts: Facts, names: dict[str, Any], theirs: Callable[..., Answer]) -> None:
    """Each modifier changes the numbers of each loss it goes with, unless it says what the loss says already."""
    for loss, modifier in combinations(facts):
        plain, changed = written((loss,), "ours", names), written((loss, modifier), "ours", names)
        if PolicyLossConfig().to_dict() | plain != PolicyLossConfig().to_dict() | changed:
            found = ours(batch, **plain)
            assert not same(found, theirs(**written((loss, modifier), "theirs", names))), (loss.theirs, modifier.theirs)


def same(found: Answer, expected: Answer) -> bool:
    """Whether `assert_same` would pass."""
    try:
        assert_same(found, expected)
    except AssertionError:
        return False
    return True
