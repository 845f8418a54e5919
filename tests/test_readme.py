"""The README's Python runs, in order, and its naive code computes what its replacement computes."""

import re
from pathlib import Path

import pytest
import torch

from egpo_kernels import egpo_loss

pytestmark = pytest.mark.cpu
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What a reader of the README has at hand."""
    generator = torch.Generator().manual_seed(0)
    sequences, length, vocab = 16, 6, 50
    table = torch.randn(vocab, vocab, dtype=torch.float64, generator=generator).requires_grad_()
    input_ids = torch.randint(0, vocab, (sequences, length), generator=generator)
    mask = torch.rand(sequences, length, generator=generator) > 0.2
    mask[:, 0] = True

    def model(ids):
        return table[ids]

    logits = model(input_ids).detach().requires_grad_()
    now = logits.detach().log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 1] + [0.0] * 8, dtype=torch.float64)
    return {
        "table": table,
        "model": model,
        "logits": logits,
        "hidden": torch.randn(sequences, length, 4, dtype=torch.float64, generator=generator).requires_grad_(),
        "lm_head": torch.nn.Linear(4, vocab, bias=False, dtype=torch.float64),
        "tokens": input_ids,
        "input_ids": input_ids,
        "response_mask": mask,
        "mask": mask,
        "groups": torch.arange(sequences) // 8,
        "rewards": rewards,
        "old_log_probs": now + 0.3 * torch.randn(now.shape, dtype=torch.float64, generator=generator),
        "sampler_log_probs": now + 0.1 * torch.randn(now.shape, dtype=torch.float64, generator=generator),
        "ref_log_probs": now + 0.3 * torch.randn(now.shape, dtype=torch.float64, generator=generator),
    }


def test_every_block_runs_in_order(names):
    assert len(BLOCKS) >= 5
    space = dict(names)
    for block in BLOCKS:
        exec(block, space)
    assert space["hidden"].grad.abs().sum() > 0 and space["lm_head"].weight.grad.abs().sum() > 0
    assert space["table"].grad.abs().sum() > 0
    assert space["metrics"]["policy/tokens/sum"] == space["mask"].sum()
    assert space["mine"].loss.clip_high == 0.28


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_the_naive_code_computes_the_same(names, backend):
    space = dict(names)
    exec(BLOCKS[0], space)
    arguments = [names[name] for name in ("logits", "tokens", "groups", "rewards")]
    given = {name: names[name] for name in ("old_log_probs", "mask")}
    naive = space["naive_loss"](*arguments, **given)
    loss, metrics = egpo_loss(*arguments, **given, backend=backend)
    assert metrics["egpo/groups/all_wrong/sum"] == 1 and metrics["policy/clip_low/mean"] > 0
    eps = torch.finfo(torch.float32).eps  # the naive code sums in float32
    assert (naive - loss).detach().abs() <= 4 * eps
