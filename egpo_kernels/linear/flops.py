"""What the operators multiply, for `torch.utils.flop_counter.FlopCounterMode`, which cannot look inside them.

Chunks and a softcap change nothing. All rows count, or ``num_active`` where it is given: how many of them a mask leaves
is not in its shape, and where the host knows it fewer rows are multiplied than are counted here. With what a sampler
kept, each kept token of a row counts for one column, and ``num_active`` bounds the rows without a record.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from egpo_kernels.engine.ops import NUM_FIELDS, NUM_GIVEN

COUNTER = "torch.utils.flop_counter"

Shape = tuple[int, ...]


def _products(hidden: Shape, head: list[Shape | None], num_active: int | None, wanted: list[bool]) -> int:
    """Logits once, and the gradients that are wanted of hidden states, weight, bias and both adapters."""
    weight, _, lora_a, lora_b = head
    assert weight is not None
    rows, (vocab, width) = hidden[0] * hidden[1], weight
    if num_active is not None:
        rows = torch.sym_min(rows, num_active)
    of_hidden, of_weight, _, of_a, of_b = wanted
    whole = 2 * rows * width * vocab * (1 + of_hidden + of_weight)
    if lora_a is None or lora_b is None:
        return whole
    # Each needs one product with A and one with B.
    return whole + 2 * rows * lora_a[0] * (width + vocab) * (1 + of_hidden + of_a + of_b)


def _kept_products(hidden: Shape, head: list[Shape | None], support: list[Any], wanted: list[bool]) -> int:
    """The same with kept columns alone; ``support`` are the shapes of ids and offsets, if there are any."""
    if not support:
        return 0
    weight, _, lora_a, _ = head
    assert weight is not None
    rows, width = hidden[0] * hidden[1], weight[1]
    entries = support[0][0] + rows
    of_hidden, of_weight, _, of_a, of_b = wanted
    whole = 2 * entries * width * (1 + of_hidden + of_weight)
    if lora_a is None:
        return whole
    with_a, with_b = 1 + of_hidden + of_a, 1 + (of_hidden or of_a) + of_b
    return whole + 2 * lora_a[0] * (rows * width * with_a + entries * with_b)


def linear_row_statistics(
    hidden: Shape, head: Any, rows: Any, host_mask: Any, scalars: Any, num_active: int | None, *others: Any, **_: Any
) -> int:
    """Of log-probs, with the gradient of the hidden states where it is made at once."""
    wanted = [others[-2], False, False, False, False]
    return _products(hidden, head, num_active, wanted) + _kept_products(hidden, head, rows[NUM_FIELDS:], wanted)


def linear_gradient(
    hidden: Shape, head: Any, rows: Any, host_mask: Any, scalars: Any, num_active: int | None, *others: Any, **_: Any
) -> int:
    """Of gradients with the logits made once more."""
    wanted = others[-2]
    return _products(hidden, head, num_active, wanted) + _kept_products(hidden, head, rows[NUM_FIELDS:], wanted)


def linear_policy_loss(hidden: Shape, head: Any, given: Any, *others: Any, **_: Any) -> int:
    """Of a loss with its gradients."""
    num_active, wanted = others[-10], others[-2]
    return _products(hidden, head, num_active, wanted) + _kept_products(hidden, head, given[NUM_GIVEN:], wanted)


FORMULAS = {
    "linear_row_statistics": linear_row_statistics,
    "linear_gradient": linear_gradient,
    "linear_policy_loss": linear_policy_loss,
}


def register(counter: ModuleType) -> None:
    """Tell the counter's module of the operators; it refuses those that it knows, as it does after a reload."""
    if not hasattr(counter, "flop_registry"):
        return  # another thread is half-way through importing it
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.egpo_kernels, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)


class _Finder(MetaPathFinder):
    """Registers the formulas when somebody imports the counter: it loads triton, which this package does not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Now, where the counter is there, or else as soon as it is."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    sys.meta_path.insert(0, _Finder())
