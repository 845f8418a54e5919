"""From logits to log-probs, loss and gradient, in numbers worked out by hand.

Everything here runs `backend="reference"` in float64; `tests/api/test_properties.py` holds the other backends to it.
"""

import math

import torch

import egpo_kernels as ek
from egpo_kernels.config.settings import PolicyLossConfig
from tests.support.by_hand import close, tensor


def test_log_probs_and_entropy():
    """Logits (log 1, log 2, log 5) at temperature 1: p = 1/8, 2/8, 5/8. At 1/2: p ~ 1, 4, 25 of 30."""
    logits = tensor(1, 2, 5).log().expand(1, 2, 3) + 1000.0
    tokens = torch.tensor([[2, 0]])
    found = ek.token_log_probs(logits, tokens, return_entropy=True, backend="reference")
    close(found.log_probs, math.log(5 / 8), math.log(1 / 8))
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    close(found.entropy, entropy, entropy)
    found = ek.token_log_probs(logits, tokens, temperature=0.5, backend="reference")
    close(found.log_probs, math.log(25 / 30), math.log(1 / 30))


def test_gradient_of_the_logits():
    """Temperature 1/2 makes p = 1, 4, 25 of 30; token 2, A = 2, on-policy: a = -2, dz = a/0.5 (onehot - p)."""
    logits = tensor(1, 2, 5).log().expand(1, 1, 3).clone().requires_grad_()
    loss, _ = ek.logits_policy_loss(logits, torch.tensor([[2]]), tensor(2.0), temperature=0.5, backend="reference")
    loss.backward()
    close(loss.detach(), -2)
    close(logits.grad, 4 * 1 / 30, 4 * 4 / 30, -4 * 5 / 30)


def test_gradient_of_the_entropy_bonus():
    """Advantage 0: dz = coef p (log p + Ent) with p = 1/4, 3/4 at temperature 1."""
    logits = tensor(1, 3).log().view(1, 1, 2).requires_grad_()
    config = PolicyLossConfig(entropy_coef=0.1)
    loss, _ = ek.logits_policy_loss(logits, torch.tensor([[0]]), tensor(0.0), config=config, backend="reference")
    loss.backward()
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    close(loss.detach(), -0.1 * entropy)
    close(logits.grad, *(0.1 * p * (math.log(p) + entropy) for p in (0.25, 0.75)))


def test_uncertainty_comes_from_the_logits_on_policy():
    """Two answers of one token, p = 1/8 and 5/8 of the sampled one: H = log 8 and log 1.6, without clamp or weights."""
    logits = tensor(1, 2, 5).log().expand(2, 1, 3).clone().requires_grad_()
    recipe = ek.recipes.EGPO.replace(clamp="none", uncertainty_eps=1e-12)
    loss, metrics = ek.egpo_loss(logits, torch.tensor([[0], [2]]), 2, tensor(1, 0), recipe=recipe, backend="reference")
    loss.backward()
    h = (math.log(8), math.log(1.6))
    weights = [sum(h) / 2 / value for value in h]
    base = 0.5 / (math.sqrt(0.5) + 1e-6)
    close(metrics["egpo/uncertainty/correct/mean"], h[0])
    close(metrics["egpo/uncertainty/incorrect/mean"], h[1])
    # Loss: -(w_0 b - w_1 b)/2. No gradient flows through the weights: dl is -A/2 and A_1 is negative.
    close(loss.detach(), -(weights[0] - weights[1]) * base / 2)
    a = [-weights[0] * base / 2, weights[1] * base / 2]
    p = (1 / 8, 2 / 8, 5 / 8)
    close(logits.grad[0, 0], *(a[0] * ((j == 0) - p[j]) for j in range(3)))
    close(logits.grad[1, 0], *(a[1] * ((j == 2) - p[j]) for j in range(3)))


def test_grpo_recipe():
    """GRPO: no weights, collapsed groups give nothing, mean over each response."""
    logits = torch.zeros(4, 2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    tokens = torch.zeros(4, 2, dtype=torch.long)
    loss, metrics = ek.egpo_loss(logits, tokens, 2, tensor(1, 0, 0, 0), mask=mask, recipe="grpo", backend="reference")
    close(loss, 0)  # -(+b + -b)/4, each response's mean weighing alike whatever its length
    assert metrics["egpo/weight/min"] == metrics["egpo/weight/max"] == 1
    close(metrics["egpo/advantage/sum"], 0)
