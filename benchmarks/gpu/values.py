"""Loss, gradient, log-probs and entropy of compiled kernels beside float64."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import egpo_kernels as ek
from benchmarks.errors import allowance, distance

CONFIGS = {"one pass": ek.PolicyLossConfig(), "sequence ratio": ek.PolicyLossConfig(ratio="sequence", entropy_coef=0.1)}
VOCABS = {"cuda": (151936, 32003), "cpu": (1030, 515)}
SHAPE = {"cuda": (2, 64), "cpu": (2, 4)}


class Given(NamedTuple):
    """A batch whose log-ratios are small, and whose advantages do not cancel out in the loss."""

    logits: Tensor
    tokens: Tensor
    advantages: Tensor
    mask: Tensor
    old_log_probs: Tensor


def given(device: str, vocab: int) -> Given:
    """Bfloat16 logits over ``vocab``, each sequence's last position masked."""
    generator, shape = torch.Generator(device).manual_seed(0), SHAPE[device]
    logits = (3 * torch.randn(*shape, vocab, generator=generator, device=device)).to(torch.bfloat16)
    tokens = torch.randint(vocab, shape, generator=generator, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[:, -1] = False
    exact = ek.token_log_probs(logits.double(), tokens, backend="reference").log_probs
    old = (exact + 0.05 * torch.randn(shape, generator=generator, device=device)).float()
    return Given(logits, tokens, torch.linspace(0.5, 2.0, shape[0], device=device), mask, old)


def loss_and_gradient(batch: Given, backend: str, config: ek.PolicyLossConfig, inplace: bool) -> dict[str, Tensor]:
    """Of `logits_policy_loss`; in place the logits are a copy's."""
    leaf = batch.logits.clone().requires_grad_()
    rest = (batch.tokens, batch.advantages, batch.mask)
    options = {"old_log_probs": batch.old_log_probs, "config": config, "inplace_grad": inplace, "backend": backend}
    loss, _ = ek.logits_policy_loss(leaf, *rest, **options)
    loss.backward()
    return {"loss": loss.detach(), "gradient": leaf.grad}


@torch.no_grad()
def log_probs_and_entropy(batch: Given, backend: str) -> dict[str, Tensor]:
    """Of `token_log_probs`."""
    found = ek.token_log_probs(batch.logits, batch.tokens, mask=batch.mask, return_entropy=True, backend=backend)
    return found._asdict()


def compared(what: str, vocab: int, run: Callable[[], dict[str, Tensor]], exact: dict[str, Tensor]) -> dict[str, Any]:
    """Each output's error, and whether all are what rounding explains."""
    found = run()
    errors = {name: distance(found[name], exact[name]).item() for name in exact}
    right = all(errors[name] <= allowance(found[name].dtype) for name in exact)
    shown = {name: f"{error:.1e}" for name, error in errors.items()}
    return {"kind": "value", "what": what, "vocab": vocab, **shown, "right": right}


def values(device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """A job for each vocabulary and each way to ask for a loss, in place too, and for the values alone."""
    for vocab in VOCABS[device]:
        batch = given(device, vocab)
        double = Given(*(field.double() if field.is_floating_point() else field for field in batch))
        run = partial(log_probs_and_entropy, batch, "triton")
        exact = log_probs_and_entropy(double, "reference")
        yield "log-probs", partial(compared, "log-probs", vocab, run, exact)
        for name, config in CONFIGS.items():
            exact = loss_and_gradient(double, "reference", config, False)
            for inplace in (False, True):
                what = f"{name}, in place" if inplace else name
                run = partial(loss_and_gradient, batch, "triton", config, inplace)
                yield what, partial(compared, what, vocab, run, exact)
