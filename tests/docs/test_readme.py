"""The README's Python runs, in order, and its naive code computes what its replacement computes."""

import pytest
import torch

from egpo_kernels import egpo_loss
from tests.support.page import at_hand, blocks, run

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def names():
    """What a reader of the README has at hand."""
    return at_hand()


def test_every_block_runs_in_order(names):
    space = run("README.md", names)
    assert space["hidden"].grad.abs().sum() > 0 and space["lm_head"].weight.grad.abs().sum() > 0
    assert space["table"].grad.abs().sum() > 0
    assert space["metrics"]["policy/tokens/sum"] == space["mask"].sum()
    assert space["mine"].loss.clip_high == 0.28


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_the_naive_code_computes_the_same(names, backend):
    space = dict(names)
    exec(blocks("README.md")[0], space)
    arguments = [names[name] for name in ("logits", "tokens", "groups", "rewards")]
    given = {name: names[name] for name in ("old_log_probs", "mask")}
    naive = space["naive_loss"](*arguments, **given)
    loss, metrics = egpo_loss(*arguments, **given, backend=backend)
    assert metrics["egpo/groups/all_wrong/sum"] == 1 and metrics["policy/clip_low/mean"] > 0
    eps = torch.finfo(torch.float32).eps  # the naive code sums in float32
    assert (naive - loss).detach().abs() <= 4 * eps
