"""torch.compile(fullgraph=True, dynamic=True) traces every public function, forward and backward."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import egpo_kernels as ek
from tests.support.batches import (
    FAST,
    differentiate,
    from_log_probs,
    make_batch,
    one_pass,
    only_log_probs,
    two_pass,
    whole_groups,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
PER_TOKEN = ek.PolicyLossConfig(reduction="none")
FAST_BACKEND = pytest.mark.parametrize("backend", FAST)


def int_groups(batch, backend):
    """Off-policy `egpo_loss`, groups as an int, values of every kind of temperature."""
    return ek.egpo_loss(
        batch.logits,
        batch.tokens,
        2,
        batch.rewards,
        mask=batch.mask,
        old_log_probs=batch.old_log_probs,
        cu_seqlens=batch.cu_seqlens,
        temperature=torch.full_like(batch.rewards, 0.8),
        num_tokens=24,
        group_size=2,
        backend=backend,
    )


def scaled(batch, backend):
    """Loss per token of one pass with another temperature, an accumulation scale and rollout weights."""
    return one_pass(
        batch, backend, temperature=0.7, grad_scale=0.5, num_tokens=torch.tensor(24), rollout_weights=batch.advantages
    )


def per_token(batch, backend):
    """Reduction `none`, whose upstream gradient is per token."""
    loss, metrics = one_pass(batch, backend, PER_TOKEN)
    return ek.LossOutput(loss.sum(), metrics)


PATHS = [one_pass, two_pass, whole_groups, only_log_probs, from_log_probs, int_groups, scaled, per_token]
CASES = [(path, layout) for path, layout in zip(PATHS * 2, ["padded", "packed"] * len(PATHS), strict=True)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, compiler="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)


def assert_close(found, wanted):
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.gradient, wanted.gradient)
    assert found.metrics.keys() == wanted.metrics.keys()
    for key, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[key], value, equal_nan=True, msg=key)


@pytest.mark.parametrize("path, layout", CASES, ids=lambda value: getattr(value, "__name__", value))
@FAST_BACKEND
def test_compiled_equals_eager_and_compiles_once(path, layout, backend):
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(path, counter)
    for lengths, vocab in ((3, 4, 2, 4), 37), ((5, 3, 2, 2, 6, 4), 41):
        batch = make_batch(layout, vocab, lengths=lengths)
        assert_close(differentiate(step, batch, backend), differentiate(path, batch, backend))
    assert counter.frame_count == 1
