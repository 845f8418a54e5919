"""What the portable backend computes in closed form, beside autograd through the reference, in float64."""

import importlib

import pytest
import torch

from egpo_kernels import portable, reference
from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas.metrics import TOKEN
from egpo_kernels.formulas.token_metrics import BLOCK, wide_sum
from egpo_kernels.inputs.segments import Segments
from tests.support.device import DEVICE

KL = {"kl_coef": 0.3, "kl_max": 0.5}
CONFIGS = [
    {},
    {"dual_clip": 1.5, "max_log_ratio": 0.5},
    {"ratio": "sequence", "kl": "k1", **KL},
    {"ratio": "sequence", "kl_times_ratio": True, "max_log_ratio": 0.5, **KL},
    {"ratio": "sequence_token", "kl": "k2", "kl_times_ratio": True, **KL},
    {"surrogate": "cispo", "clip_high": 0.5, "max_log_ratio": 0.5, "kl_times_ratio": True, **KL},
    {"surrogate": "sapo", "kl": "k2", "kl_times_ratio": "on_policy", **KL},
    {"surrogate": "gmpo", "clip_low": 0.3, "clip_high": 0.3, "max_log_ratio": 0.5, "kl_times_ratio": True, **KL},
]
LENGTHS = (3, 0, 40, 20)


def drawn():
    """Log-probs, entropy, rows and segments: masked rows and a dead one, a weight that is NaN, an empty sequence."""
    count, generator = sum(LENGTHS) + 1, torch.Generator().manual_seed(0)
    log_probs, near, advantages, factor, weights, entropy = torch.randn(
        6, count, dtype=torch.float64, generator=generator
    ).to(DEVICE)
    log_probs, mask = -log_probs.abs(), torch.ones(count, dtype=torch.bool, device=DEVICE)
    mask[-1] = mask[5] = False
    weights[7] = torch.nan
    rows = Rows(mask, None, None, advantages, factor, log_probs + near, log_probs - near / 2, weights)
    log_probs = log_probs.clone()
    log_probs[9] = -torch.inf
    offsets = torch.tensor((0, *LENGTHS), device=DEVICE).cumsum(0)
    return log_probs, entropy.abs(), rows, Segments(len(log_probs), len(LENGTHS), offsets)


@pytest.mark.parametrize("per_token", [False, True], ids=["one upstream", "upstream per token"])
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_loss_metrics_and_gradients_are_those_of_autograd(options, per_token):
    config = PolicyLossConfig(entropy_coef=0.1, **options)
    log_probs, entropy, rows, segments = drawn()
    upstream = (
        torch.linspace(-1, 2, len(log_probs), dtype=torch.float64, device=DEVICE) if per_token else rows.factor[3]
    )
    leaves = [log_probs.clone().requires_grad_(), entropy.clone().requires_grad_()]
    losses, vector = reference.policy_loss(*leaves, rows, segments, config, 0, True, True)
    wanted = torch.autograd.grad((losses * upstream).sum(), leaves)
    assert all((gradient != 0).any() and gradient.isfinite().all() for gradient in wanted)

    found = portable.policy_loss_gradient(log_probs, rows, segments, config, upstream, True)
    each, seen = portable.policy_loss(log_probs, entropy, rows, segments, config, 0, True, True)
    loss, nothing = portable.policy_loss(log_probs, entropy, rows, segments, config, 0, False, False)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for actual, expected in zip((*found, each, loss, seen), (*wanted, losses, losses.sum(), vector), strict=True):
        torch.testing.assert_close(actual, expected.detach(), equal_nan=True, **close)
    assert nothing.shape == (0,) and seen.shape == (len(TOKEN.keys),)
    assert portable.policy_loss_gradient(log_probs, rows, segments, config, upstream, False)[1].shape == (0,)


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_an_upstream_gradient_of_rows_that_do_not_count_goes_nowhere(options):
    config = PolicyLossConfig(entropy_coef=0.1, **options)
    log_probs, _, rows, segments = drawn()
    upstream = torch.ones_like(log_probs)
    wanted = portable.policy_loss_gradient(log_probs, rows, segments, config, upstream, True)
    still = ~rows.mask | (log_probs == -torch.inf)
    assert still.sum() == 3
    for value in (torch.nan, torch.inf):
        upstream[still] = value
        found = portable.policy_loss_gradient(log_probs, rows, segments, config, upstream, True)
        for actual, expected in zip(found, wanted, strict=True):
            assert torch.equal(actual, expected) and (actual[still] == 0).all()


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 1000 * BLOCK + 7])
def test_a_wide_sum_loses_no_more_than_its_blocks(count):
    """Equal numbers, whose roundings all go one way: however many there are, two eps are enough."""
    values = torch.full((count,), 0.1, device=DEVICE)
    exact = values.double().sum().cpu()
    found = wide_sum(values).cpu()
    assert (found.double() - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact


LENGTH = 12


def rectangular():
    """As `drawn`, padded, with a number for each sequence where one may be: ``[S, T]``, ``[S, 1]`` and 0-d."""
    log_probs, entropy, rows, _ = drawn()
    count = len(log_probs) // LENGTH
    log_probs, entropy, mask, old, ref = (
        it[: count * LENGTH].view(count, LENGTH)
        for it in (log_probs, entropy, rows.mask, rows.old_log_probs, rows.ref_log_probs)
    )
    mask = mask.clone()
    mask[1, 5:] = mask[3] = False
    advantages, weights = (it[:count, None] for it in (rows.advantages, rows.rollout_weights))
    broad = Rows(mask, None, None, advantages, rows.factor[3], old, ref, weights)
    return log_probs, entropy, broad, Segments(count * LENGTH, count)


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_rows_that_broadcast_are_those_that_were_spread(options):
    config = PolicyLossConfig(entropy_coef=0.1, **options)
    log_probs, entropy, broad, segments = rectangular()
    flat = Rows(*(None if it is None else it.expand(segments.shape).reshape(-1) for it in broad))
    values = log_probs.reshape(-1), entropy.reshape(-1)
    wanted = portable.policy_loss(*values, flat, segments, config, 0, False, True)
    wanted += portable.policy_loss_gradient(values[0], flat, segments, config, 1.0, True)

    found = portable.policy_loss_and_gradient(log_probs, entropy, broad, segments, config, True, True)
    assert all((it != 0).any() for it in found)
    for actual, expected in zip(found[:4], wanted, strict=True):
        torch.testing.assert_close(actual.reshape(expected.shape), expected, equal_nan=True, rtol=1e-12, atol=1e-12)
    loss, nothing, _, bonus, live = portable.policy_loss_and_gradient(
        log_probs, entropy, broad, segments, config, False, False
    )
    assert torch.equal(loss, found[0]) and nothing.shape == bonus.shape == (0,)
    assert torch.equal(live, broad.mask & (log_probs != -torch.inf))


@pytest.mark.parametrize("upstream", [2.5, 0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("look", [True, False])
def test_one_upstream_reaches_live_rows_only(upstream, look, monkeypatch):
    if not look:
        module = importlib.import_module("egpo_kernels.portable.policy_loss")  # the package has a function of that name
        monkeypatch.setattr(module, "at_hand", lambda values: False)
    gradients = [torch.tensor([1.5, 0, -2, 0], device=DEVICE), torch.tensor([3.0, 1, 1, 0], device=DEVICE)]
    live = torch.tensor([True, True, True, False], device=DEVICE)
    found = portable.scaled_gradients(gradients, live, torch.tensor(upstream, device=DEVICE))
    for actual, gradient in zip(found, gradients, strict=True):
        wanted = torch.where(live, gradient * upstream, 0.0)
        torch.testing.assert_close(actual, wanted, equal_nan=True, rtol=0, atol=0)
