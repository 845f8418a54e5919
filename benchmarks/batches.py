"""Cases, and the batches that they are measured on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels import SamplingSupport, TokenLogProbs, linear_token_log_probs, pack_support, token_log_probs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEQUENCES = 8
ROLLOUT = 128
"""Micro-batches of `--tokens` tokens in a rollout batch: what works on log-probs alone sees that many at once."""
RESPONSE = 1024
"""Tokens of a response in a rollout batch."""
GROUP = 8
"""Responses to one prompt."""
KEPT = 8
"""Tokens that a row keeps in the mean."""
LARGEST_LOGIT = 16
"""Of those that are drawn, and nearly of those that hidden states make."""


class Case(NamedTuple):
    """One batch: `tokens` rows of logits over `vocab`, given or made of states that are `hidden` wide."""

    workload: str
    device: str
    dtype: str
    tokens: int
    vocab: int
    hidden: int = 0


class Batch(NamedTuple):
    """The inputs of a case; a workload leaves out what it has no use for."""

    tokens: Tensor | None = None
    mask: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    groups: Tensor | None = None
    rewards: Tensor | None = None
    support: SamplingSupport | None = None

    @property
    def left_out(self) -> Tensor | None:
        """Tokens ``[N, V]`` outside each row's kept set."""
        if self.support is None:
            return None
        outside = torch.ones(self.tokens.numel(), len(self.weight), dtype=torch.bool, device=self.tokens.device)
        ids, offsets = self.support
        rows = torch.arange(len(outside), device=ids.device).repeat_interleave(offsets.diff())
        return outside.index_put_((rows, ids[: len(rows)]), outside.new_zeros(()))

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What is differentiated, by the name its gradient has among the outputs."""
        inputs = {"gradient": self.logits, "weight_gradient": self.weight}
        inputs["gradient"] = next((one for one in (self.logits, self.hidden, self.log_probs) if one is not None), None)
        return {name: leaf for name, leaf in inputs.items() if leaf is not None and leaf.requires_grad}


Outputs = dict[str, Tensor]


def responses(case: Case) -> int:
    return max(ROLLOUT * case.tokens // RESPONSE, 2 * GROUP)


def _seeded(case: Case) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(0)


def _drawn(case: Case, generator: torch.Generator, scale: float, *shape: int) -> Tensor:
    """Normal numbers in the case's dtype, drawn some rows at a time in float32."""
    drawn = torch.empty(shape, dtype=DTYPES[case.dtype], device=case.device)
    for rows in drawn.view(-1, shape[-1]).split(512):
        rows.copy_(scale * torch.randn(rows.shape, generator=generator, device=case.device))
    return drawn


def make_logits(case: Case) -> Batch:
    """Logits that score next tokens, so each sequence's last position is masked; old log-probs a little off."""
    generator = _seeded(case)
    logits = _drawn(case, generator, 3, SEQUENCES, case.tokens // SEQUENCES, case.vocab)
    batch = _scored(case, generator, lambda tokens: token_log_probs(logits, tokens))
    return batch._replace(logits=logits.requires_grad_())


def make_hidden(case: Case, trains: bool) -> Batch:
    """As `make_logits`, with hidden states and a head that make such logits."""
    generator = _seeded(case)
    hidden = _drawn(case, generator, 1, SEQUENCES, case.tokens // SEQUENCES, case.hidden)
    weight = _drawn(case, generator, 3 / case.hidden**0.5, case.vocab, case.hidden)
    batch = _scored(case, generator, lambda tokens: linear_token_log_probs(hidden, weight, tokens))
    return batch._replace(hidden=hidden.requires_grad_(), weight=weight.requires_grad_(trains))


def make_kept(case: Case) -> Batch:
    """As `make_hidden`, of a sampler that kept every other token alone and 14 tokens beside each of the rest."""
    batch, generator = make_hidden(case, trains=True), _seeded(case)
    others = torch.randint(case.vocab, (case.tokens, 2 * KEPT - 2), generator=generator, device=case.device)
    others[::2] = -1
    support = pack_support(torch.cat([batch.tokens.view(-1, 1), others], 1))
    head = (batch.hidden.detach(), batch.weight.detach(), batch.tokens)
    moved = batch.old_log_probs - linear_token_log_probs(*head).log_probs
    old = linear_token_log_probs(*head, support=support).log_probs + moved
    return batch._replace(support=support, old_log_probs=old)


def _scored(case: Case, generator: torch.Generator, score: Callable[[Tensor], TokenLogProbs]) -> Batch:
    shape, device = (SEQUENCES, case.tokens // SEQUENCES), case.device
    tokens = torch.randint(0, case.vocab, shape, generator=generator, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[:, -1] = False
    # Never near the edge of a clip, over which a rounded logit could carry the ratio.
    off = 0.4 * torch.randn(shape, generator=generator, device=device).trunc()
    old = score(tokens).log_probs + off
    advantages = torch.randn(SEQUENCES, generator=generator, device=device)
    return Batch(tokens, mask, old_log_probs=old, advantages=advantages)


def make_rollouts(case: Case) -> Batch:
    """A rollout batch of log-probs: responses of mixed lengths, right-padded, in groups, with binary rewards."""
    generator = _seeded(case)
    count = responses(case)
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
