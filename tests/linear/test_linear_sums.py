"""Gradients of the head, summed over chunks: the first product is written to new memory, whatever that holds."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import egpo_kernels as ek
from egpo_kernels.linear import head as heads
from egpo_kernels.linear.head import Head, HeadGradients, Wanted
from tests.support.accuracy import assert_bits
from tests.support.batches import FAST_BACKEND

VOCAB, WIDTH, RANK = 19, 6, 2
NAMES = ("weight", "bias", "A", "B")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LATE = ek.PolicyLossConfig(ratio="sequence")


@contextlib.contextmanager
def poison():
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)  # where torch.utils.deterministic.fill_uninitialized_memory is heard
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def leaves_of(dtype, trains):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (3, 5, WIDTH),
        "weight": (VOCAB, WIDTH),
        "bias": (VOCAB,),
        "A": (RANK, WIDTH),
        "B": (VOCAB, RANK),
    }
    leaves = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {name: leaf.requires_grad_(name in trains) for name, leaf in leaves.items()}


def gradients(dtype, trains, rows, config, backend, mask=None):
    """Of the leaves that train, summed over chunks of so many rows."""
    leaves = leaves_of(dtype, trains)
    tokens = torch.arange(15).view(3, 5)
    ek.linear_policy_loss(
        leaves["hidden"], leaves["weight"], tokens, torch.tensor([1.0, -0.5, 0.7]), mask, bias=leaves["bias"],
        lora=(leaves["A"], leaves["B"], 0.5), logit_scale=0.5, config=config, backend=backend,
        max_chunk_bytes=rows and 2 * rows * VOCAB * 8,
    ).loss.backward()  # fmt: skip
    return {name: leaves[name].grad for name in trains}


@pytest.mark.cpu
@pytest.mark.parametrize("config", [ek.recipes.EGPO.loss, LATE], ids=["known", "late"])
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FAST_BACKEND
def test_new_memory_may_hold_anything(dtype, rows, config, backend):
    every = ("hidden", *NAMES)
    for trains in (every, ("weight",), ("A",), ("B", "bias")):
        wanted = gradients(dtype, trains, rows, config, backend)
        with poison():
            found = gradients(dtype, trains, rows, config, backend)
        for name in trains:
            assert found[name].isfinite().all() and (found[name] != 0).any()
            assert_bits(found[name], wanted[name], name)


@pytest.mark.cpu
@FAST_BACKEND
def test_no_chunk_at_all_gives_zeros(backend):
    for config in (ek.recipes.EGPO.loss, LATE):
        with poison():
            found = gradients(torch.bfloat16, ("hidden", *NAMES), 2, config, backend, torch.zeros(3, 5))
        assert all((gradient == 0).all() for gradient in found.values())


class Products(TorchDispatchMode):
    """What is added to a sum and how, in order; a product into a wider dtype, which no CPU has, is left out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        name = function.overloadpacket.__name__
        if name.startswith("addmm"):
            self.seen.append((tuple(arguments[0].shape), options.get("beta", 1), arguments[0].dtype))
            if "out_dtype" in options or function._overloadname.startswith("dtype"):
                return options["out"]
        elif name in ("zeros", "new_zeros", "zero_", "zeros_like", "fill_"):
            self.seen.append(name)
        return function(*arguments, **options)


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("at_once", [True, False], ids=["on a GPU", "on a CPU"])
def test_the_first_product_reads_no_sum(at_once, once, monkeypatch):
    """Nor is any memory set to 0 first; later ones are added."""
    monkeypatch.setattr(heads, "sums_apart", lambda weight: not at_once)
    weight, bias, lora_a, lora_b = (leaf.detach() for leaf in list(leaves_of(torch.bfloat16, ()).values())[1:])
    head = Head(weight, bias, lora_a, lora_b, 0.5, 1.0, 0.0, torch.bfloat16)
    sums = HeadGradients(head, Wanted(True, True, True, True, True), once)
    with Products() as products:
        for _ in range(1 if once else 3):
            sums.add(torch.ones(4, VOCAB, dtype=torch.bfloat16), torch.ones(4, WIDTH, dtype=torch.bfloat16))
        found = sums.rounded()
    dtype = torch.bfloat16 if once else torch.float32
    betas = [0] if once else [0, 1, 1]
    shapes = [(VOCAB, WIDTH), (RANK, WIDTH), (VOCAB, RANK)]
    assert products.seen == [(shape, beta, dtype) for beta in betas for shape in shapes]
    assert [each.dtype for each in found] == [torch.bfloat16] * 4
    assert (found[1] == 4 * len(betas)).all()
