"""Rows of logits without sequences around them: computed, picked out, compared bit for bit."""

import torch

import egpo_kernels as ek
from egpo_kernels.config.results import Rows
from tests.support.accuracy import assert_bits
from tests.support.device import DEVICE


def of_rows(logits: torch.Tensor, tokens: torch.Tensor, backend: str, upstream: torch.Tensor, **options) -> dict:
    """`token_log_probs` of packed rows and the gradient of the weighted sum of both its results."""
    logits = logits.detach().requires_grad_()
    found = ek.token_log_probs(logits, tokens, return_entropy=True, backend=backend, **options)
    torch.autograd.backward(found, [upstream, 0.3 * upstream])
    return {"log_probs": found.log_probs.detach(), "entropy": found.entropy.detach(), "gradient": logits.grad}


def one_pass(logits: torch.Tensor, tokens: torch.Tensor, backend: str, upstream: torch.Tensor) -> dict:
    """The gradient that `logits_policy_loss` makes while it reads; `upstream` serves as advantages per token."""
    logits = logits.detach().requires_grad_()
    config = ek.PolicyLossConfig(reduction="sum", entropy_coef=0.1)
    ends = torch.tensor([0, len(tokens)], device=tokens.device)
    loss, _ = ek.logits_policy_loss(logits, tokens, upstream, config=config, cu_seqlens=ends, backend=backend)
    loss.backward()
    return {"gradient": logits.grad}


def rows_of(count: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(count, vocab, generator=generator)).to(dtype)
    tokens = torch.randint(vocab, (count,), generator=generator)
    return tuple(value.to(DEVICE) for value in (logits, tokens, torch.randn(count, generator=generator)))


def assert_same(actual: dict, expected: dict, where: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_bits(value, expected[name], f"{name} {where}")


def picked(found: dict, rows) -> dict:
    return {name: value[rows] for name, value in found.items()}


def rows_of_a_loss(count: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, Rows]:
    """Rows of ``[2, count / 2, V]`` with their logits: some masked, some clipped, each at another temperature."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(2, count // 2, vocab, generator=generator)).to(dtype)
    tokens = torch.randint(vocab, (count,), generator=generator)
    mask = torch.rand(count, generator=generator) < 0.75
    normal = torch.randn(4, count, generator=generator)
    old = logits.float().log_softmax(-1).flatten(0, 1).gather(1, tokens[:, None])[:, 0] + normal[3]
    vectors = (mask, tokens, normal[0].exp(), normal[1], normal[2].abs(), old, None, None)
    return logits.to(DEVICE), Rows(*(None if field is None else field.to(DEVICE) for field in vectors))


def picked_rows(rows: Rows, places: list[int]) -> Rows:
    return Rows(*(None if field is None else field[places] for field in rows))
