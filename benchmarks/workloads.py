"""What is measured: the inputs of each workload, the bytes or FLOPs it cannot avoid, and its answer in float64."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.batches import (
    DTYPES,
    KEPT,
    RESPONSE,
    Batch,
    Case,
    Outputs,
    make_hidden,
    make_kept,
    make_logits,
    make_rollouts,
    responses,
)
from egpo_kernels import TokenLogProbs, group_advantages, policy_loss, token_log_probs

SAMPLED = 32
"""Rows of a gradient of logits that are compared with float64; of everything else all are."""
EXACT_ROWS = 64
"""Rows of logits that are float64 at a time."""
LOGITS, HIDDEN, ROLLOUTS = "logits", "hidden states", "rollouts"


class Workload(NamedTuple):
    """`cost` is what any implementation must at least do, `formula` says it in words: FLOPs where hidden states are
    given, which is work for matrix units, else bytes read and written.
    """

    title: str
    make: Callable[[Case], Batch]
    truth: Callable[[Batch], Outputs]
    cost: Callable[[Case], int]
    formula: str
    given: str
    """LOGITS, HIDDEN or ROLLOUTS; time depends on vocabulary and dtype but for the last."""


def size(case: Case) -> str:
    """The batch in words."""
    given = WORKLOADS[case.workload].given
    if given == LOGITS:
        return f"[{case.tokens} x {case.vocab}] {case.dtype}"
    if given == HIDDEN:
        return f"[{case.tokens} x {case.hidden}] times [{case.hidden} x {case.vocab}] {case.dtype}"
    return f"{responses(case)} responses of up to {RESPONSE} tokens, {case.dtype}"


def sampled_rows(gradient: Tensor) -> Tensor:
    """The rows of a gradient of logits that are compared: first, last, and evenly between."""
    rows = gradient.flatten(0, -2)
    return rows[torch.linspace(0, len(rows) - 1, SAMPLED, device=rows.device).long()]


def _exact_rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits in float64 and their tokens, some rows at a time."""
    given = batch.logits if batch.hidden is None else batch.hidden
    head, outside, first = None if batch.weight is None else batch.weight.double().t(), batch.left_out, 0
    for values, tokens in zip(*(field.flatten(0, 1).split(EXACT_ROWS) for field in (given, batch.tokens)), strict=True):
        logits = values.double() if head is None else values.double() @ head
        if outside is not None:
            logits = logits.masked_fill(outside[first : first + len(tokens)], -torch.inf)
            first += len(tokens)
        yield logits[None], tokens[None]


def _exact_log_probs(batch: Batch) -> TokenLogProbs:
    """In float64."""
    with torch.no_grad():
        parts = [
            token_log_probs(logits, tokens, return_entropy=True, backend="reference")
            for logits, tokens in _exact_rows(batch)
        ]
    return TokenLogProbs(*(torch.cat(field, 1).view(batch.tokens.shape) for field in zip(*parts, strict=True)))


def _exact_loss(log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss in float64 and its gradient with respect to the log-probs."""
    leaf = log_probs.detach().double().requires_grad_()
    given = (batch.old_log_probs.double(), batch.advantages.double(), batch.mask)
    loss = policy_loss(leaf, *given, backend="reference").loss
    loss.backward()
    return loss.detach(), leaf.grad


def _logits_truth(batch: Batch) -> Outputs:
    loss, slope = _exact_loss(_exact_log_probs(batch).log_probs, batch)
    leaf = sampled_rows(batch.logits.detach()).double().requires_grad_()
    tokens, slope = (sampled_rows(field[..., None])[None, :, 0] for field in (batch.tokens, slope))
    token_log_probs(leaf[None], tokens, backend="reference").log_probs.backward(slope)
    return {"loss": loss, "gradient": leaf.grad}


def _linear_truth(batch: Batch) -> Outputs:
    """The loss, and whole gradients."""
    leaves = (leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (batch.hidden, batch.weight))
    exact = batch._replace(**dict(zip(("hidden", "weight"), leaves, strict=True)))
    loss, slope = _exact_loss(_exact_log_probs(exact).log_probs, exact)
    for (logits, tokens), part in zip(_exact_rows(exact), slope.flatten().split(EXACT_ROWS), strict=True):
        token_log_probs(logits, tokens, backend="reference").log_probs.backward(part[None])
    return {"loss": loss} | {name: leaf.grad for name, leaf in exact.leaves.items()}


def _log_probs_truth(batch: Batch) -> Outputs:
    found = _exact_log_probs(batch)
    return {name: value * batch.mask for name, value in found._asdict().items()}


def _advantages_truth(batch: Batch) -> Outputs:
    given = (batch.groups, batch.rewards.double(), batch.old_log_probs.double(), batch.mask)
    return {"advantages": group_advantages(*given, backend="reference").advantages}


def _policy_loss_truth(batch: Batch) -> Outputs:
    loss, gradient = _exact_loss(batch.log_probs, batch)
    return {"loss": loss, "gradient": gradient}


def _logits_bytes(passes: int) -> Callable[[Case], int]:
    return lambda case: passes * case.tokens * case.vocab * DTYPES[case.dtype].itemsize


def _product_flops(count: int) -> Callable[[Case], int]:
    return lambda case: count * 2 * case.tokens * case.vocab * case.hidden


def _rollout_bytes(per_token: int) -> Callable[[Case], int]:
    return lambda case: per_token * responses(case) * RESPONSE


WORKLOADS = {
    "logits": Workload(
        "loss and gradient from logits", make_logits, _logits_truth, _logits_bytes(2), "2 N V itemsize", LOGITS
    ),
    "log-probs": Workload(
        "log-probs and entropy from logits, no gradient", make_logits, _log_probs_truth, _logits_bytes(1),
        "N V itemsize", LOGITS,
    ),
    "advantages": Workload(
        "EGPO advantages of a rollout batch", make_rollouts, _advantages_truth, _rollout_bytes(5),
        "5 N (old log-prob, mask)", ROLLOUTS,
    ),
    "policy-loss": Workload(
        "loss and gradient from log-probs of a rollout batch", make_rollouts, _policy_loss_truth, _rollout_bytes(13),
        "13 N (log-prob, old log-prob, mask, gradient)", ROLLOUTS,
    ),
    "linear": Workload(
        "loss and gradients from hidden states and a head that trains", functools.partial(make_hidden, trains=True),
        _linear_truth, _product_flops(3), "3 products of 2 N V H", HIDDEN,
    ),
    "linear-frozen": Workload(
        "loss and gradient from hidden states and a frozen head", functools.partial(make_hidden, trains=False),
        _linear_truth, _product_flops(2), "2 products of 2 N V H", HIDDEN,
    ),
    "linear-support": Workload(
        "loss and gradients from hidden states, of rows that kept 8 tokens", make_kept, _linear_truth,
        lambda case: 3 * 2 * case.tokens * KEPT * case.hidden, "3 products of 2 N 8 H", HIDDEN,
    ),
}  # fmt: skip


class Sizes(NamedTuple):
    """What was asked for; `linear` are (tokens, hidden, vocab)."""

    dtypes: list[str]
    tokens: list[int]
    vocabs: list[int]
    linear: list[tuple[int, int, int]]


def cases(workload: str, device: str, sizes: Sizes) -> Iterator[Case]:
    """The largest batch, then fewer tokens, then smaller vocabularies; the first is what tables lead with."""
    given, (dtypes, tokens, vocabs, linear) = WORKLOADS[workload].given, sizes
    if given == HIDDEN:
        for dtype in dtypes:
            yield from (Case(workload, device, dtype, count, vocab, hidden) for count, hidden, vocab in linear)
        return
    for dtype in dtypes if given == LOGITS else ["fp32"]:
        for count in sorted(tokens, reverse=True):
            yield Case(workload, device, dtype, count, max(vocabs))
        for vocab in sorted(vocabs, reverse=True)[1:] if given == LOGITS else []:
            yield Case(workload, device, dtype, max(tokens), vocab)
