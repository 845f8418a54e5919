"""Logits of more than 2^31 elements, whose offsets 32 bits cannot hold: each row as if it were alone."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.case import strided
from tests.support.device import DEVICE, size

pytestmark = [pytest.mark.gpu, pytest.mark.memory]

SEQUENCES, LENGTH, VOCAB = size((3, 2, 515), (8, 2048, 151936))
PERIOD = 7
"""Rows repeat; but what is asked of each differs, and an offset that wraps lands inside another row."""

ONE_PASS = ek.PolicyLossConfig(reduction="sum", entropy_coef=0.05)
TWO_PASS = ek.PolicyLossConfig(reduction="sum", entropy_coef=0.05, ratio="sequence")

CASES = {
    "one pass": ("contiguous", ONE_PASS, False, 1.0),
    "two passes": ("contiguous", TWO_PASS, False, 1.0),
    "rescaled": ("contiguous", ONE_PASS, False, 3.0),
    "in place, strided, rescaled": ("padded rows", ONE_PASS, True, 3.0),
    "in place, strided, two passes": ("padded rows", TWO_PASS, True, 1.0),
    "transposed": ("transposed", ONE_PASS, False, 1.0),
    "in place, transposed, rescaled": ("transposed", ONE_PASS, True, 3.0),
    "transposed, two passes": ("transposed", TWO_PASS, False, 1.0),
}


def make_logits(strides):
    generator = torch.Generator().manual_seed(0)
    rows = (3 * torch.randn(PERIOD, VOCAB, generator=generator)).to(torch.bfloat16).to(DEVICE)
    logits = torch.empty(SEQUENCES * LENGTH, VOCAB, dtype=torch.bfloat16, device=DEVICE)
    for part in logits.split(PERIOD):
        part.copy_(rows[: len(part)])
    return strided(logits.view(SEQUENCES, LENGTH, VOCAB), strides)


def make_rest():
    """Tokens in every part of the vocabulary, advantages, a mask with holes in every sequence."""
    count = torch.arange(SEQUENCES * LENGTH)
    tokens = (count * 7919 + 1).remainder(VOCAB).view(SEQUENCES, LENGTH)
    mask = (count % LENGTH % 5 != 2).view(SEQUENCES, LENGTH)
    advantages = torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(1))
    return tuple(tensor.to(DEVICE) for tensor in (tokens, advantages, mask))


def gradient(logits, rest, old, config, inplace, upstream):
    leaf = logits.detach().requires_grad_()
    options = {"old_log_probs": old, "config": config, "inplace_grad": inplace, "backend": "triton"}
    loss, _ = ek.logits_policy_loss(leaf, *rest, **options)
    # Accumulated into a leaf with gaps between its rows, it would be copied to dense memory.
    return torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))[0]


@pytest.mark.parametrize("strides, config, inplace, upstream", CASES.values(), ids=CASES)
def test_every_row_as_if_it_were_alone(strides, config, inplace, upstream):
    logits, rest = make_logits(strides), make_rest()
    assert size(True, logits.numel() > 2**31)
    log_probs, entropy = ek.token_log_probs(logits, rest[0], mask=rest[2], return_entropy=True, backend="triton")
    old = log_probs + 0.2 * torch.sin(torch.arange(log_probs.numel(), device=DEVICE)).view(log_probs.shape)
    alone = []
    for number in range(SEQUENCES):
        part = slice(number, number + 1)
        own = [tensor[part] for tensor in rest]
        seen = ek.token_log_probs(logits[part], own[0], mask=own[2], return_entropy=True, backend="triton")
        assert torch.equal(log_probs[part], seen.log_probs) and torch.equal(entropy[part], seen.entropy)
        alone.append(gradient(logits[part], own, old[part], config, False, upstream))
    together = gradient(logits, rest, old, config, inplace, upstream)
    assert (together.data_ptr() == logits.data_ptr()) is inplace
    for number, expected in enumerate(alone):
        found, mask = together[number], rest[2][number]
        assert torch.equal(found, expected[0]), f"sequence {number}"
        assert (found[~mask] == 0).all() and (found[mask] != 0).any(-1).all()
