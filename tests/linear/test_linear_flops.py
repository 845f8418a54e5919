"""What torch's counter of floating-point operations sees of the linear functions: the products that are made."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import egpo_kernels as ek
from egpo_kernels.engine.operator import Operator
from egpo_kernels.linear import flops, ops
from tests.support.batches import FAST_BACKEND
from tests.support.cost import multiplications

pytestmark = pytest.mark.cpu

ROWS, VOCAB, WIDTH, RANK = 32, 67, 16, 2
PRODUCT = 2 * ROWS * VOCAB * WIDTH
PAIR = 2 * ROWS * RANK * (VOCAB + WIDTH)
"""One product with A and one with B."""
BOTH = ("hidden", "weight")
LATE = ek.PolicyLossConfig(ratio="sequence")
BONUS = ek.PolicyLossConfig(ratio="sequence", entropy_coef=0.1)


def counted(run):
    """What `run` costs, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Step:
    """Hidden states and a head of which some train."""

    def __init__(self, trains, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        shapes = {"hidden": (4, 8, WIDTH), "weight": (VOCAB, WIDTH), "bias": (VOCAB,), "A": (RANK, WIDTH)}
        shapes |= {"B": (VOCAB, RANK)}
        leaves = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        self.leaves = {name: leaf.requires_grad_(name in trains) for name, leaf in leaves.items()}
        self.first = self.leaves["hidden"], self.leaves["weight"]
        self.tokens = torch.randint(VOCAB, (4, 8), generator=generator)
        self.advantages = torch.randn(4, generator=generator)

    @property
    def lora(self):
        return self.leaves["A"], self.leaves["B"], 0.5

    def loss(self, lora=False, **options):
        """Loss, and backward where something trains."""
        options |= {"lora": self.lora} if lora else {}
        loss = ek.linear_policy_loss(*self.first, self.tokens, self.advantages, **options).loss
        self.back(loss.sum())

    def log_probs(self, entropy=False, lora=False, **options):
        """Log-probs, and backward through them, and through the entropy."""
        options |= {"lora": self.lora} if lora else {}
        found = ek.linear_token_log_probs(*self.first, self.tokens, return_entropy=entropy, **options)
        self.back(found.log_probs.sum() + (found.entropy.sum() if entropy else 0))

    def groups(self, **options):
        """EGPO, whose uncertainty comes from the same logits."""
        rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        self.back(ek.linear_egpo_loss(*self.first, self.tokens, 2, rewards, **options).loss)

    def eager(self, lora=False):
        """A linear layer, log_softmax and a policy gradient, as users write them."""
        logits = torch.nn.functional.linear(*self.first, self.leaves["bias"])
        if lora:
            lora_a, lora_b, scale = self.lora
            logits = logits + scale * torch.nn.functional.linear(
                torch.nn.functional.linear(self.leaves["hidden"], lora_a), lora_b
            )
        log_probs = logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]
        self.back(-(log_probs * self.advantages[:, None]).mean())

    @staticmethod
    def back(loss):
        if loss.requires_grad:
            loss.backward()


LOSS, LOG_PROBS, GROUPS = Step.loss, Step.log_probs, Step.groups
CASES = {
    "value alone": (LOSS, (), {}, PRODUCT),
    "trains": (LOSS, BOTH, {}, 3 * PRODUCT),
    "weight alone": (LOSS, ("weight",), {}, 2 * PRODUCT),
    "frozen": (LOSS, ("hidden",), {}, 2 * PRODUCT),
    "trains, late": (LOSS, BOTH, {"config": LATE}, 4 * PRODUCT),
    "frozen, late": (LOSS, ("hidden",), {"config": LATE}, 2 * PRODUCT),
    "frozen, late, with entropy bonus": (LOSS, ("hidden",), {"config": BONUS}, 3 * PRODUCT),
    "in chunks": (LOSS, BOTH, {"max_chunk_bytes": 5 * VOCAB * 4}, 3 * PRODUCT),
    "scale and cap": (LOSS, BOTH, {"logit_softcap": 3.0, "logit_scale": 0.5}, 3 * PRODUCT),
    "adapters that train": (LOSS, ("hidden", "A", "B"), {"lora": True}, 2 * PRODUCT + 4 * PAIR),
    "one adapter that trains": (LOSS, ("hidden", "B"), {"lora": True}, 2 * PRODUCT + 3 * PAIR),
    "adapters, late": (LOSS, ("hidden", "A", "B"), {"lora": True, "config": LATE}, 3 * PRODUCT + 5 * PAIR),
    "everything trains": (LOSS, (*BOTH, "A", "B"), {"lora": True}, 3 * PRODUCT + 4 * PAIR),
    "log-probs, value alone": (LOG_PROBS, (), {}, PRODUCT),
    "log-probs, trains": (LOG_PROBS, BOTH, {}, 4 * PRODUCT),
    "log-probs, frozen": (LOG_PROBS, ("hidden",), {}, 2 * PRODUCT),
    "log-probs, through the entropy": (LOG_PROBS, ("hidden",), {"entropy": True}, 4 * PRODUCT),
    "log-probs, frozen adapters": (LOG_PROBS, ("hidden",), {"lora": True}, 2 * PRODUCT + 2 * PAIR),
    "whole groups": (GROUPS, BOTH, {}, 4 * PRODUCT),
}


@pytest.mark.parametrize("call, trains, options, wanted", CASES.values(), ids=CASES)
@FAST_BACKEND
def test_what_is_counted_is_what_is_multiplied(call, trains, options, wanted, backend):
    step = Step(trains)
    assert counted(lambda: call(step, backend=backend, **options)) == wanted
    assert 2 * multiplications(lambda: call(step, backend=backend, **options)) == wanted


@pytest.mark.parametrize("chunk", [None, 600])
def test_wide_logits_of_narrow_products(chunk):
    """On a CPU their weight is made float32 a slab at a time, and adapters are multiplied in float32."""
    step = Step((*BOTH, "A", "B"), torch.bfloat16)
    options = {"logits_dtype": torch.float32, "max_chunk_bytes": chunk, "lora": True}
    found = counted(lambda: step.loss(**options))
    assert found == 2 * multiplications(lambda: step.loss(**options)) == 3 * PRODUCT + 4 * PAIR


@pytest.mark.parametrize("trains", [BOTH, ("hidden",), ("weight",), ()])
def test_as_many_as_of_a_linear_layer_and_a_loss(trains):
    step = Step(trains)
    assert counted(lambda: step.loss(bias=step.leaves["bias"])) == counted(step.eager) == (1 + len(trains)) * PRODUCT


def test_more_than_of_a_linear_layer_where_something_is_made_again():
    """Logits, for a coefficient that is known late; what lies between the adapters, for their gradients."""
    step = Step(BOTH)
    assert counted(lambda: step.loss(config=LATE)) == counted(step.eager) + PRODUCT
    step = Step(("hidden", "A", "B"))
    assert counted(lambda: step.loss(lora=True)) == counted(lambda: step.eager(lora=True)) + PAIR


def test_the_reference_is_seen_as_it_is():
    step = Step(BOTH)
    assert counted(lambda: step.loss(backend="reference")) == counted(step.eager)


# Rows.


def test_rows_are_those_of_the_shape_or_as_many_as_are_said_to_count():
    """How many a mask leaves is in its values, of which a formula knows nothing."""
    step, mask = Step(BOTH), torch.arange(ROWS).view(4, 8) < 10
    for count, rows in ((None, ROWS), (10, 10), (12, 12), (10**6, ROWS)):
        found = counted(lambda count=count: step.loss(mask=mask, num_active=count))
        assert found == 3 * PRODUCT * rows // ROWS
    assert 2 * multiplications(lambda: step.loss(mask=mask)) == 3 * PRODUCT * 10 // ROWS


def test_no_rows():
    empty = torch.zeros(0, 8, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    tokens, advantages = torch.zeros(0, 8, dtype=torch.long), torch.zeros(0)
    assert counted(lambda: ek.linear_policy_loss(empty, weight, tokens, advantages).loss.backward()) == 0


def test_without_values():
    """Estimates are made of fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden, weight = torch.empty(4, 8, WIDTH), torch.empty(VOCAB, WIDTH)
        rows = [torch.empty(ROWS, dtype=torch.bool), torch.empty(ROWS, dtype=torch.long), *[None] * 6]
        first = (hidden, [weight, None, None, None], rows, None, [1.0, 1.0, 1.0, 0.0], None, None, torch.float32)

        def run():
            torch.ops.egpo_kernels.linear_row_statistics(*first, "", True, False, True, "portable")

        assert counted(run) == 2 * PRODUCT


def test_of_sizes_that_nobody_knows():
    """Of a graph with dynamic shapes: comparing rows with a number would make another graph for either answer."""
    rows = ShapeEnv().create_unbacked_symint()
    head, wanted = [(VOCAB, WIDTH), None, None, None], [True, True, False, False, False]
    found = flops.linear_gradient((4, rows, WIDTH), head, [], None, [], 10, None, torch.float32, wanted, "triton")
    assert isinstance(found, torch.SymInt)


# Registration.


def test_every_operator_has_a_formula():
    products = {name for name, value in vars(ops).items() if isinstance(value, Operator)}
    assert products == set(flops.FORMULAS)
    assert all(getattr(torch.ops.egpo_kernels, name) in flop_registry for name in products)


ORDERS = {
    "first": ("import torch.utils.flop_counter\nimport egpo_kernels", True),
    "after": ("import egpo_kernels\nimport torch.utils.flop_counter", True),
    "never": ("import egpo_kernels", False),
    "looked for": (
        "import egpo_kernels, importlib.util\nimportlib.util.find_spec('torch.utils.flop_counter')\n"
        "import torch.utils.flop_counter",
        True,
    ),
}


@pytest.mark.parametrize("imports, there", ORDERS.values(), ids=ORDERS)
def test_whoever_is_imported_first(imports, there):
    """The counter loads triton: nobody who does not want it shall wait for it."""
    code = f"""
import sys, torch
{imports}
counter = sys.modules.get("torch.utils.flop_counter")
print(counter is not None and torch.ops.egpo_kernels.linear_gradient in counter.flop_registry, "triton" in sys.modules)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found, triton = done.stdout.split()
    assert found == str(there) and (there or triton == "False")


def test_registering_again_changes_nothing():
    counter = importlib.import_module(flops.COUNTER)
    before = dict(flop_registry)
    flops.register(counter)
    assert flop_registry == before
