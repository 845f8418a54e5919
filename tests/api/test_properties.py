"""Random batches, every backend, against `reference` in float64 under the accuracy rule of `tests.support.accuracy`.

`reference` in the same dtype is the rule's yardstick; what it computes is held by hand-worked numbers in
`test_reference.py`.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.support.accuracy import assert_accurate, assert_alike, assert_metrics, assert_rounding
from tests.support.batches import FAST, FAST_BACKEND
from tests.support.case import Case
from tests.support.device import DEVICE, ON_GPU
from tests.support.make_case import make_case
from tests.support.runs import advantages, alone, check, leaf, nothing, whole
from tests.support.strategies import cases
from tests.support.terms import gradient_terms, group_metric_terms, group_terms, token_terms

# Interpreted kernels take some milliseconds per block; on a GPU nearly every example compiles kernels of its own.
EXAMPLES = {"portable": 1.0, "triton": 0.06 if ON_GPU else 0.25}


def examples(backend: str, count: int):
    """Settings for about `count` examples on the quickest backend; the same ones in every run."""
    return settings(
        max_examples=int(count * EXAMPLES[backend]),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Shrinking interpreted kernels takes minutes; run such an example on the portable backend instead.
        phases=set(Phase) - ({Phase.shrink, Phase.explain} if backend == "triton" else set()),
    )


AT_LEAST: dict[str, int] = {}
"""Examples that each property runs, over all backends; each run counts its own."""


def over_backends(count: int, *strategies):
    """Run a test on each backend, with examples of these strategies after it."""

    def decorate(test):
        AT_LEAST[test.__name__] = sum(int(count * share) for share in EXAMPLES.values())

        @FAST_BACKEND
        def run(backend):
            walked = 0

            def on_example(drawn):
                nonlocal walked
                walked += 1
                test(backend, *drawn)

            on_example.__name__ = test.__name__  # hypothesis seeds itself from it: other examples for other tests
            examples(backend, count)(given(st.tuples(*strategies))(on_example))()
            assert walked >= int(count * EXAMPLES[backend])

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def micro_batches(case: Case, cuts: list[int]) -> list[Case]:
    """The case cut before these sequences, with the counts of the whole batch."""
    counts = torch.bincount(case.index[case.counted], minlength=case.num_rewards)
    if case.num_tokens is None:
        case = case.replace(num_tokens=int(counts.sum()))
    if case.num_sequences is None:
        case = case.replace(num_sequences=int((counts > 0).sum()))
    edges = sorted({0, *(cut for cut in cuts if cut < case.num_rewards), case.num_rewards})
    parts = [case.take(first, last) for first, last in itertools.pairwise(edges)]
    singles = [case.take(number, number + 1) for number in range(case.num_rewards)]
    # Packed with as many rows as sequences, a per-token value would be read as one per sequence.
    ambiguous = any(part.tokens.shape == (part.num_rewards,) for part in parts)
    return singles if ambiguous else parts


def joined(case: Case, parts: list[dict]) -> dict:
    """Results of micro-batches as one batch would give them; rows past the last sequence belong to none."""
    per_token = case.recipe.loss.reduction == "none"
    gradient = torch.cat([part["gradient"] for part in parts])
    losses = [part["loss"] for part in parts]
    loss = torch.cat(losses) if per_token else torch.stack(losses).sum()
    tail = case.tokens.shape[0] - gradient.shape[0]
    if tail:
        gradient = torch.cat([gradient, gradient.new_zeros(tail, gradient.shape[-1])])
        loss = torch.cat([loss, loss.new_zeros(tail)]) if per_token else loss
    return {"loss": loss, "gradient": gradient, "metrics": ek.combine_metrics(part["metrics"] for part in parts)}


# The properties.


@pytest.mark.skipif(ON_GPU, reason="on a GPU nearly every example compiles kernels, so that there are fewer")
def test_recipes_and_options_are_walked_a_thousand_times():
    losses = ("test_egpo_loss", "test_two_calls_in_micro_batches", "test_logits_policy_loss", "test_policy_loss")
    assert sum(AT_LEAST[name] for name in losses) >= 1000


@over_backends(300, cases())
def test_egpo_loss(backend, case):
    """Loss, logits gradient and all metrics of the one call."""
    found = advantages(case.double(), "reference")
    check(
        case,
        whole(case, backend),
        whole(case, "reference"),
        whole(case.double(), "reference"),
        found.advantages,
        group_terms(case.double(), found),
    )


@over_backends(200, cases(), st.lists(st.integers(1, 11), max_size=3))
def test_two_calls_in_micro_batches(backend, case, cuts):
    """`group_advantages` once, `logits_policy_loss` per micro-batch with global counts: the whole batch's results."""
    exact = advantages(case.double(), "reference")
    found, plain = advantages(case, backend), advantages(case, "reference")
    terms = group_terms(case.double(), exact)
    for name in ("advantages", "weights", "base", "uncertainty"):
        size = getattr(terms, name, terms.advantages)
        assert_accurate(getattr(found, name), getattr(plain, name), getattr(exact, name), size, name)
    renormalised = case.recipe.advantage.renorm == "after"
    assert_metrics(found.metrics, plain.metrics, exact.metrics, group_metric_terms(terms), renormalised)
    parts = [alone(part, backend) for part in micro_batches(case.replace(advantages=found.advantages), cuts)]
    check(
        case,
        joined(case, parts),
        alone(case.replace(advantages=plain.advantages), "reference"),
        alone(case.double().replace(advantages=exact.advantages), "reference"),
        exact.advantages,
        terms,
    )


@over_backends(200, cases())
def test_logits_policy_loss(backend, case):
    """Advantages per sequence or per token, given; looking at fewer rows changes no loss and no gradient."""
    exact, reference = alone(case.double(), "reference"), alone(case, "reference")
    actual = alone(case, backend)
    check(case, actual, reference, exact, case.double().advantages, nothing(case.double()))
    for metrics in ("active", "none"):
        fewer = alone(case, backend, metrics=metrics)
        # Without the entropy to report it is another kernel.
        assert_alike(fewer["gradient"], actual["gradient"], metrics)
        assert_rounding(fewer["loss"], actual["loss"])


@over_backends(200, cases(dtypes=(torch.float32, torch.float64)))
def test_policy_loss(backend, case):
    """Gradients with respect to log-probs and entropy."""

    def run(case: Case, backend: str) -> dict:
        log_probs = case.log_probs().view(case.tokens.shape).to(case.rewards.dtype)
        surprisal = case.log_softmax()
        entropy = -(surprisal.exp() * surprisal.clamp(min=-1e9)).sum(-1).view(case.tokens.shape).to(log_probs.dtype)
        inputs = [start.float().to(log_probs.dtype).requires_grad_() for start in (log_probs, entropy)]
        loss, metrics = ek.policy_loss(
            inputs[0],
            mask=case.counted.view(case.tokens.shape),
            advantages=case.advantages,
            entropy=inputs[1],
            config=case.recipe.loss,
            backend=backend,
            **case.loss_arguments(),
        )
        loss.backward(case.upstream.to(loss.dtype))
        # An entropy that is only reported gets none.
        assert (inputs[1].grad is None) == (case.recipe.loss.entropy_coef == 0)
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        return {"loss": loss.detach(), "gradients": [each.reshape(-1) for each in gradients], "metrics": metrics}

    # Both runs start from the same float32 log-probs, so only what is computed from them differs.
    actual, reference, exact = run(case, backend), run(case, "reference"), run(case.double(), "reference")
    double = case.double()
    given = torch.where(case.counted, double.rows(case.advantages), 0.0)
    terms = token_terms(double, given, torch.zeros_like(given))
    loss_terms = terms.loss.view(exact["loss"].shape) if exact["loss"].dim() else terms.loss.sum()
    assert_accurate(actual["loss"], reference["loss"], exact["loss"], loss_terms, "loss")
    upstream = double.upstream.abs().reshape(-1)
    sizes = (terms.slope * upstream, terms.bonus * upstream)
    for name, size, *found in zip(
        ("log_probs", "entropy"), sizes, actual["gradients"], reference["gradients"], exact["gradients"], strict=True
    ):
        assert_accurate(*found, size, f"gradient of {name}")
        assert (found[0][~case.counted] == 0).all()
    assert_metrics(actual["metrics"], reference["metrics"], exact["metrics"], terms.metrics)


@over_backends(120, cases(), st.booleans(), st.booleans())
def test_token_log_probs(backend, case, use_log_probs, use_entropy):
    """Log-probs and entropy, and gradients through either or both; rows of the gradient sum to 0."""
    shape = case.tokens.shape
    generator = torch.Generator().manual_seed(case.logits.shape[-1])
    upstream = [torch.randn(shape, generator=generator).to(case.rewards) * use for use in (use_log_probs, use_entropy)]

    def run(case: Case, backend: str) -> list:
        logits = leaf(case)
        heat = case.temperature if case.cu_seqlens is None else case.rows(case.temperature).to(case.rewards.dtype)
        mask = case.counted.view(shape)
        found = ek.token_log_probs(
            logits, case.tokens, mask=mask, temperature=heat, support=case.support, return_entropy=True, backend=backend
        )
        torch.autograd.backward(found, [grad.to(value.dtype) for grad, value in zip(upstream, found, strict=True)])
        return [*(value.detach() for value in found), logits.grad.reshape(-1, logits.shape[-1])]

    actual, reference, exact = run(case, backend), run(case, "reference"), run(case.double(), "reference")
    double = case.double()
    terms = token_terms(double, torch.zeros_like(double.log_probs()), torch.zeros_like(double.log_probs()))
    size = gradient_terms(double, *(grad.double().abs().reshape(-1) for grad in upstream))
    counted = case.counted.view(shape)
    for name, own, *found in zip(("log_probs", "entropy"), terms[:2], actual, reference, exact, strict=False):
        assert_accurate(*found, own.view(shape), name)
        assert (found[0][~counted] == 0).all(), name
    gradient = actual[2]
    assert_accurate(gradient, reference[2], exact[2], size, "gradient")
    assert (gradient[~case.counted] == 0).all()
    if gradient.dtype in (torch.float32, torch.float64):
        off = gradient.double().sum(-1).abs()
        assert (off <= 4 * torch.finfo(gradient.dtype).eps * size.sum(-1)).all()


@over_backends(120, cases())
def test_combined_metrics(backend, case):
    """Metrics of sequences one by one, combined, are those of the whole batch."""
    case = case.replace(num_tokens=13, num_sequences=3)
    parts = [alone(part, backend)["metrics"] for part in micro_batches(case, list(range(case.num_rewards)))]
    double = case.double()
    given = torch.where(case.counted, double.rows(double.advantages), 0.0)
    assert_metrics(
        ek.combine_metrics(parts),
        alone(case, "reference")["metrics"],
        alone(double, "reference")["metrics"],
        token_terms(double, given, torch.zeros_like(given)).metrics,
    )


@pytest.mark.parametrize("backend", FAST)
def test_fp16_under_a_loss_scale(backend):
    """fp16 gradients too small for fp16 survive a GradScaler's 65536, as accurate as eager's."""
    case = make_case(3, group_sizes=(4, 4), length=4, dtype=torch.float16, mask="bool", old="near", vocab=200)
    case = case.replace(
        num_tokens=200_000, upstream=torch.tensor(65536.0, device=DEVICE), grad_scale=65536.0, rollout_weights=None
    )
    exact = advantages(case.double(), "reference")
    terms = group_terms(case.double(), exact)
    actual, reference = whole(case, backend), whole(case, "reference")
    check(case, actual, reference, whole(case.double(), "reference"), exact.advantages, terms)
    without = whole(case.replace(upstream=torch.tensor(1.0, device=DEVICE), grad_scale=1.0), backend)
    assert (without["gradient"] != 0).sum() < 0.5 * (actual["gradient"] != 0).sum()
