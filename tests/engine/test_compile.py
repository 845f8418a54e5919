"""torch.compile(fullgraph=True, dynamic=True) traces every public function, forward and backward."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import egpo_kernels as ek
from tests.support.batches import (
    FAST,
    FAST_BACKEND,
    LAYOUTS,
    NEEDS_TRITON,
    differentiate,
    every_helper,
    from_log_probs,
    frozen_head,
    make_batch,
    one_pass,
    only_log_probs,
    trained_head,
    two_pass,
    whole_groups,
)
from tests.support.device import DEVICE, size

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning"
    ),
    # Inductor says so whenever it compiles for such a GPU.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
PER_TOKEN = ek.PolicyLossConfig(reduction="none")


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
        batch, backend, temperature=0.7, grad_scale=0.5, num_tokens=batch.mask.sum(), rollout_weights=batch.advantages
    )


def per_token(batch, backend):
    """Reduction `none`, whose upstream gradient is per token."""
    loss, metrics = one_pass(batch, backend, PER_TOKEN)
    return ek.LossOutput(loss.sum(), metrics)


PATHS = [one_pass, two_pass, whole_groups, only_log_probs, from_log_probs, int_groups, scaled, per_token]
PATHS += [frozen_head, trained_head]
# What is compiled is the graph around the operators, the same for both: so they share the layouts.
CASES = [(path, LAYOUTS[number % 2], "portable") for number, path in enumerate(PATHS)]
CASES += [
    pytest.param(path, LAYOUTS[(number + 1) % 2], "triton", marks=NEEDS_TRITON) for number, path in enumerate(PATHS)
]


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


@pytest.mark.parametrize("path, layout, backend", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_compiled_equals_eager_and_compiles_once(path, layout, backend):
    assert_compiles_once(path, layout, backend)


def assert_compiles_once(path, layout, backend):
    """Batches of two sizes through one graph, each as eager has it."""
    counter = CompileCounterWithBackend("aot_eager")
    step, frames = compiled(path, counter), []
    for lengths, vocab in ((3, 4, 2, 4), 37), ((5, 3, 2, 2, 6, 4), 41):
        batch = make_batch(layout, vocab, lengths=lengths)
        assert_close(differentiate(step, batch, backend), differentiate(path, batch, backend))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@FAST_BACKEND
def test_group_advantages(layout, backend):
    def advantages(batch, groups):
        return ek.group_advantages(
            groups, batch.rewards, batch.old_log_probs, batch.mask, cu_seqlens=batch.cu_seqlens, backend=backend
        )

    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(advantages, counter)
    for lengths in ((3, 4, 2, 4), (5, 3, 2, 2, 6, 4)):
        batch = make_batch(layout, lengths=lengths)
        for groups in (batch.groups, 2):
            found, wanted = step(batch, groups), advantages(batch, groups)
            for name in ("advantages", "weights", "base", "uncertainty"):
                torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
            assert found.metrics.keys() == wanted.metrics.keys()


@FAST_BACKEND
def test_constants_may_be_made_inside(backend):
    """Tensors of sizes that are written in the code, beside sizes that may change."""

    def step(batch, backend):
        advantages, mask = torch.tensor([1.0, -0.5, 0.0, 2.0], device=DEVICE), torch.ones(4, 4, device=DEVICE)
        return ek.logits_policy_loss(batch.logits, batch.tokens, advantages, mask, backend=backend)

    batch = make_batch("padded")
    assert batch.mask.shape == (4, 4) and not batch.mask.all()
    assert_close(differentiate(compiled(step), batch, backend), differentiate(step, batch, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_helpers(layout):
    """A full graph also means that nothing waits for a value."""
    counter = CompileCounterWithBackend("aot_eager")
    step, frames = compiled(every_helper, counter), []
    for lengths in ((3, 4, 2, 4), (5, 3, 2, 2, 6, 4)):
        batch = make_batch(layout, lengths=lengths)
        for found, wanted in zip(step(batch), every_helper(batch), strict=True):
            assert torch.equal(found, wanted)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]


def test_next_token_targets():
    step = compiled(ek.next_token_targets)
    for shape in ((2, 5), (3, 7)):
        ids, mask = torch.randint(9, shape), torch.randint(2, shape)
        for found, wanted in zip(step(ids, mask), ek.next_token_targets(ids, mask), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("counts", [(24, 31, 40), (24.0, 31.5, 40.25)], ids=["int", "float"])
def test_global_counts_may_change(counts):
    # They do so with every batch.
    counter, frames, batch = CompileCounterWithBackend("aot_eager"), [], make_batch()
    step = compiled(one_pass, counter)
    for count in counts:
        found, wanted = (differentiate(call, batch, "portable", num_tokens=count) for call in (step, one_pass))
        assert_close(found, wanted)
        frames.append(counter.frame_count)
    assert frames[0] == frames[2]


@pytest.mark.parametrize("path", [one_pass, two_pass])
@FAST_BACKEND
def test_in_place(path, backend):
    batch = make_batch()

    def step(batch, backend):
        return path(batch._replace(logits=batch.logits * 1.0), backend, inplace_grad=True)

    assert_close(differentiate(compiled(step), batch, backend), differentiate(path, batch, backend))


@FAST_BACKEND
def test_values_are_checked(backend, values_are_checked):
    batch = make_batch()
    batch.tokens[0, 1] = 99
    with pytest.raises(ValueError, match="tokens holds 99"):
        compiled(one_pass)(batch, backend)
    packed = make_batch("packed")
    packed.cu_seqlens[1] = 9
    with pytest.raises(ValueError, match="cu_seqlens"):
        compiled(one_pass)(packed, backend)


@FAST_BACKEND
def test_a_model_in_front(backend):
    torch.manual_seed(0)
    head, batch = torch.nn.Linear(6, 37).to(DEVICE), make_batch()
    hidden = torch.randn(*batch.tokens.shape, 6).to(DEVICE)

    def step(hidden, batch):
        return whole_groups(batch._replace(logits=head(hidden)), backend).loss

    gradients = []
    for call in (step, compiled(step)):
        head.zero_grad()
        call(hidden, batch).backward()
        gradients.append(head.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", size(["portable"], FAST))
def test_inductor(backend):
    batch = make_batch()
    wanted = differentiate(one_pass, batch, backend)
    assert_close(differentiate(compiled(one_pass, "inductor"), batch, backend), wanted)
