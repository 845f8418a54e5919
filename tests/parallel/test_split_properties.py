"""Random batches spread over ranks at random columns, under the accuracy rule against the unsplit rows."""

import torch
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.api.test_properties import over_backends
from tests.linear.test_linear_properties import (
    EXACT,
    HEADS,
    LEAVES,
    SMALL,
    as_logits,
    assert_like_logits,
    layers,
    with_logits,
)
from tests.parallel.split import cuts, split_linear, split_logits
from tests.support import linear
from tests.support.accuracy import assert_accurate
from tests.support.runs import advantages, alone, check, leaf, nothing, whole
from tests.support.strategies import cases
from tests.support.terms import gradient_terms, group_terms, token_terms

PADDING = st.sampled_from([0, 0, 1, 7])


@over_backends(60, cases(), st.data(), PADDING)
def test_split_egpo_loss(backend, case, data, padding):
    """Recipes, options, dtypes, layouts and strides; uncertainties from split logits among them."""
    bounds = data.draw(cuts(case.logits.shape[-1]))
    found = advantages(case.double(), "reference")
    check(
        case,
        split_logits(case, bounds, whole, backend, padding),
        whole(case, "reference"),
        whole(case.double(), "reference"),
        found.advantages,
        group_terms(case.double(), found),
    )


@over_backends(80, cases(), st.data(), PADDING, st.sampled_from(["all", "active", "none"]))
def test_split_logits_policy_loss(backend, case, data, padding, metrics):
    bounds = data.draw(cuts(case.logits.shape[-1]))
    exact, reference = alone(case.double(), "reference"), alone(case, "reference")

    def run(*args, **options):
        return alone(*args, metrics=metrics, **options)

    actual = split_logits(case, bounds, run, backend, padding)
    if metrics != "all":
        # Rows that are left out have no metrics to be compared.
        assert bool(actual["metrics"]) == (metrics == "active")
        actual["metrics"] = split_logits(case, bounds, alone, backend, padding)["metrics"]
    check(case, actual, reference, exact, case.double().advantages, nothing(case.double()))


@over_backends(40, cases(), st.data(), st.booleans(), st.booleans())
def test_split_token_log_probs(backend, case, data, use_log_probs, use_entropy):
    """Log-probs and entropy the same bits on all ranks; gradients through either, whose rows sum to 0 over ranks."""
    bounds, shape = data.draw(cuts(case.logits.shape[-1])), case.tokens.shape
    generator = torch.Generator().manual_seed(case.logits.shape[-1])
    upstream = [torch.randn(shape, generator=generator).to(case.rewards) * use for use in (use_log_probs, use_entropy)]

    def run(case, backend, **options):
        logits = leaf(case)
        heat = case.temperature if case.cu_seqlens is None else case.rows(case.temperature).to(case.rewards.dtype)
        found = ek.token_log_probs(
            logits, case.tokens, mask=case.counted.view(shape), temperature=heat, support=case.support,
            return_entropy=True, backend=backend, **options,
        )  # fmt: skip
        torch.autograd.backward(found, [grad.to(value.dtype) for grad, value in zip(upstream, found, strict=True)])
        return {"loss": torch.stack([value.detach() for value in found]), "gradient": logits.grad, "metrics": {}}

    actual, reference, exact = (
        split_logits(case, bounds, run, backend), run(case, "reference"), run(case.double(), "reference")
    )  # fmt: skip
    double = case.double()
    terms = token_terms(double, torch.zeros_like(double.log_probs()), torch.zeros_like(double.log_probs()))
    size = gradient_terms(double, *(grad.double().abs().reshape(-1) for grad in upstream))
    counted = case.counted.view(shape)
    for number, (name, own) in enumerate(zip(("log_probs", "entropy"), terms[:2], strict=False)):
        values = [found["loss"][number] for found in (actual, reference, exact)]
        assert_accurate(*values, own.view(shape), name)
        assert (values[0][~counted] == 0).all(), name
    gradients = [found["gradient"].reshape(-1, case.logits.shape[-1]) for found in (actual, reference, exact)]
    assert_accurate(*gradients, size, "gradient")
    assert (gradients[0][~case.counted] == 0).all()
    if case.logits.dtype in (torch.float32, torch.float64):
        off = gradients[0].double().sum(-1).abs()
        assert (off <= 4 * torch.finfo(case.logits.dtype).eps * size.sum(-1)).all()


@over_backends(50, cases(widest=SMALL), st.data(), LEAVES, PADDING)
def test_split_linear_policy_loss(backend, case, data, name, padding):
    """The gradient of each logit comes from one rank, so that no sum over ranks is rounded: in every dtype."""
    layer, bounds = EXACT[name](case), data.draw(cuts(case.logits.shape[-1]))
    options = {"max_chunk_bytes": 6 * bounds[-1] * layer.weight.element_size() // (len(bounds) - 1)}
    found = split_linear(case, layer, bounds, (name,), backend, False, padding, **options)
    check(
        case,
        as_logits(case, found, name),
        alone(case, "reference"),
        alone(case.double(), "reference"),
        case.advantages,
        nothing(case),
    )


@over_backends(
    60, cases(dtypes=(torch.float64,), widest=64), st.data(), st.sampled_from(sorted(HEADS)), st.booleans(), PADDING
)
def test_split_linear_equals_logits_in_float64(backend, case, data, head, groups, padding):
    """Recipes, layouts and options; bias, scale, softcap and adapters, summed over ranks; chunks that do not divide."""
    layer, bounds = data.draw(layers(case)), data.draw(cuts(case.logits.shape[-1]))
    wanted = tuple(name for name in HEADS[head] if name in layer.leaves)
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in layer.leaves.items()}
    logits = linear.with_leaves(layer, leaves).logits()
    case = with_logits(case, logits)
    found = split_linear(
        case,
        layer,
        bounds,
        wanted,
        backend,
        groups,
        padding,
        max_chunk_bytes=data.draw(st.sampled_from([1, 4000, 10**6])),
    )
    expected = (whole if groups else alone)(case, "reference")
    logits.backward(expected["gradient"])
    assert_like_logits(found, expected, {name: leaves[name].grad for name in wanted})
