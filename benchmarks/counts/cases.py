"""The calls that are counted: this library's here, others' in `rivals`.

Each runs interpreted for its memory traffic and offline for its machine code, so that both come from the same launches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import egpo_kernels
from egpo_kernels import AdvantageConfig, PolicyLossConfig, policy_loss

SEQUENCES, LENGTH = 2, 3
TOKENS = SEQUENCES * LENGTH


class Batch(NamedTuple):
    """What a call may need; the policy has not moved yet, so every row has a gradient."""

    logits: Tensor
    tokens: Tensor
    advantages: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Case:
    """One call, forward and, where it says so, backward."""

    name: str
    run: Callable[[Batch], None]
    library: str = "egpo_kernels"
    extra_positions: int = 0
    """Positions of the logits beyond the tokens, for those who expect a whole sequence's logits."""
    listed: bool = True
    """Whether the table shows it; the others are there for their budgets."""


def make_batch(case: Case, vocab: int) -> Batch:
    """Bfloat16 logits that want a gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SEQUENCES, LENGTH + case.extra_positions, vocab, generator=generator).to(torch.bfloat16)
    tokens = torch.randint(0, vocab, (SEQUENCES, LENGTH), generator=generator)
    log_probs = logits[:, :LENGTH].float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return Batch(logits.requires_grad_(), tokens, torch.tensor([1.0, -1.0]), log_probs)


def logits_loss(
    batch: Batch, config: PolicyLossConfig | None = None, metrics: str = "none", inplace: bool = False
) -> Tensor:
    """`logits_policy_loss`; metrics "none" leaves out the entropy that is otherwise reported."""
    return egpo_kernels.logits_policy_loss(
        batch.logits, batch.tokens, batch.advantages, old_log_probs=batch.log_probs,
        config=config or PolicyLossConfig(), metrics=metrics, inplace_grad=inplace, backend="triton",
    ).loss  # fmt: skip


def value(batch: Batch, metrics: str) -> None:
    with torch.no_grad():
        logits_loss(batch, metrics=metrics)


def log_probs(batch: Batch, entropy: bool) -> None:
    found = egpo_kernels.token_log_probs(batch.logits, batch.tokens, return_entropy=entropy, backend="triton")
    (found.log_probs.sum() + (found.entropy.sum() if entropy else 0)).backward()


def loss_of_log_probs(batch: Batch, config: PolicyLossConfig, dtype: torch.dtype, off_policy: bool = True) -> None:
    now, old = batch.log_probs.to(dtype).requires_grad_(), batch.log_probs if off_policy else None
    policy_loss(now, old, batch.advantages, config=config, backend="triton").loss.backward()


def groups(batch: Batch, config: AdvantageConfig, dtype: torch.dtype = torch.float32) -> None:
    rewards = (batch.advantages > 0).to(dtype)
    old = batch.log_probs.to(dtype)
    egpo_kernels.group_advantages(SEQUENCES, rewards, old, config=config, backend="triton")


ENTROPY = PolicyLossConfig(entropy_coef=0.01)
SEQUENCE_RATIO = PolicyLossConfig(ratio="sequence")
CISPO = PolicyLossConfig(surrogate="cispo")
SAPO = PolicyLossConfig(surrogate="sapo")
GMPO = PolicyLossConfig(surrogate="gmpo")
UNWEIGHTED = AdvantageConfig(weight="none", clamp="none", all_wrong="zero")
RENORMALISED = AdvantageConfig(clamp="negative_only", renorm="before", scale="none", singleton="raw")
WHITENED = AdvantageConfig(baseline="leave_one_out", scale="batch_whiten")

OURS = (
    Case("value", lambda batch: value(batch, "none")),
    Case("value, entropy reported", lambda batch: value(batch, "all")),
    Case("one pass", lambda batch: logits_loss(batch).backward()),
    Case("one pass, in place", lambda batch: logits_loss(batch, inplace=True).backward()),
    Case("one pass, entropy reported", lambda batch: logits_loss(batch, metrics="all").backward()),
    Case("one pass, entropy in the loss", lambda batch: logits_loss(batch, ENTROPY).backward()),
    Case("one pass, another upstream gradient", lambda batch: (3 * logits_loss(batch)).backward()),
    Case("one pass, cispo", lambda batch: logits_loss(batch, CISPO).backward(), listed=False),
    Case("one pass, sapo", lambda batch: logits_loss(batch, SAPO).backward(), listed=False),
    Case("gmpo", lambda batch: logits_loss(batch, GMPO).backward(), listed=False),
    Case("sequence ratio", lambda batch: logits_loss(batch, SEQUENCE_RATIO).backward()),
    Case("sequence ratio, in place", lambda batch: logits_loss(batch, SEQUENCE_RATIO, inplace=True).backward()),
    Case("token_log_probs", lambda batch: log_probs(batch, entropy=False)),
    Case("token_log_probs, entropy", lambda batch: log_probs(batch, entropy=True)),
    Case("policy_loss", lambda batch: loss_of_log_probs(batch, PolicyLossConfig(), torch.float32)),
    Case("group_advantages", lambda batch: groups(batch, AdvantageConfig())),
    # What ptxas finds hardest of the kernels over tokens and sequences.
    Case("policy_loss, float64", lambda batch: loss_of_log_probs(batch, SEQUENCE_RATIO, torch.float64), listed=False),
    Case(
        "policy_loss, float64, on-policy",
        lambda batch: loss_of_log_probs(batch, SEQUENCE_RATIO, torch.float64, off_policy=False), listed=False,
    ),
    Case("group_advantages, float64", lambda batch: groups(batch, AdvantageConfig(), torch.float64), listed=False),
    Case("group_advantages, unweighted", lambda batch: groups(batch, UNWEIGHTED, torch.float64), listed=False),
    Case("group_advantages, renormalised", lambda batch: groups(batch, RENORMALISED), listed=False),
    Case("group_advantages, whitened", lambda batch: groups(batch, WHITENED), listed=False),
)  # fmt: skip
