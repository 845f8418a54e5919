"""Random batches through hidden states and an output layer: what the logits functions give of the same logits."""

import pytest
import torch
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.api.test_properties import over_backends
from tests.support import linear
from tests.support.accuracy import assert_accurate
from tests.support.batches import FAST_BACKEND
from tests.support.case import Case
from tests.support.device import DEVICE
from tests.support.runs import advantages, alone, check, nothing, whole
from tests.support.strategies import cases
from tests.support.terms import group_terms

SMALL = 260
"""Widest vocabulary: the exact layers below are as wide."""
CHUNK_ROWS = 3
SCALE = 4.0
"""Of a loss whose gradient is 16-bit; a power of two rounds nothing."""


def in_chunks(layer: linear.Layer) -> dict:
    """Few rows at a time, so that there are several chunks."""
    return {"max_chunk_bytes": CHUNK_ROWS * layer.weight.shape[0] * layer.weight.element_size()}


def as_logits(case: Case, found: dict, leaf: str) -> dict:
    """A result with the gradient of the logits that the exact layers leave in one of their leaves."""
    gradient = found[leaf] if leaf == "hidden" else found[leaf].t().reshape(case.logits.shape)
    # The leaf is twice the logits, its gradient half of theirs.
    return {"loss": found["loss"], "metrics": found["metrics"], "gradient": gradient / linear.HALF}


EXACT = {"hidden": linear.logits_as_hidden, "weight": linear.logits_as_weight}
LEAVES = st.sampled_from(sorted(EXACT))


@over_backends(80, cases(widest=SMALL), LEAVES)
def test_linear_egpo_loss_under_the_accuracy_rule(backend, case, leaf):
    """A head that is frozen (the logits are hidden states) or trains (they are its weight), in every dtype."""
    layer = EXACT[leaf](case)
    found = advantages(case.double(), "reference")
    check(
        case,
        as_logits(case, linear.run(case, layer, (leaf,), backend, True, **in_chunks(layer)), leaf),
        whole(case, "reference"),
        whole(case.double(), "reference"),
        found.advantages,
        group_terms(case.double(), found),
    )


@over_backends(100, cases(widest=SMALL), LEAVES)
def test_linear_policy_loss_under_the_accuracy_rule(backend, case, leaf):
    """The same with advantages that are given."""
    layer = EXACT[leaf](case)
    check(
        case,
        as_logits(case, linear.run(case, layer, (leaf,), backend, False, **in_chunks(layer)), leaf),
        alone(case, "reference"),
        alone(case.double(), "reference"),
        case.advantages,
        nothing(case),
    )


@st.composite
def layers(draw, case: Case) -> linear.Layer:
    """A layer of any kind for the rows of a case, in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    vocab, width, rank = case.logits.shape[-1], draw(st.integers(1, 5)), draw(st.integers(1, 2))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.logits.device)

    lora = (normal(rank, width), normal(vocab, rank), draw(st.sampled_from([0.7, -2.0])))
    return linear.Layer(
        normal(*case.tokens.shape, width),
        normal(width, vocab).t() if draw(st.booleans()) else normal(vocab, width),
        normal(vocab) if draw(st.booleans()) else None,
        lora if draw(st.booleans()) else None,
        draw(st.sampled_from([1.0, 0.3, 4.0])),
        draw(st.sampled_from([None, None, 2.0, 30.0])),
    )


def with_logits(case: Case, logits: torch.Tensor) -> Case:
    """The case with other logits, and with old and reference log-probs as far from their log-probs as they were."""
    moved = case.replace(logits=logits.detach())
    shift = (moved.log_probs() - case.log_probs()).view(case.tokens.shape)
    names = [name for name in ("old_log_probs", "ref_log_probs") if getattr(case, name) is not None]
    return moved.replace(**{name: getattr(case, name) + shift for name in names})


HEADS = {
    "trains": ("hidden", "weight", "bias", "A", "B"),
    "frozen": ("hidden",),
    "lora": ("hidden", "A", "B"),
    "weight alone": ("weight",),
    "bias alone": ("hidden", "bias"),
}


def assert_like_logits(found: dict, expected: dict, gradients: dict) -> None:
    """Loss and metrics as those of logits, and gradients as those that logits handed on."""
    torch.testing.assert_close(found["loss"], expected["loss"], equal_nan=True)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert found["metrics"].keys() == expected["metrics"].keys()
    for key, value in expected["metrics"].items():
        torch.testing.assert_close(found["metrics"][key], value, equal_nan=True, msg=key)


@over_backends(160, cases(dtypes=(torch.float64,), widest=64), st.data(), st.sampled_from(sorted(HEADS)), st.booleans())
def test_linear_equals_logits_in_float64(backend, case, data, head, groups):
    """Recipes, layouts and options; bias, scale, softcap and adapters; whatever part of the head trains."""
    layer = data.draw(layers(case))
    wanted = tuple(name for name in HEADS[head] if name in layer.leaves)
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in layer.leaves.items()}
    logits = linear.with_leaves(layer, leaves).logits()
    case = with_logits(case, logits)
    found = linear.run(case, layer, wanted, backend, groups, **in_chunks(layer))
    expected = (whole if groups else alone)(case, "reference")
    logits.backward(expected["gradient"])
    assert_like_logits(found, expected, {name: leaves[name].grad for name in wanted})


@over_backends(40, cases(dtypes=(torch.float64,), widest=64), st.data(), st.sampled_from(sorted(HEADS)))
def test_linear_token_log_probs(backend, case, data, head):
    """Values, and gradients through log-probs, entropy or both."""
    layer, through = data.draw(layers(case)), data.draw(st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)]))
    wanted = tuple(name for name in HEADS[head] if name in layer.leaves)
    results = []
    for function in (ek.linear_token_log_probs, ek.token_log_probs):
        leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in layer.leaves.items()}
        made = linear.with_leaves(layer, leaves)
        first, options = (made.logits(),), {}
        if function is ek.linear_token_log_probs:
            first, options = (made.hidden, made.weight), {**made.options, **in_chunks(layer)}
        packed = case.cu_seqlens is not None
        heat = case.rows(case.temperature).to(torch.float64) if packed else case.temperature
        given = {"mask": case.counted.view(case.tokens.shape), "temperature": heat, "return_entropy": True}
        given["support"] = case.support
        kind = backend if options else "reference"
        values = function(*first, case.tokens, **given, **options, backend=kind)
        torch.autograd.backward([value.sum() * factor for value, factor in zip(values, through, strict=True) if factor])
        results.append([*values, *(leaves[name].grad for name in wanted)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@FAST_BACKEND
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("coefficient", ["known", "late"])
def test_gradcheck(backend, head, coefficient):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    layer = linear.Layer(
        normal(2, 2, 3), normal(5, 3), normal(5), (normal(2, 3), normal(5, 2), 0.5), logit_scale=0.8, logit_softcap=3.0
    )
    tokens = torch.randint(5, (2, 2), generator=generator).to(DEVICE)
    config = ek.PolicyLossConfig(ratio="token" if coefficient == "known" else "sequence", kl_coef=0.1)
    old, ref, given = normal(2, 2).abs().neg() - 2, normal(2, 2), normal(2)
    leaves = {name: leaf.requires_grad_(name in HEADS[head]) for name, leaf in layer.leaves.items()}

    def loss(*tensors):
        made = linear.with_leaves(layer, dict(zip(leaves, tensors, strict=True)))
        return ek.linear_policy_loss(
            made.hidden, made.weight, tokens, given, old_log_probs=old, ref_log_probs=ref, config=config,
            max_chunk_bytes=1, backend=backend, **made.options,
        ).loss  # fmt: skip

    torch.autograd.gradcheck(loss, tuple(leaves.values()))


@FAST_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ["trains", "frozen"])
@pytest.mark.parametrize("coefficient", ["known", "late"])
@pytest.mark.parametrize("limit", [None, 20 * 301 * 6], ids=["one chunk", "chunks"])
def test_sixteen_bit_gradients_are_as_good_as_unfused(backend, limit, dtype, head, coefficient):
    """Of hidden states and weight, in chunks, against float64; unfused is torch's product and `reference` behind it."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in ((4, 24, 48), (301, 48)))
    weight *= 0.3
    tokens = torch.randint(301, (4, 24), generator=generator).to(DEVICE)
    advantages = torch.randn(4, generator=generator).to(DEVICE)
    ratio = "token" if coefficient == "known" else "sequence"
    config = ek.PolicyLossConfig(kl_coef=0.1, reduction="sum", ratio=ratio)
    old = ek.linear_token_log_probs(hidden, weight, tokens).log_probs
    old -= 0.1 * torch.rand(4, 24, generator=generator).to(DEVICE)
    names = ("hidden", "weight")[: 2 if head == "trains" else 1]

    def gradients(kind, wide):
        cast = torch.float64 if wide else torch.float32
        made = (leaf.to(torch.float64 if wide else dtype).clone() for leaf in (hidden, weight))
        leaves = [leaf.requires_grad_(name in names) for name, leaf in zip(("hidden", "weight"), made, strict=True)]
        given = {"old_log_probs": old.to(cast), "ref_log_probs": old.to(cast) + 0.1, "config": config, "backend": kind}
        if kind == "reference":
            loss = ek.logits_policy_loss(leaves[0] @ leaves[1].t(), tokens, advantages.to(cast), **given).loss
        else:
            given |= {"grad_scale": SCALE, "max_chunk_bytes": limit}
            loss = ek.linear_policy_loss(*leaves, tokens, advantages, **given).loss
        loss.backward(torch.tensor(SCALE, dtype=cast, device=DEVICE))
        return [leaf.grad for leaf in leaves if leaf.requires_grad]

    runs = gradients(backend, False), gradients("reference", False), gradients("reference", True)
    for name, ours, unfused, exact in zip(names, *runs, strict=True):
        assert_accurate(ours, unfused, exact, 0.0, name)
        errors = [(one.double() - exact).norm() for one in (ours, unfused)]
        # As far off on the whole, but for what another order of sums does to a rounding; scaled rows round once more.
        if (head, coefficient) != ("frozen", "late"):
            assert errors[0] <= errors[1] * (1 + torch.finfo(dtype).eps), f"{name}: {errors}"


@FAST_BACKEND
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5, 10.0])
def test_rows_scaled_afterwards_are_not_rounded_alike(backend, temperature):
    """With 1 / temperature as every row's coefficient all their errors would have one sign."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((8, 32, 32), (199, 32)))
    tokens = torch.randint(199, (8, 32), generator=generator).to(DEVICE)
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = hidden.bfloat16().to(dtype).requires_grad_()
        given = {"temperature": temperature, "backend": backend if dtype == torch.bfloat16 else "reference"}
        found = ek.linear_token_log_probs(leaf, weight.bfloat16().to(dtype) * 0.1, tokens, **given)
        found.log_probs.sum().backward()
        gradients.append(leaf.grad.double())
    error, exact = gradients[0] - gradients[1], gradients[1]
    relative, along = error.norm() / exact.norm(), (error * exact).sum() / exact.square().sum()
    # Errors of one row may line up; those of all rows add up like random ones, to within four standard deviations.
    assert along.abs() <= 4 * relative / tokens.numel() ** 0.5
