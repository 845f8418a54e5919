"""What the linear functions multiply and hold, counted: products dispatched, rows in them, bytes at the peak."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.batches import FAST_BACKEND
from tests.support.cost import multiplications, peak_bytes, products

pytestmark = pytest.mark.cpu

VOCAB, WIDTH, RANK = 67, 16, 2
LATE = ek.PolicyLossConfig(ratio="sequence")
BONUS = ek.PolicyLossConfig(ratio="sequence", entropy_coef=0.1)


class Step:
    """A small batch with every kind of head."""

    def __init__(self, trains=(), dtype=torch.float32, rows=(4, 8)):
        generator = torch.Generator().manual_seed(0)
        shapes = {"hidden": (*rows, WIDTH), "weight": (VOCAB, WIDTH), "A": (RANK, WIDTH), "B": (VOCAB, RANK)}
        leaves = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        self.leaves = {name: leaf.requires_grad_(name in trains) for name, leaf in leaves.items()}
        self.hidden, self.weight, *self.adapters = self.leaves.values()
        self.tokens = torch.randint(VOCAB, rows, generator=generator)
        self.advantages = torch.randn(rows[0], generator=generator)

    def loss(self, config=ek.recipes.EGPO.loss, **options):
        return ek.linear_policy_loss(
            self.hidden, self.weight, self.tokens, self.advantages, config=config, **options
        ).loss


CASES = {
    "value alone": ((), {}, 1),
    "value alone, under no_grad": (("hidden",), {"grad": False}, 1),
    "value alone of a late coefficient, under no_grad": (("hidden",), {"grad": False, "config": LATE}, 1),
    "trains": (("hidden", "weight"), {}, 3),
    "weight alone": (("weight",), {}, 2),
    "frozen": (("hidden",), {}, 2),
    "frozen, with entropy bonus": (("hidden",), {"config": ek.PolicyLossConfig(entropy_coef=0.1)}, 2),
    "trains, late": (("hidden", "weight"), {"config": LATE}, 4),
    "frozen, late": (("hidden",), {"config": LATE}, 2),
    "frozen, late, with entropy bonus": (("hidden",), {"config": BONUS}, 3),
    "frozen, per token": (("hidden",), {"config": ek.PolicyLossConfig(reduction="none")}, 2),
    "trains, no metrics": (("hidden", "weight"), {"metrics": "none"}, 3),
    "trains, in chunks": (("hidden", "weight"), {"max_chunk_bytes": 5 * VOCAB * 4}, 3),
    "frozen, late, in chunks": (("hidden",), {"config": LATE, "max_chunk_bytes": 5 * VOCAB * 4}, 2),
    "softcap": (("hidden", "weight"), {"logit_softcap": 3.0, "logit_scale": 0.5}, 3),
}


@pytest.mark.parametrize("trains, options, count", CASES.values(), ids=CASES)
@FAST_BACKEND
def test_products_of_the_size_of_the_logits(trains, options, count, backend):
    step, options = Step(trains), dict(options)
    differentiated = options.pop("grad", bool(trains))

    def run():
        with torch.set_grad_enabled(differentiated):
            loss = step.loss(backend=backend, **options)
        if differentiated:
            loss.sum().backward()

    assert multiplications(run) == count * step.tokens.numel() * VOCAB * WIDTH


REPORTED = {"reported": (0.0, False, 2), "in the loss": (0.1, False, 4), "detached": (0.0, True, 2)}


@pytest.mark.parametrize("coefficient, detached, count", REPORTED.values(), ids=REPORTED)
@FAST_BACKEND
def test_products_of_an_entropy_beside_log_probs(coefficient, detached, count, backend):
    """With a frozen head, an entropy that is only reported costs nothing."""
    step = Step(("hidden",))

    def run():
        found = ek.linear_token_log_probs(step.hidden, step.weight, step.tokens, return_entropy=True, backend=backend)
        entropy = found.entropy.detach() if detached else found.entropy
        config = ek.PolicyLossConfig(entropy_coef=coefficient)
        loss, metrics = ek.policy_loss(
            found.log_probs, None, step.advantages, entropy=entropy, config=config, backend=backend
        )
        assert metrics["policy/entropy/mean"] > 0
        loss.backward()

    assert multiplications(run) == count * step.tokens.numel() * VOCAB * WIDTH


WHOLE_GROUPS = {
    "advantages from these logits, trains": (("hidden", "weight"), {}, 4),
    "advantages from these logits, frozen": (("hidden",), {}, 2),
    "advantages from the sampler's, trains": (("hidden", "weight"), {"old": True}, 3),
    "advantages from the sampler's, frozen": (("hidden",), {"old": True}, 2),
    "no weight, trains": (("hidden", "weight"), {"recipe": "grpo"}, 3),
}


@pytest.mark.parametrize("trains, options, count", WHOLE_GROUPS.values(), ids=WHOLE_GROUPS)
@FAST_BACKEND
def test_products_of_whole_groups(trains, options, count, backend):
    step, options = Step(trains), dict(options)
    old = torch.full(step.tokens.shape, -4.0) if options.pop("old", False) else None

    def run():
        rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        ek.linear_egpo_loss(
            step.hidden, step.weight, step.tokens, 2, rewards, old_log_probs=old, backend=backend, **options
        ).loss.backward()

    assert multiplications(run) == count * step.tokens.numel() * VOCAB * WIDTH


LOG_PROBS = {
    "value alone": ((), False, 1),
    "trains": (("hidden", "weight"), False, 4),
    "frozen": (("hidden",), False, 2),
    "frozen, through the entropy": (("hidden",), True, 4),
    "trains, through the entropy": (("hidden", "weight"), True, 4),
}


@pytest.mark.parametrize("trains, entropy, count", LOG_PROBS.values(), ids=LOG_PROBS)
@FAST_BACKEND
def test_products_of_log_probs(trains, entropy, count, backend):
    step = Step(trains)

    def run():
        found = ek.linear_token_log_probs(step.hidden, step.weight, step.tokens, return_entropy=True, backend=backend)
        if trains:
            (found.log_probs.sum() + (found.entropy.sum() if entropy else 0)).backward()

    assert multiplications(run) == count * step.tokens.numel() * VOCAB * WIDTH


@pytest.mark.parametrize("config, count", [(ek.recipes.EGPO.loss, 2), (LATE, 3)], ids=["known", "late"])
def test_adapters_on_a_frozen_weight(config, count):
    """Big products as with a frozen head; the small ones have the rank in place of one of their three sizes."""
    step = Step(("hidden", "A", "B"))
    found = products(lambda: step.loss(config, lora=(*step.adapters, 0.5)).backward())
    assert sum(sorted(one) == sorted((32, WIDTH, VOCAB)) for one in found) == count
    assert all(RANK in one for one in found if sorted(one) != sorted((32, WIDTH, VOCAB)))


# Rows.


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("mode", ["all", "active", "none"])
def test_only_active_rows_are_multiplied(mode, layout):
    step = Step(("hidden", "weight"))
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    step.advantages[1] = 0.0
    active = int(mask.sum() if mode == "all" else mask[step.advantages != 0].sum())
    assert 0 < active < mask.sum() + (mode == "all")
    options = {"metrics": mode}
    if layout == "packed":
        step.hidden, step.tokens, mask = (one.flatten(0, 1) for one in (step.hidden, step.tokens, mask))
        options["cu_seqlens"] = torch.arange(5) * 8
    found = multiplications(lambda: step.loss(mask=mask, **options).backward())
    assert found == 3 * active * VOCAB * WIDTH
    gradient = step.leaves["hidden"].grad.flatten(0, 1)
    assert gradient.shape == (32, WIDTH) and (gradient[~mask.flatten()] == 0).all()


def test_nothing_is_multiplied_where_nothing_counts():
    step = Step(("hidden", "weight"))
    assert multiplications(lambda: step.loss(mask=torch.zeros(4, 8)).backward()) == 0
    assert all((step.leaves[name].grad == 0).all() for name in ("hidden", "weight"))


def test_rows_without_upstream_are_not_multiplied_again():
    step = Step(("hidden", "weight"))

    def run():
        found = ek.linear_token_log_probs(step.hidden, step.weight, step.tokens).log_probs
        found[:1].sum().backward()

    assert multiplications(run) == (32 + 3 * 8) * VOCAB * WIDTH


# Memory.


@pytest.mark.parametrize("rows, wide", [(32, False), (7, True)])
def test_a_sum_over_chunks_is_float32(rows, wide):
    """Beside the gradient there is a sum as large in float32, where there is more than one chunk."""
    step = Step(("hidden", "weight"), torch.bfloat16)
    weight = torch.randn(3000, 256).bfloat16().requires_grad_()
    hidden = torch.randn(4, 8, 256).bfloat16()

    def run():
        limit = rows * 3000 * (14 if wide else 10)  # 8 of them are the backend's scratch
        ek.linear_policy_loss(hidden, weight, step.tokens, step.advantages, max_chunk_bytes=limit).loss.backward()

    beside = peak_bytes(run) - weight.nbytes
    assert (beside >= 2 * weight.nbytes) is wide


BIG, SMALLER = (1024, 151936, 256), (1024, 49152, 64)
"""Tokens, vocabulary, hidden size; whole logits of the big one would be 0.6 GB."""
BOTH = ("hidden", "weight")
HOLDING = [
    (BIG, 64, BOTH, ek.recipes.EGPO.loss, {}),
    (BIG, 256, BOTH, ek.recipes.EGPO.loss, {}),
    (SMALLER, 64, ("hidden",), ek.recipes.EGPO.loss, {}),
    (SMALLER, 64, BOTH, LATE, {}),
    (SMALLER, 64, ("hidden",), LATE, {}),
    (SMALLER, 64, ("hidden",), BONUS, {}),
    (SMALLER, 64, ("hidden",), LATE, {"dtype": torch.bfloat16}),
    (SMALLER, 64, BOTH, BONUS, {"logit_softcap": 30.0}),
    # Less than the portable backend's scratch for many rows.
    (SMALLER, 8, BOTH, ek.recipes.EGPO.loss, {}),
    (SMALLER, 8, ("hidden",), LATE, {"dtype": torch.bfloat16}),
]


@pytest.mark.parametrize("size, mebibytes, trains, config, options", HOLDING)
def test_peak_memory_is_one_chunk(size, mebibytes, trains, config, options):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    rows, vocab, width = size
    # Logits of ordinary size: probabilities below float32's normal numbers make a CPU's products twenty times as slow.
    hidden, weight = torch.randn(8, rows // 8, width) / width**0.5, torch.randn(vocab, width, dtype=dtype)
    hidden = hidden.to(dtype)
    for leaf, name in ((hidden, "hidden"), (weight, "weight")):
        leaf.requires_grad_(name in trains)
    tokens = torch.randint(vocab, (8, rows // 8))

    def run():
        ek.linear_policy_loss(
            hidden, weight, tokens, torch.ones(8), config=config, max_chunk_bytes=mebibytes << 20, **options
        ).loss.backward()

    gradients = sum(leaf.nbytes for leaf in (hidden, weight) if leaf.requires_grad)
    assert peak_bytes(run) - gradients <= 1.1 * (mebibytes << 20)
