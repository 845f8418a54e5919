"""Hidden states whose rows keep some tokens: which columns are multiplied, what is held, what the host knows."""

from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import egpo_kernels as ek
from egpo_kernels import portable, triton
from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.engine import calls
from egpo_kernels.engine.rows import Given
from egpo_kernels.inputs.layout import make_layout
from egpo_kernels.linear import source
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.batches import FAST, FAST_BACKEND
from tests.support.cost import multiplications, peak_bytes
from tests.support.device import DEVICE

PACKAGES = {"portable": portable, "triton": triton}
VOCAB, WIDTH, RANK = 4096, 64, 2
EVERYTHING = ("hidden", "weight", "bias", "A", "B")
HEADS = {
    "trains": ("hidden", "weight"),
    "frozen": ("hidden",),
    "adapters": ("hidden", "A", "B"),
    "all": EVERYTHING,
    "A": ("A",),
}
EVERY_HEAD = pytest.mark.parametrize("trains", HEADS.values(), ids=HEADS)
LATE = ek.PolicyLossConfig(ratio="sequence")


class Step:
    """Rows of which half keep one token and the others 15, but for some without a record."""

    def __init__(self, trains=(), shape=(2, 8), vocab=VOCAB, without=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        shapes = {"hidden": (*shape, WIDTH), "weight": (vocab, WIDTH), "bias": (vocab,), "A": (RANK, WIDTH)}
        shapes["B"] = (vocab, RANK)
        leaves = {name: torch.randn(size, generator=generator).to(DEVICE, dtype) for name, size in shapes.items()}
        self.leaves = {name: leaf.requires_grad_(name in trains) for name, leaf in leaves.items()}
        self.tokens = torch.randint(vocab, shape, generator=generator).to(DEVICE)
        self.advantages = torch.randn(shape[0], generator=generator).to(DEVICE)
        self.old = torch.randn(shape, generator=generator).to(DEVICE)
        self.rows, self.without = self.tokens.numel(), without
        ids = torch.full((self.rows, 15), -1)
        ids[:, 0] = self.tokens.flatten().cpu()
        others = (torch.rand(self.rows, vocab, generator=generator)).topk(14).indices
        ids[::2, 1:] = others[::2]
        ids[self.rows - without :] = -1
        self.support = SamplingSupport(*(each.to(DEVICE) for each in ek.pack_support(ids)))
        self.adapted = bool({"A", "B"} & set(trains))

    def loss(self, **options):
        given = {"bias": self.leaves["bias"], "support": self.support, "old_log_probs": self.old, **options}
        if self.adapted:
            given["lora"] = (self.leaves["A"], self.leaves["B"], 0.5)
        return ek.linear_policy_loss(
            self.leaves["hidden"], self.leaves["weight"], self.tokens, self.advantages, **given
        ).loss

    def gradients(self, **options):
        leaves = [leaf for leaf in self.leaves.values() if leaf.requires_grad]
        return torch.autograd.grad(self.loss(**options), leaves)


def gathered(run, backend):
    """Multiplications in products with kept columns, counted where they are made."""
    package, found = PACKAGES[backend], []
    makes, adds = package.gathered_products, package.add_gathered

    def products(left, right, entries):
        found.append(entries.ids.shape[0] * right.shape[1])
        return makes(left, right, entries)

    def sums(values, source, index, grouped, out):
        found.append(values.shape[0] * out.shape[1])
        return adds(values, source, index, grouped, out)

    with mock.patch.object(package, "gathered_products", products), mock.patch.object(package, "add_gathered", sums):
        run()
    return sum(found)


@pytest.mark.parametrize("config", [ek.recipes.EGPO.loss, LATE], ids=["known", "late"])
@pytest.mark.parametrize("trains, count", [(("hidden", "weight"), 3), (("hidden",), 2)], ids=["trains", "frozen"])
@FAST_BACKEND
def test_a_hundredth_of_the_products(trains, count, config, backend):
    """Mean 8 kept tokens, half of them alone: no product of the size of the logits, and few of others."""
    step = Step(trains)
    assert step.support.ids[: step.support.offsets[-1]].shape[0] == 8 * step.rows
    assert not multiplications(lambda: step.gradients(config=config, backend=backend))
    kept = gathered(lambda: step.gradients(config=config, backend=backend), backend)
    passes = count + (config is LATE and count == 3)
    assert kept == passes * (step.support.ids.shape[0] + step.rows) * WIDTH
    # What the call without a support multiplies: see `tests.linear.test_linear_cost`.
    assert 0 < kept <= 0.01 * passes * step.rows * VOCAB * WIDTH


@pytest.mark.parametrize("name", HEADS)
@FAST_BACKEND
def test_torchs_counter_knows_them(name, backend):
    """As many as are multiplied, rows without a record included: the host knows how many these are."""
    step = Step(HEADS[name], vocab=300, without=3)

    def run():
        step.gradients(backend=backend)

    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 2 * (multiplications(run) + gathered(run, backend))


@FAST_BACKEND
def test_rows_without_a_record_alone_meet_the_whole_layer(backend):
    step = Step(("hidden", "weight"), vocab=300, without=4)
    mask = torch.ones(2, 8, dtype=torch.bool, device=DEVICE)
    mask[0, :5] = mask[1, 7] = False
    found = multiplications(lambda: step.gradients(mask=mask, backend=backend))
    assert found == 3 * 3 * 300 * WIDTH


@pytest.mark.cpu
def test_no_chunk_of_logits_is_held():
    step = Step(("hidden", "weight"), shape=(8, 64), vocab=8192)
    own = sum(leaf.numel() * 4 for leaf in (step.leaves["hidden"], step.leaves["weight"]))
    logits = step.rows * 8192 * 4
    assert peak_bytes(step.gradients) - own < logits // 2
    assert peak_bytes(lambda: step.gradients(support=None)) - own > logits


@pytest.mark.parametrize("config", [ek.PolicyLossConfig(entropy_coef=0.1), LATE], ids=["known", "late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FAST_BACKEND
def test_the_same_bits_every_time(dtype, config, backend):
    step = Step(EVERYTHING, without=4, vocab=300, dtype=dtype)
    for again, before in zip(*(step.gradients(config=config, backend=backend) for _ in range(2)), strict=True):
        assert_bits(again, before, "gradient")


@pytest.mark.cpu
def test_a_model_of_49_thousand_tokens_takes_less_than_64_mib():
    """Beside inputs and gradients, of [2048 x 576] times [576 x 49152] in float32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(count, 576, generator=generator).requires_grad_() for count in (2048, 49152))
    tokens = torch.randint(49152, (2048,), generator=generator)
    others = torch.randint(49152, (2048, 14), generator=generator)
    others[::2] = -1
    support = ek.pack_support(torch.cat([tokens[:, None], others], 1))
    ends, advantages = torch.tensor([0, 2048]), torch.randn(2048, generator=generator)

    def run():
        ek.linear_policy_loss(hidden, weight, tokens, advantages, cu_seqlens=ends, support=support).loss.backward()

    assert peak_bytes(run) - 4 * (hidden.numel() + weight.numel()) < 64 * 2**20


@EVERY_HEAD
@pytest.mark.parametrize("config", [ek.PolicyLossConfig(entropy_coef=0.1), LATE], ids=["known", "late"])
@pytest.mark.parametrize("backend", FAST)
def test_gradcheck(backend, config, trains):
    step = Step(trains, shape=(2, 2), vocab=17, without=1, dtype=torch.float64)
    step.leaves = {name: leaf.detach()[..., :3].contiguous() if name in ("hidden", "weight", "A") else leaf.detach()
                   for name, leaf in step.leaves.items()}  # fmt: skip
    step.leaves = {name: leaf.requires_grad_(name in trains) for name, leaf in step.leaves.items()}
    step.old = step.old.double() - 3

    def loss(*tensors):
        step.leaves |= dict(zip(trains, tensors, strict=True))
        return step.loss(config=config, logit_softcap=4.0, logit_scale=0.7, backend=backend)

    # Interpreted, every element apart takes minutes: one direction through all of them then.
    leaves = tuple(step.leaves[name] for name in trains)
    torch.autograd.gradcheck(loss, leaves, fast_mode=backend == "triton")


@EVERY_HEAD
@FAST_BACKEND
def test_without_a_record_every_bit_is_as_without_a_support(trains, backend):
    for dtype in (torch.float32, torch.bfloat16):
        step = Step(trains, vocab=300, without=16, dtype=dtype)
        found, wanted = step.gradients(backend=backend), step.gradients(support=None, backend=backend)
        for one, other in zip(found, wanted, strict=True):
            assert_bits(one, other, "gradient")


@EVERY_HEAD
@FAST_BACKEND
def test_what_does_not_count_may_hold_anything(trains, backend):
    step = Step(trains, vocab=300, without=4)
    mask = torch.ones(2, 8, dtype=torch.bool, device=DEVICE)
    mask[0, 3:6] = mask[1, 6:] = False
    before = step.gradients(mask=mask, backend=backend)
    with torch.no_grad():
        step.leaves["hidden"][~mask] = torch.nan
    for one, other in zip(step.gradients(mask=mask, backend=backend), before, strict=True):
        assert_bits(one, other, "gradient")


@FAST_BACKEND
def test_columns_that_no_row_kept_are_not_read(backend):
    step = Step(("hidden", "weight"), vocab=300)
    before = step.gradients(backend=backend)
    kept = torch.zeros(300, dtype=torch.bool, device=DEVICE)
    kept[step.support.ids[: step.support.offsets[-1]]] = True
    with torch.no_grad():
        step.leaves["weight"][~kept] = torch.nan
    hidden, weight = step.gradients(backend=backend)
    assert_bits(hidden, before[0], "hidden")
    assert_bits(weight, before[1], "weight")
    assert (~kept).any() and (weight[~kept] == 0).all()


# What the host knows.


def told(mask=None, num_active=None, recorded=(1, 0, 0, 1, 0, 1), device="cuda"):
    """What `source` makes of six rows on a device whose records the host knows, and of a mask ``[6]`` on the host."""
    layout = make_layout("hidden", (2, 3), None, torch.device(device))
    host_mask = None if mask is None else torch.tensor(mask) != 0
    linear = source.Linear(torch.zeros(2, 3, 4), None, host_mask, num_active, None, None, False, [])
    call = calls.Call(linear, Given.nothing(), layout, 1.0, torch.float32, "triton")
    return source._multiplied(linear, call, torch.tensor(recorded) != 0)


def test_records_on_the_host_say_which_rows_to_multiply():
    assert told().host_mask.tolist() == [False, True, True, False, True, False] and told().num_active == 3
    found = told(mask=(1, 1, 0, 1, 1, 1))
    assert found.host_mask.tolist() == [False, True, False, False, True, False] and found.num_active == 2
    few = told(num_active=2)
    assert few.host_mask is None and few.num_active == 2
    assert told(num_active=5).num_active == 3 and told(num_active=5).host_mask is not None
    assert not told(recorded=(0,) * 6).records
    with pytest.raises(ValueError, match="num_active is 2, and 5 rows count"):
        told(mask=(1, 1, 0, 1, 1, 1), num_active=2)


@FAST_BACKEND
def test_too_few_active_rows_are_refused(backend, values_are_checked):
    step = Step(("hidden",), vocab=300, without=3)
    with pytest.raises(ValueError, match="num_active is 15, and 16 rows count"):
        step.loss(num_active=15, backend=backend)
    assert_rounding(step.loss(num_active=16, backend=backend), step.loss(backend=backend))
