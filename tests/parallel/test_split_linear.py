"""An output layer spread over ranks: log-probs alone, hidden states that are spread too, sums in 16 bits."""

import itertools

import pytest
import torch
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.api.test_properties import over_backends
from tests.linear.test_linear_properties import HEADS, layers, with_logits
from tests.parallel.split import LEAVES, columns, cuts, joined, over_ranks, own_layer
from tests.support import linear
from tests.support.accuracy import assert_accurate, assert_rounding
from tests.support.batches import EVERY_BACKEND, FAST_BACKEND
from tests.support.case import Case
from tests.support.device import DEVICE
from tests.support.strategies import cases

WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)]


def scored(case: Case, layer: linear.Layer, wanted: tuple[str, ...], through: tuple[float, float], **options) -> dict:
    """`linear_token_log_probs`: values, and the gradients of what is wanted through log-probs and entropy."""
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in layer.leaves.items()}
    layer = linear.with_leaves(layer, leaves)
    heat = case.temperature if case.cu_seqlens is None else case.rows(case.temperature).to(layer.hidden.dtype)
    found = ek.linear_token_log_probs(
        layer.hidden, layer.weight, case.tokens, mask=case.counted.view(case.tokens.shape), temperature=heat,
        return_entropy=True, support=case.support, **layer.options, **options,
    )  # fmt: skip
    sum(weight * value.sum() for weight, value in zip(through, found, strict=True)).backward()
    values = torch.stack([value.detach() for value in found])
    return {"loss": values, "metrics": {}} | {name: leaves[name].grad for name in wanted}


@over_backends(
    40, cases(dtypes=(torch.float64,), widest=64), st.data(), st.sampled_from(sorted(HEADS)), st.sampled_from(WEIGHTS)
)
def test_log_probs_alone(backend, case, data, head, through):
    """Those of one process; frozen heads, whose gradient is made with the values, among them."""
    layer, bounds = data.draw(layers(case)), data.draw(cuts(case.logits.shape[-1]))
    case = with_logits(case, layer.logits())
    wanted = tuple(name for name in HEADS[head] if name in layer.leaves)
    size = data.draw(st.sampled_from([1, 4000, 10**6]))

    def own(rank, start, stop, group):
        given = {"backend": backend, "vocab_group": group, "max_chunk_bytes": size, **columns(bounds, rank)}
        return scored(case, own_layer(layer, start, stop, 0), wanted, through, **given)

    width = [stop - start for start, stop in itertools.pairwise(bounds)]
    found = joined(over_ranks(bounds, own), {name: LEAVES[name] for name in wanted}, width)
    expected = scored(case, layer, wanted, through, backend="reference")
    for name in ("loss", *wanted):
        torch.testing.assert_close(found[name], expected[name], equal_nan=True, msg=lambda text, name=name: name + text)


class Batch:
    """Sequences of six tokens, with a head that has everything."""

    def __init__(self, dtype=torch.float64, vocab=40, width=5):
        generator = torch.Generator().manual_seed(1)
        self.shape = (4, 6)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

        self.hidden, self.weight, self.bias = normal(*self.shape, width), normal(vocab, width), normal(vocab)
        self.lora = (normal(2, width), normal(vocab, 2), 0.7)
        self.tokens = torch.randint(vocab, self.shape, generator=generator).to(DEVICE)
        self.advantages, self.old = normal(4).float(), -2 * normal(*self.shape).abs().float()

    def step(self, hidden, own=slice(None), packed=False, **options):
        """Gradients of hidden states, weight, bias and both adapters."""
        first, second, scale = self.lora
        leaves = [hidden, self.weight[own], self.bias[own], first, second[own]]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        tokens, old = (each.flatten() if packed else each for each in (self.tokens, self.old))
        offsets = 6 * torch.arange(5, device=DEVICE) if packed else None
        loss, _ = ek.linear_policy_loss(
            leaves[0], leaves[1], tokens, self.advantages, bias=leaves[2], lora=(leaves[3], leaves[4], scale),
            old_log_probs=old, cu_seqlens=offsets, **options,
        )  # fmt: skip
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]


@EVERY_BACKEND
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_part_of_the_tokens_on_each_rank(ranks, packed, backend):
    """Gathered once in forward, scattered once in backward; everything else is as with whole hidden states."""
    batch = Batch(vocab=36)
    hidden = batch.hidden.flatten(0, 1) if packed else batch.hidden
    expected, part, per = batch.step(hidden, packed=packed), hidden.shape[-2] // ranks, 36 // ranks

    def own(rank, start, stop, group):
        mine = hidden.narrow(-2, rank * part, part)
        found = batch.step(
            mine,
            slice(rank * per, (rank + 1) * per),
            packed,
            backend=backend,
            vocab_group=group,
            sequence_parallel=True,
        )
        kinds = [kind for who, kind, _ in group.world.calls if who == rank]
        assert backend == "reference" or kinds == ["all_gather", "all_gather", "all_reduce", "reduce_scatter"]
        return found

    found = over_ranks([rank * per for rank in range(ranks + 1)], own)
    for place, dim in ((0, None), (1, -2), (2, 0), (3, 0), (4, None), (5, 0)):
        parts = [each[place] for each in found]
        assert_rounding(parts[0] if dim is None else torch.cat(parts, dim), expected[place])


@FAST_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parts_of_a_gradient_are_summed_in_16_bits(dtype, backend):
    """As Megatron does: each rank's part is rounded, and so is their sum; what that loses is what it loses there."""
    batch, bounds = Batch(dtype), (0, 13, 26, 40)
    options = {"grad_scale": 1.0 if dtype == torch.bfloat16 else 8.0}

    def run(backend, **more):
        def own(rank, start, stop, group):
            given = {"backend": backend, "vocab_group": group, **columns(bounds, rank), **options, **more}
            return batch.step(batch.hidden, slice(start, stop), **given)

        return over_ranks(bounds, own)

    exact = Batch(torch.float64)
    for name in ("hidden", "weight", "bias"):
        setattr(exact, name, getattr(batch, name).double())
    exact.lora = (batch.lora[0].double(), batch.lora[1].double(), 0.7)
    wanted = exact.step(exact.hidden, backend="reference")
    found, plain = run(backend), run("reference")
    sizes = torch.full_like(wanted[1], float(wanted[1].abs().max()) * 3)
    for rank in range(3):
        for place, size in ((1, sizes), (4, wanted[4].abs().max() * 3)):
            assert_accurate(
                found[rank][place], plain[rank][place], wanted[place], size, "hidden" if place == 1 else "A"
            )
