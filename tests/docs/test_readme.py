"""The README is short, its Python runs in order, and its naive code computes what its replacement computes."""

import re

import pytest
import torch

from egpo_kernels import egpo_loss
from tests.support.page import PAGES, ROOT, at_hand, blocks, run

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def names():
    """What a reader of the README has at hand."""
    return at_hand()


def test_it_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_its_pictures_exist_for_light_pages_and_dark_ones():
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', PAGES["README.md"])
    assert shown and all((ROOT / path).is_file() for path in shown)
    light = {path.replace("-light", "-dark") for path in shown if "-light" in path}
    assert light and light == {path for path in shown if "-dark" in path}


def test_every_block_runs_in_order(names):
    space = run("README.md", names)
    assert space["hidden"].grad.abs().sum() > 0 and space["lm_head"].weight.grad.abs().sum() > 0
    assert space["logits"].grad.abs().sum() > 0
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
