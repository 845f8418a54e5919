"""Memory traffic of rows that keep some tokens, counted in bytes: 10 logits read, the gradient written once."""

import pytest
import torch

from benchmarks.counts.traffic import count_traffic
from egpo_kernels import PolicyLossConfig, SamplingSupport, logits_policy_loss, token_log_probs
from tests.support.device import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="bytes are counted where kernels are interpreted")

SEQUENCES, LENGTH, VOCAB = 2, 3, 16512
ADVANTAGES = torch.tensor([1.0, -0.5])
CONFIGS = {"one pass": PolicyLossConfig(), "late": PolicyLossConfig(ratio="sequence", entropy_coef=0.1)}
RECORDED = [0, 1, 3, 4]


def make(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SEQUENCES, LENGTH, VOCAB, generator=generator).to(dtype).requires_grad_()
    tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=generator)
    sizes = torch.tensor([9 if row in RECORDED else 0 for row in range(SEQUENCES * LENGTH)])
    ids = torch.cat([torch.randperm(VOCAB, generator=generator)[:size] for size in sizes.tolist()])
    return logits, tokens, SamplingSupport(ids, torch.nn.functional.pad(sizes.cumsum(0), (1, 0)))


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_kept_rows_are_not_read_and_written_once(config, dtype, inplace):
    logits, tokens, support = make(dtype)
    own, rows = logits.detach(), SEQUENCES * LENGTH
    with count_traffic() as traffic:
        loss, _ = logits_policy_loss(
            logits, tokens, ADVANTAGES, support=support, config=config, inplace_grad=inplace, backend="triton"
        )
        loss.backward()
    row_bytes, passes = VOCAB * dtype.itemsize, 1 if config is CONFIGS["one pass"] else 2
    for row in RECORDED:
        # The sampled token is none of the nine.
        kept_bytes = 10 * dtype.itemsize
        assert traffic.of(own.view(-1, VOCAB)[row]).loaded == passes * kept_bytes
        written = traffic.of(logits.grad.view(-1, VOCAB)[row])
        assert written.stored == row_bytes + kept_bytes
    zeroed = traffic.of(logits.grad).stored_once - 10 * len(RECORDED) * dtype.itemsize
    assert zeroed == rows * row_bytes
    others = [row for row in range(rows) if row not in RECORDED]
    # A sweep each for statistics and gradient, of which one launch reads both from the same memory.
    assert sum(traffic.of(own.view(-1, VOCAB)[row]).loaded_once for row in others) == passes * len(others) * row_bytes


def test_values_alone_need_no_pass():
    logits, tokens, support = make(torch.float32)
    offsets = support.offsets.clone()
    logits, tokens = logits.detach()[:, :2].contiguous(), tokens[:, :2]
    with count_traffic() as traffic:
        token_log_probs(
            logits, tokens, support=SamplingSupport(support.ids, offsets[[0, 1, 2, 4, 5]]), backend="triton"
        )
    assert traffic.of(logits).loaded == 40 * 4 and traffic.of(logits).stored == 0
