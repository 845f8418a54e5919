"""Torch's launches of a known sequence of operations are known."""

import pytest
import torch

from benchmarks.counts.operations import operations

pytestmark = pytest.mark.cpu

VALUES = torch.arange(12.0).view(3, 4)
MASK = VALUES > 3
PLACES = torch.tensor([0, 2, 1])
NOTHING = torch.empty(0, 4)


@pytest.mark.parametrize(
    ("run", "launches"),
    [
        (lambda: None, []),
        (lambda: VALUES.view(-1)[1:].unsqueeze(0).expand(3, -1).t().detach(), []),
        (lambda: torch.ops.aten._unsafe_view(VALUES, [12]), []),
        (lambda: torch.empty(3).new_empty(4).resize_(5), []),
        (lambda: torch.empty_like(VALUES), []),
        (lambda: VALUES.float().contiguous().to("cpu"), []),
        (lambda: torch.zeros(3), ["zero_"]),
        (lambda: torch.full((3,), 2.0), ["fill_"]),
        (lambda: torch.arange(5), ["arange"]),
        (lambda: torch.empty(3, 4).copy_(VALUES), ["copy_"]),
        (lambda: VALUES.bfloat16(), ["copy_"]),
        (lambda: VALUES.t().contiguous(), ["copy_"]),
        # A number beside a tensor goes along with the launch, but for `where`, which makes a tensor of it.
        (lambda: VALUES * 2 + 1, ["mul", "add"]),
        (lambda: torch.where(MASK, VALUES, VALUES), ["where"]),
        (lambda: torch.where(MASK, VALUES, 0.0), ["scalar_tensor", "where"]),
        (lambda: VALUES.masked_fill(MASK, 0.0), ["copy_", "masked_fill_"]),
        (lambda: VALUES.isfinite(), ["abs", "ne", "eq", "mul"]),
        # On a CPU these call operations that a GPU's kernels do not.
        (lambda: VALUES.sum(-1), ["sum"]),
        (lambda: VALUES.mean(), ["mean"]),
        (lambda: VALUES.std(-1), ["std"]),
        (lambda: VALUES.cummax(0), ["cummax"]),
        (lambda: VALUES.sort(-1), ["sort"]),
        (lambda: torch.addmm(VALUES[0, :3], VALUES, VALUES.t()), ["addmm"]),
        (lambda: VALUES[PLACES], ["index"]),
        (lambda: VALUES[MASK], ["nonzero", "index"]),
        (lambda: VALUES.repeat_interleave(PLACES, 0), ["repeat_interleave", "index_select"]),
        # What only answers the host is no launch.
        (lambda: VALUES.sum().item(), ["sum"]),
        (lambda: (NOTHING + 1, NOTHING.clone(), torch.zeros(0), NOTHING.fill_(1)), []),
        (lambda: NOTHING.sum(), ["sum"]),
    ],
)
def test_a_known_sequence_of_operations_has_a_known_count(run, launches):
    assert operations(run) == launches


def test_backward_counts_its_own_ones_the_sum_of_two_gradients_and_the_sum_into_one_that_is_there():
    leaf = VALUES.clone().requires_grad_()

    def run():
        (leaf.exp().sum() + leaf.sin().sum()).backward()

    forward = ["exp", "sum", "sin", "sum", "add"]
    backward = ["add_", "cos", "fill_", "mul", "mul"]
    for more in ([], ["add_"]):
        found = operations(run)
        assert (found[:5], sorted(found[5:])) == (forward, more + backward)


@torch.library.custom_op("egpo_tests::twice_and_one", mutates_args=())
def twice_and_one(values: torch.Tensor) -> torch.Tensor:
    return values.mul(2).add_(1)


def test_what_an_opaque_operator_does_is_counted():
    assert operations(lambda: twice_and_one(VALUES)) == ["mul", "add_"]


def test_a_counter_inside_a_counter_is_refused():
    with pytest.raises(RuntimeError, match="profiler"):
        operations(lambda: operations(lambda: None))
    assert operations(lambda: VALUES * 2) == ["mul"]
