"""The specification against its own derivatives, first and second.

Everything here runs `backend="reference"` in float64; `tests/api/test_properties.py` holds the other backends to it.
"""

import math

import pytest
import torch

import egpo_kernels as ek
from tests.support.make_case import make_case
from tests.support.runs import loss_of

LOSS_SETTINGS = [
    {},
    {"ratio": "sequence", "kl": "k1", "kl_coef": 0.3, "reduction": "seq_mean_token_mean"},
    {"dual_clip": 1.5, "kl": "k2", "kl_coef": 0.3, "reduction": "seq_mean_token_sum"},
    {"kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.2, "reduction": "seq_mean_token_sum_norm", "norm_length": 3.0},
    {"ratio": "sequence", "entropy_coef": -0.2, "reduction": "none"},
    {"reduction": "sum", "entropy_coef": 0.2},
]


def settled(seed, old, settings):
    recipe = ek.recipes.EGPO.replace(**settings)
    return make_case(
        seed, group_sizes=(2, 2), length=2, vocab=5, dtype=torch.float64, old=old, temperature="sequence", recipe=recipe
    )


@pytest.mark.parametrize("settings", LOSS_SETTINGS, ids=str)
def test_derivatives_of_policy_loss(settings):
    """First derivatives by differences; the second ones too, which only the reference has."""
    case = settled(1, "near", settings)
    entropy = torch.rand(case.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [value.to(case.rewards).requires_grad_() for value in (case.log_probs().view(case.tokens.shape), entropy)]

    def loss(log_probs, entropy):
        return ek.policy_loss(
            log_probs,
            mask=case.mask,
            advantages=case.advantages,
            entropy=entropy,
            config=case.recipe.loss,
            backend="reference",
            **case.loss_arguments(),
        ).loss

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("settings", LOSS_SETTINGS, ids=str)
def test_derivatives_of_logits_policy_loss(settings):
    case = settled(2, "near", settings)

    def loss(logits):
        return loss_of(case, logits, "reference").loss

    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("settings", LOSS_SETTINGS, ids=str)
def test_derivatives_on_policy(settings):
    """The loss itself is flat there (the ratio is 1 wherever one moves): its derivatives are those at l_old = l."""
    case = settled(3, "none", settings)
    found = []
    for old in (None, case.log_probs().view(case.tokens.shape)):
        logits = case.logits.clone().requires_grad_()
        loss, _ = loss_of(case, logits, "reference", old_log_probs=old)
        (first,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        found.append((loss.detach(), first.detach(), second))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_derivatives_of_token_log_probs():
    case = settled(4, "none", {})
    logits = case.logits.clone()
    logits[..., 1] = -math.inf  # a padded vocabulary; differences there would be NaN, so it is not a variable
    finite = logits.isfinite()
    tokens = torch.where(case.tokens == 1, 0, case.tokens)

    def found(variables):
        z = logits.masked_scatter(finite, variables)
        found = ek.token_log_probs(z, tokens, mask=case.mask, temperature=0.7, return_entropy=True, backend="reference")
        return tuple(found)

    variables = logits[finite].requires_grad_()
    assert torch.autograd.gradcheck(found, variables)
    assert torch.autograd.gradgradcheck(found, variables)


def test_double_backward_of_egpo_loss():
    """A gradient penalty can be differentiated: create_graph works on the reference."""
    case = settled(5, "near", {"entropy_coef": 0.1})
    logits = case.logits.clone().requires_grad_()
    loss, _ = ek.egpo_loss(
        logits, case.tokens, case.groups, case.rewards, mask=case.mask, recipe=case.recipe, backend="reference"
    )
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    gradient.square().sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad != 0).any()
