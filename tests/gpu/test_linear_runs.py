"""The linear functions run after run: the same bits from products that are summed over several chunks."""

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.linear import layer as layers
from tests.support.accuracy import assert_bits
from tests.support.device import DEVICE, size

pytestmark = pytest.mark.gpu

SEQUENCES, LENGTH, WIDTH, VOCAB, RANK = size((2, 7, 8, 37, 2), (8, 256, 512, 40_009, 16))
CHUNK = size(4, 256)
"""Rows of float32 logits, of which there are several chunks; of 16-bit ones more fit."""
HEADS = {
    "trains": ("hidden", "weight", "bias"),
    "adapters": ("hidden", "A", "B"),
    "frozen": ("hidden",),
}


def drawn(dtype):
    """Hidden states and a head."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (SEQUENCES, LENGTH, WIDTH), "weight": (VOCAB, WIDTH), "bias": (VOCAB,)}
    shapes |= {"A": (RANK, WIDTH), "B": (VOCAB, RANK)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["weight"] *= 3 / WIDTH**0.5
    tensors["A"] /= WIDTH**0.5
    return {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}


def rows_of():
    """Tokens of every part of the vocabulary and a mask with holes."""
    count = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH)
    return (count * 7919).remainder(VOCAB).to(DEVICE), (count % 5 != 2).to(DEVICE)


def layer_of(leaves):
    """As the functions take it, with adapters where they train."""
    lora = (leaves["A"], leaves["B"], 0.5) if leaves["A"].requires_grad else None
    first = {"hidden": leaves["hidden"], "weight": leaves["weight"], "bias": leaves["bias"], "lora": lora}
    return first | {"backend": "triton", "max_chunk_bytes": CHUNK * VOCAB * 4}


def policy_loss(leaves, config):
    tokens, mask = rows_of()
    advantages = torch.linspace(-1, 1, SEQUENCES, device=DEVICE)
    given = {"tokens": tokens, "advantages": advantages, "mask": mask, "config": config}
    return {"loss": ek.linear_policy_loss(**layer_of(leaves), **given).loss}


def known(leaves):
    """The gradient is made together with the loss."""
    return policy_loss(leaves, ek.PolicyLossConfig(reduction="sum", entropy_coef=0.02))


def late(leaves):
    """The coefficient of a row needs the others': log-probs, a loss, then the gradient."""
    return policy_loss(leaves, ek.PolicyLossConfig(reduction="sum", ratio="sequence"))


def log_probs(leaves):
    """Log-probs and entropies, with a gradient through the log-probs."""
    tokens, mask = rows_of()
    found = ek.linear_token_log_probs(**layer_of(leaves), tokens=tokens, mask=mask, return_entropy=True)
    return {"loss": found.log_probs.sum(), "log_probs": found.log_probs, "entropy": found.entropy}


def run(path, tensors, trains):
    """What a path gives, and the gradients of what trains."""
    leaves = {name: tensor.detach().requires_grad_(name in trains) for name, tensor in tensors.items()}
    found = path(leaves)
    found["loss"].backward()
    return {name: value.detach() for name, value in found.items()} | {name: leaves[name].grad for name in trains}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("trains", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("path", [known, late, log_probs], ids=lambda path: path.__name__)
def test_a_hundred_runs(path, trains, dtype, monkeypatch):
    """Even where fresh memory holds something else, which a first product must not read."""
    tensors, planned = drawn(dtype), []

    def chunk_rows(*given):
        planned.append((chunk_rows.plain(*given), given[-2]))
        return planned[-1][0]

    chunk_rows.plain = layers.chunk_rows
    monkeypatch.setattr(layers, "chunk_rows", chunk_rows)
    first = run(path, tensors, trains)
    assert planned and all(rows < total for rows, total in planned)
    assert all(value.isfinite().all() and value.any() for value in first.values())
    for _ in range(size(1, 100)):
        fresh = torch.full((2, VOCAB, WIDTH), torch.nan, device=DEVICE)
        del fresh
        found = run(path, tensors, trains)
        for name, value in first.items():
            assert_bits(found[name], value, name)
