"""What is measured: the inputs of each workload, the bytes it cannot avoid, and its answer in float64."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels import TokenLogProbs, group_advantages, policy_loss, token_log_probs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEQUENCES = 8
ROLLOUT = 128
"""Micro-batches of `--tokens` tokens in a rollout batch: what works on log-probs alone sees that many at once."""
RESPONSE = 1024
"""Tokens of a response in a rollout batch."""
GROUP = 8
"""Responses to one prompt."""
SAMPLED = 32
"""Rows of a gradient of logits that are compared with float64; of everything else all are."""
EXACT_ROWS = 64
"""Rows of logits that are float64 at a time."""


class Case(NamedTuple):
    """One batch: `tokens` rows of logits over `vocab`."""

    workload: str
    device: str
    dtype: str
    tokens: int
    vocab: int


class Batch(NamedTuple):
    """The inputs of a case; a workload leaves out what it has no use for."""

    tokens: Tensor | None = None
    mask: Tensor | None = None
    logits: Tensor | None = None
    log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    groups: Tensor | None = None
    rewards: Tensor | None = None


Outputs = dict[str, Tensor]


class Workload(NamedTuple):
    """`bytes_moved` is what any implementation must read and write; `formula` says it in words."""

    title: str
    make: Callable[[Case], Batch]
    truth: Callable[[Batch], Outputs]
    bytes_moved: Callable[[Case], int]
    formula: str
    of_logits: bool
    """Whether time depends on the vocabulary and on the dtype of the logits."""


def size(case: Case) -> str:
    """The batch in words."""
    if WORKLOADS[case.workload].of_logits:
        return f"[{case.tokens} x {case.vocab}] {case.dtype}"
    return f"{_responses(case)} responses of up to {RESPONSE} tokens, {case.dtype}"


def _responses(case: Case) -> int:
    return max(ROLLOUT * case.tokens // RESPONSE, 2 * GROUP)


def _seeded(case: Case) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(0)


def _drawn_logits(case: Case, generator: torch.Generator) -> Tensor:
    length = case.tokens // SEQUENCES
    logits = torch.empty(SEQUENCES, length, case.vocab, dtype=DTYPES[case.dtype], device=case.device)
    for sequence in logits:
        for rows in sequence.split(512):
            rows.copy_(3 * torch.randn(rows.shape, generator=generator, device=case.device))
    return logits


def make_logits(case: Case) -> Batch:
    """Logits that score next tokens, so each sequence's last position is masked; old log-probs a little off."""
    generator = _seeded(case)
    logits = _drawn_logits(case, generator)
    shape, device = logits.shape[:2], case.device
    tokens = torch.randint(0, case.vocab, shape, generator=generator, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[:, -1] = False
    now = token_log_probs(logits, tokens).log_probs
    old = now + 0.2 * torch.randn(shape, generator=generator, device=device)
    advantages = torch.randn(SEQUENCES, generator=generator, device=device)
    return Batch(tokens, mask, logits.requires_grad_(), old_log_probs=old, advantages=advantages)


def make_rollouts(case: Case) -> Batch:
    """A rollout batch of log-probs: responses of mixed lengths, right-padded, in groups, with binary rewards."""
    generator = _seeded(case)
    count = _responses(case)
    shape, device = (count, RESPONSE), case.device
    log_probs = -torch.rand(shape, generator=generator, device=device)
    old = log_probs + 0.2 * torch.randn(shape, generator=generator, device=device)
    lengths = torch.randint(1, RESPONSE + 1, (count, 1), generator=generator, device=device)
    return Batch(
        mask=torch.arange(RESPONSE, device=device) < lengths,
        log_probs=log_probs.requires_grad_(),
        old_log_probs=old,
        advantages=torch.randn(count, generator=generator, device=device),
        groups=torch.arange(count, device=device) // GROUP,
        rewards=torch.randint(0, 2, (count,), generator=generator, device=device).float(),
    )


def sampled_rows(gradient: Tensor) -> Tensor:
    """The rows of a gradient of logits that are compared: first, last, and evenly between."""
    rows = gradient.flatten(0, -2)
    return rows[torch.linspace(0, len(rows) - 1, SAMPLED, device=rows.device).long()]


def _exact_log_probs(batch: Batch) -> TokenLogProbs:
    """In float64, some rows at a time."""
    rows = [field.flatten(0, 1).split(EXACT_ROWS) for field in (batch.logits.detach(), batch.tokens)]
    with torch.no_grad():
        parts = [
            token_log_probs(logits[None].double(), tokens[None], return_entropy=True, backend="reference")
            for logits, tokens in zip(*rows, strict=True)
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


def _rollout_bytes(per_token: int) -> Callable[[Case], int]:
    return lambda case: per_token * _responses(case) * RESPONSE


WORKLOADS = {
    "logits": Workload(
        "loss and gradient from logits", make_logits, _logits_truth, _logits_bytes(2), "2 N V itemsize", True
    ),
    "log-probs": Workload(
        "log-probs and entropy from logits, no gradient", make_logits, _log_probs_truth, _logits_bytes(1),
        "N V itemsize", True,
    ),
    "advantages": Workload(
        "EGPO advantages of a rollout batch", make_rollouts, _advantages_truth, _rollout_bytes(5),
        "5 N (old log-prob, mask)", False,
    ),
    "policy-loss": Workload(
        "loss and gradient from log-probs of a rollout batch", make_rollouts, _policy_loss_truth, _rollout_bytes(13),
        "13 N (log-prob, old log-prob, mask, gradient)", False,
    ),
}  # fmt: skip


def cases(workload: str, device: str, dtypes: list[str], tokens: list[int], vocabs: list[int]) -> Iterator[Case]:
    """The largest batch, then fewer tokens, then smaller vocabularies; the largest is what tables lead with."""
    known = WORKLOADS[workload]
    for dtype in dtypes if known.of_logits else ["fp32"]:
        for count in sorted(tokens, reverse=True):
            yield Case(workload, device, dtype, count, max(vocabs))
        for vocab in sorted(vocabs, reverse=True)[1:] if known.of_logits else []:
            yield Case(workload, device, dtype, max(tokens), vocab)
