"""The loss of a token, and reductions, in numbers worked out by hand (EGPO, arXiv 2602.22751, Eq. 12).

Everything here runs `backend="reference"` in float64; `tests/api/test_properties.py` holds the other backends to it.
"""

import math

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.config.settings import PolicyLossConfig
from tests.support.by_hand import close, tensor, token_loss

INF, NAN = math.inf, math.nan
LOG2 = math.log(2)


def test_clip():
    """Ratios 0.5, 1, 1.5 under clip 0.2/0.28, old log-probs 0."""
    # A = 2: -min(2 rho, 2 clip(rho)): -1, -2, and at 1.5 the bound 1.28 holds: -2.56, without slope.
    losses, slope, metrics = token_loss((0.5, 1.0, 1.5), 2.0, clip_high=0.28)
    close(losses, -1, -2, -2.56)
    close(slope, -1, -2, 0)
    close(metrics["policy/clip_low/mean"], 0)
    close(metrics["policy/clip_high/mean"], 1 / 3)
    close(metrics["policy/ratio/mean"], 1)
    close(metrics["policy/ratio/max"], 1.5)
    # A = -2: max(2 rho, 2 clip(rho)): at 0.5 the bound 0.8 holds: 1.6, without slope.
    losses, slope, metrics = token_loss((0.5, 1.0, 1.5), -2.0, clip_high=0.28)
    close(losses, 1.6, 2, 3)
    close(slope, 0, 2, 3)
    close(metrics["policy/clip_low/mean"], 1 / 3)
    close(metrics["policy/clip_high/mean"], 0)


def test_cispo_is_bounded_below_too():
    """-sg(clip(rho)) A l: 0.4 counts as 0.8, whatever the sign; clipped is what the advantage pushes out."""
    losses, slope, metrics = token_loss((0.4,), -1.0, surrogate="cispo", clip_low=0.2)
    close(losses, 0.8 * math.log(0.4))
    close(slope, 0.8)
    close(metrics["policy/clip_low/mean"], 1)
    losses, slope, metrics = token_loss((0.4, 2.0, 2.0), 1.0, surrogate="cispo", clip_low=0.2)
    close(slope, -0.8, -1.2, -1.2)
    close(metrics["policy/clip_low/mean"], 0)
    close(metrics["policy/clip_high/mean"], 2 / 3)
    _, slope, metrics = token_loss((0.4, 2.0), -1.0, surrogate="cispo", clip_low=1.0)
    close(slope, 0.4, 1.2)
    close(metrics["policy/clip_low/mean"], 0)
    close(metrics["policy/clip_high/mean"], 0)


def test_cispo_as_reported():
    """Ratio 0.4, A -1, log-prob -2.1, 0.2: loss -1.68, slope 0.8."""
    log_probs = tensor(-2.1)[None].requires_grad_()
    config = PolicyLossConfig(surrogate="cispo", clip_low=0.2)
    loss = ek.policy_loss(log_probs, log_probs.detach() - math.log(0.4), tensor(-1.0), config=config).loss
    loss.backward()
    close(loss.detach(), -1.68)
    close(log_probs.grad, 0.8)


def test_kl_times_a_ratio_of_one():
    """NeMo-RL: the estimate times exp(l - sg(l)), whose value is 1: itself once more in the gradient."""
    x = LOG2
    for ratios in ((1.0,), (1.5,)):
        given = {"kl": "k3", "kl_coef": 10.0, "ref_log_probs": tensor(*ratios).log()[None] + x}
        losses, slope, _ = token_loss(ratios, 0.0, kl_times_ratio="on_policy", **given)
        close(losses, 10 * (2 - x - 1))
        close(slope, 10 * ((1 - 2) + (2 - x - 1)))


def test_dual_clip():
    """c = 3 bounds the loss of a negative advantage by -c A = 6; a positive one is not touched by it."""
    losses, slope, metrics = token_loss((0.5, 2.0, 5.0), -2.0, dual_clip=3.0)
    close(losses, 1.6, 4, 6)
    close(slope, 0, 4, 0)
    close(metrics["policy/clip_high/mean"], 1 / 3)
    close(token_loss((0.5, 5.0), 2.0, dual_clip=3.0)[0], -1, -2.4)


def test_on_policy():
    """Without old log-probs the ratio is exactly 1: the loss is -A, its slope -A, whatever the log-prob."""
    log_probs = torch.tensor([[-0.1, -30.0, -5000.0]], requires_grad=True)
    losses, metrics = ek.policy_loss(
        log_probs,
        None,
        torch.tensor([0.7]),
        config=PolicyLossConfig(reduction="none", clip_low=0.0, clip_high=0.0),
        backend="reference",
    )
    losses.sum().backward()
    assert losses.tolist() == log_probs.grad.tolist() == [[-torch.tensor(0.7).item()] * 3]
    assert metrics["policy/ratio/min"] == metrics["policy/ratio/max"] == 1 and metrics["policy/approx_kl/mean"] == 0


def test_log_ratios_are_clamped():
    """Beyond M = 2 nats the ratio is e^2 or e^-2 and has no slope; old log-prob -inf is a log-ratio of +inf."""
    losses, slope, _ = token_loss((math.exp(3), math.exp(-3), math.exp(1.9)), -1.0, max_log_ratio=2.0, clip_low=1.0)
    close(losses, math.exp(2), math.exp(-2), math.exp(1.9))
    close(slope, 0, 0, math.exp(1.9))
    log_probs = tensor(-1.0)[None].requires_grad_()
    loss, _ = ek.policy_loss(log_probs, tensor(-INF)[None], tensor(-1.0), backend="reference")
    loss.backward()
    close(loss.detach(), math.exp(20))
    close(log_probs.grad, 0)


@pytest.mark.parametrize(
    "kl, values, slopes",
    [
        # x = l_ref - l = log 2 and -log 2, with kl_coef 10.
        ("k1", (-LOG2, LOG2), (1, 1)),
        ("k2", (LOG2**2 / 2, LOG2**2 / 2), (-LOG2, LOG2)),
        ("k3", (2 - LOG2 - 1, 0.5 + LOG2 - 1), (1 - 2, 1 - 0.5)),
    ],
)
def test_kl(kl, values, slopes):
    losses, slope, metrics = token_loss((1.0, 1.0), 0.0, kl=kl, kl_coef=10.0, ref_log_probs=tensor(LOG2, -LOG2)[None])
    close(losses, *(10 * value for value in values))
    close(slope, *(10 * value for value in slopes))
    close(metrics["policy/ref_kl/mean"], sum(values) / 2)
    # Beyond M: the clamped value, and no slope.
    losses, slope, _ = token_loss((1.0,), 0.0, kl="k1", kl_coef=1.0, ref_log_probs=tensor(-50.0)[None])
    close(losses, 20)
    close(slope, 0)


def test_order_of_the_terms():
    """Weights multiply the surrogate alone: 3 x (-2 rho) + 0.5 KL - 0.1 Ent with rho = 1, KL(k1) = -0.4, Ent = 2."""
    weights, entropy = tensor(3.0), tensor(2.0, 2.0)[None].requires_grad_()
    losses, _, metrics = token_loss(
        (1.0, 1.0),
        2.0,
        kl="k1",
        kl_coef=0.5,
        entropy_coef=0.1,
        ref_log_probs=tensor(0.4, 0.4)[None],
        entropy=entropy,
        rollout_weights=weights,
    )
    close(losses, -6.4, -6.4)
    close(entropy.grad, -0.1, -0.1)
    parts = ("surrogate", "kl", "entropy")
    close(torch.stack([metrics[f"policy/loss/{part}/sum"] for part in parts]), -12, -0.4, -0.4)
    # A token the sampler did not score has weight 1, and is counted.
    losses, _, metrics = token_loss((1.0, 1.0), 2.0, rollout_weights=tensor(3.0, NAN)[None])
    close(losses, -6, -2)
    assert metrics["policy/unscored_tokens/sum"] == 1


def test_sequence_ratio():
    """GSPO: ratios 0.5 and 8 share their geometric mean 2, and each token carries half of its slope."""
    losses, slope, metrics = token_loss((0.5, 8.0), -1.0, ratio="sequence", clip_high=0.2)
    close(losses, 2, 2)
    # d(2 + 2)/dl_t = sum over tokens of 2 x 1/2 = 2.
    close(slope, 2, 2)
    close(metrics["policy/ratio/mean"], 2)
    # Positive advantage: 2 > 1.2, clipped for both.
    losses, slope, _ = token_loss((0.5, 8.0), 1.0, ratio="sequence", clip_high=0.2)
    close(losses, -1.2, -1.2)
    close(slope, 0, 0)
    # A clamped token (log-ratio 3 > M = 2) enters the mean as 2 and gets no slope: exp((2 + 0)/2) = e.
    losses, slope, _ = token_loss((math.exp(3), 1.0), -1.0, ratio="sequence", max_log_ratio=2.0)
    close(losses, math.e, math.e)
    close(slope, 0, math.e)


# Three sequences with 3, 1 and 0 counted tokens, losses 1, 2, 3 and 4 (advantages -1, -2, ...).
@pytest.mark.parametrize(
    "reduction, counts, expected",
    [
        ("token_mean", {}, 10 / 4),
        ("token_mean", {"num_tokens": 8}, 10 / 8),
        ("seq_mean_token_mean", {}, (6 / 3 + 4 / 1) / 2),  # the empty sequence is none
        ("seq_mean_token_mean", {"num_sequences": 5}, (6 / 3 + 4 / 1) / 5),
        ("seq_mean_token_sum", {}, 10 / 2),
        ("seq_mean_token_sum", {"num_sequences": torch.tensor(5)}, 10 / 5),
        ("seq_mean_token_sum_norm", {}, 10 / (2 * 4)),
        ("seq_mean_token_sum_norm", {"num_sequences": 4.0}, 10 / (4 * 4)),
        ("sum", {}, 10),
        ("sum", {"num_tokens": 3, "num_sequences": 3}, 10),
    ],
)
def test_reductions(reduction, counts, expected):
    config = PolicyLossConfig(reduction=reduction, norm_length=4.0 if reduction.endswith("norm") else None)
    log_probs = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]])
    advantages = -tensor(1, 2, 3, 9, 4, 9, 9, 9, 9).view(3, 3)
    for cu_seqlens in (None, torch.tensor([0, 3, 6, 9])):
        given = [log_probs, advantages, mask]
        if cu_seqlens is not None:
            given = [value.flatten() for value in given]
        loss, metrics = ek.policy_loss(
            given[0], None, *given[1:], config=config, cu_seqlens=cu_seqlens, backend="reference", **counts
        )
        close(loss.detach(), expected)
        close(metrics["policy/loss/sum"], expected)
        assert metrics["policy/tokens/sum"] == 4


def test_reduction_none_keeps_the_shape():
    log_probs = torch.zeros(2, 2, dtype=torch.float64)
    config = PolicyLossConfig(reduction="none")
    mask = torch.tensor([[1, 0], [1, 1]])
    loss, _ = ek.policy_loss(log_probs, None, tensor(1, -2), mask, config=config, backend="reference")
    assert loss.tolist() == [[-1, 0], [2, 2]]
