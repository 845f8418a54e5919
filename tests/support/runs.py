"""One way to run a case, whatever the function under test, and to hold what comes out to the accuracy rule."""

import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_accurate, assert_metrics
from tests.support.case import Case
from tests.support.terms import GroupTerms, group_metric_terms, token_terms


def leaf(case: Case) -> torch.Tensor:
    return case.logits.detach().requires_grad_()


def whole(case: Case, backend: str, **options) -> dict:
    """`egpo_loss`: loss, gradient, metrics."""
    logits = leaf(case)
    loss, metrics = ek.egpo_loss(
        logits,
        case.tokens,
        case.groups,
        case.rewards,
        mask=case.mask,
        entropy_mask=case.entropy_mask,
        correct=case.correct,
        temperature=case.temperature,
        support=case.support,
        recipe=case.recipe,
        backend=backend,
        **{"grad_scale": case.grad_scale, **case.loss_arguments(), **options},
    )
    loss.backward(case.upstream.to(loss.dtype))
    return {"loss": loss.detach(), "gradient": logits.grad, "metrics": metrics}


def loss_of(case: Case, logits: torch.Tensor, backend: str, **options) -> ek.LossOutput:
    """`logits_policy_loss` of ``logits`` with the case's own advantages."""
    return ek.logits_policy_loss(
        logits,
        case.tokens,
        case.advantages,
        case.mask,
        temperature=case.temperature,
        support=case.support,
        config=case.recipe.loss,
        backend=backend,
        **{**case.loss_arguments(), **options},
    )


def alone(case: Case, backend: str, **options) -> dict:
    """`loss_of`: loss, gradient, metrics."""
    logits = leaf(case)
    loss, metrics = loss_of(case, logits, backend, **{"grad_scale": case.grad_scale, **options})
    loss.backward(case.upstream.to(loss.dtype))
    return {"loss": loss.detach(), "gradient": logits.grad, "metrics": metrics}


def advantages(case: Case, backend: str) -> ek.GroupAdvantages:
    """`group_advantages` of a rollout batch: uncertainty from what was sampled, or from the same logits."""
    found = ek.token_log_probs(
        case.logits,
        case.tokens,
        mask=case.counted.view(case.tokens.shape),
        temperature=case.temperature if case.cu_seqlens is None else case.rows(case.temperature).to(case.rewards.dtype),
        support=case.support,
        return_entropy=case.recipe.advantage.statistic == "shannon",
        backend=backend,
    )
    return ek.group_advantages(
        case.groups,
        case.rewards,
        found.log_probs if case.old_log_probs is None else case.old_log_probs,
        case.counted.view(case.tokens.shape),
        cu_seqlens=case.cu_seqlens,
        entropy=found.entropy,
        entropy_mask=case.entropy_mask,
        correct=case.correct,
        config=case.recipe.advantage,
        backend=backend,
    )


def nothing(case: Case) -> GroupTerms:
    return GroupTerms(*[torch.zeros_like(case.rewards)] * 3)


def check(case: Case, actual: dict, reference: dict, exact: dict, advantages: torch.Tensor, groups: GroupTerms) -> None:
    """Loss, gradient and metrics of one call under the rule; nothing at all from rows that do not count."""
    double = case.double()
    given = torch.where(case.counted, double.rows(advantages), 0.0)
    terms = token_terms(double, given, double.rows(groups.advantages))
    upstream = double.upstream.abs().reshape(-1, 1)
    loss_terms = terms.loss.view(exact["loss"].shape) if exact["loss"].dim() else terms.loss.sum()
    assert_accurate(actual["loss"], reference["loss"], exact["loss"], loss_terms, "loss")
    assert actual["gradient"].shape == case.logits.shape and actual["gradient"].dtype == case.logits.dtype
    flat = [found["gradient"].reshape(-1, case.logits.shape[-1]) for found in (actual, reference, exact)]
    assert_accurate(*flat, terms.logits * upstream, "gradient")
    assert (flat[0][~case.counted] == 0).all()
    renormalised = case.recipe.advantage.renorm == "after"
    seen = {**terms.metrics, **group_metric_terms(groups)}
    size = double.rows(groups.advantages)
    unsigned = case.counted & (size > 0) & (given.abs() <= 4 * torch.finfo(torch.float32).eps * size)
    assert_metrics(actual["metrics"], reference["metrics"], exact["metrics"], seen, renormalised, int(unsigned.sum()))
