"""A surrogate is written twice, in torch and as a device function: the two tables agree, derivatives included."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.formulas import surrogates as torch_side
from egpo_kernels.triton import surrogates as triton_side
from egpo_kernels.triton.settings import choices_of, read_settings, settings_of
from tests.support.device import DEVICE

CONFIGS = [
    PolicyLossConfig(),
    PolicyLossConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0, max_log_ratio=2.0),
    PolicyLossConfig(clip_low=0.0, clip_high=0.0),
    PolicyLossConfig(clip_low=1.0, clip_high=4.0, dual_clip=1.5),
    PolicyLossConfig(surrogate="cispo", clip_high=0.5, max_log_ratio=2.0),
    PolicyLossConfig(surrogate="cispo", clip_low=1.0, ratio_cap=0.9),
    PolicyLossConfig(surrogate="cispo", clip_low=0.1, ratio_cap=0.95),
    PolicyLossConfig(surrogate="sapo", max_log_ratio=2.0),
    PolicyLossConfig(surrogate="sapo", tau_positive=20.0, tau_negative=0.1),
    PolicyLossConfig(surrogate="gmpo", max_log_ratio=2.0),
]


@triton.jit
def surrogate_kernel(
    log_probs_ptr, old_ptr, advantages_ptr, out_ptr, numbers, SURROGATE: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.arange(0, BLOCK)
    settings, log_prob = read_settings(numbers, tl.float64), tl.load(log_probs_ptr + offs)
    log_ratio, inside = triton_side.clamped(log_prob - tl.load(old_ptr + offs), settings.max_log_ratio)
    loss, slope, low, high = SURROGATE(log_prob, log_ratio, inside, tl.load(advantages_ptr + offs), settings)
    tl.store(out_ptr + offs, loss)
    tl.store(out_ptr + BLOCK + offs, slope)
    tl.store(out_ptr + 2 * BLOCK + offs, low.to(tl.float64))
    tl.store(out_ptr + 3 * BLOCK + offs, high.to(tl.float64))


@triton.jit
def kl_kernel(log_probs_ptr, ref_ptr, out_ptr, numbers, choices: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value, slope = triton_side.kl_estimate(
        tl.load(log_probs_ptr + offs), tl.load(ref_ptr + offs), read_settings(numbers, tl.float64), choices
    )
    tl.store(out_ptr + offs, value)
    tl.store(out_ptr + BLOCK + offs, slope)


def points(count=256):
    generator = torch.Generator().manual_seed(0)
    log_probs = -3 * torch.rand(count, dtype=torch.float64, generator=generator)
    old = log_probs + torch.randn(count, dtype=torch.float64, generator=generator)
    advantages = torch.randn(count, dtype=torch.float64, generator=generator)
    advantages[:8] = 0
    return tuple(tensor.to(DEVICE) for tensor in (log_probs, old, advantages))


def test_the_tables_name_the_same_surrogates_and_every_one_is_compared():
    choices = {field.name: field for field in dataclasses.fields(PolicyLossConfig)}["surrogate"].metadata["choices"]
    assert set(torch_side.SURROGATES) == set(triton_side.SURROGATES) == set(choices)
    assert {config.surrogate for config in CONFIGS} == set(choices)


def assert_agree(torch_function, device_function, config):
    log_probs, old, advantages = points()
    leaf = log_probs.clone().requires_grad_()
    log_ratio, inside = torch_side.clamped(leaf - old, config.max_log_ratio)
    terms = torch_function(leaf, log_ratio.exp(), inside, advantages, config)
    (slope,) = torch.autograd.grad(terms.loss.sum(), leaf)

    out = torch.empty(4, len(log_probs), dtype=torch.float64, device=DEVICE)
    numbers = settings_of(config, 1.0, 1.0, torch.float64)
    surrogate_kernel[(1,)](log_probs, old, advantages, out, numbers, device_function, len(log_probs))
    # What a rounding may change: everything is a multiple of the advantage, at most the ratio and a gate's 4 times it.
    size = 4 * advantages.abs() * (1 + log_ratio.detach().exp()) * (1 + log_probs.abs())
    eps = torch.finfo(torch.float64).eps
    assert ((out[0] - terms.loss.detach()).abs() <= 4 * eps * size).all()
    for by_hand in (terms.slope.detach(), out[1]):
        assert ((by_hand - slope).abs() <= 4 * eps * size).all()
    assert torch.equal(out[3] - out[2], terms.clipped)
    return terms, slope, (log_probs - old).abs() > config.max_log_ratio


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.surrogate)
def test_value_derivative_and_clip_flags_agree(config):
    functions = (table[config.surrogate] for table in (torch_side.SURROGATES, triton_side.SURROGATES))
    terms, slope, beyond = assert_agree(*functions, config)
    if config == CONFIGS[1]:
        assert (terms.clipped < 0).any() and (terms.clipped > 0).any() and (slope == 0).sum() < len(slope)
    if config.max_log_ratio == 2.0:
        assert beyond.any() and ((slope[beyond] == 0).all() or config.surrogate == "cispo")


@pytest.mark.gpu
def test_the_worked_example_of_contributing_agrees(tmp_path, monkeypatch):
    """Both functions of the page, in a file, since a kernel is compiled from its source."""
    page = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    in_torch, on_device = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    imports = {
        "in_torch": "import torch\nfrom torch import Tensor\n"
        "from egpo_kernels.config.settings import PolicyLossConfig\n"
        "from egpo_kernels.formulas.surrogates import SurrogateTerms, passed\n",
        "on_device": "import triton\nimport triton.language as tl\n"
        "from egpo_kernels.triton.arithmetic import exponential\n",
    }
    for name, code in (("in_torch", in_torch), ("on_device", on_device)):
        (tmp_path / f"example_{name}.py").write_text(f"{imports[name]}\n\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    functions = (importlib.import_module(f"example_{name}").unclipped for name in imports)
    _, slope, beyond = assert_agree(*functions, PolicyLossConfig(max_log_ratio=2.0))
    assert beyond.any() and (slope[beyond] == 0).all() and (slope[~beyond] != 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [(0.5, None), (20.0, None), (20.0, 0.3)])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_kl_estimators_agree(kl, bounds):
    config = PolicyLossConfig(kl=kl, max_log_ratio=bounds[0], kl_max=bounds[1])
    log_probs, ref, _ = points()
    leaf = log_probs.clone().requires_grad_()
    value, by_hand = torch_side.kl_estimate(leaf, ref, config)
    (slope,) = torch.autograd.grad(value.sum(), leaf)

    out = torch.empty(2, len(log_probs), dtype=torch.float64, device=DEVICE)
    numbers = settings_of(config, 1.0, 1.0, torch.float64)
    kl_kernel[(1,)](log_probs, ref, out, numbers, choices_of(config), len(log_probs))
    eps = torch.finfo(torch.float64).eps
    assert (out[0] - value.detach()).abs().max() <= 4 * eps * (ref - log_probs).exp().max()
    for derivative in (by_hand.detach(), out[1]):
        assert (derivative - slope).abs().max() <= 4 * eps * (ref - log_probs).exp().max()
