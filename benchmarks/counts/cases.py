"""The calls that are counted, this library's and others'.

Each runs interpreted for its memory traffic and offline for its machine code, so that both come from the same launches.
The temperature of others is compiled in. It is 1 here, which folds their division of every logit away; ours is a
run-time value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import egpo_kernels
from benchmarks.batches import Batch
from benchmarks.counts.launches import PADDING
from benchmarks.providers import our_log_probs, our_loss
from benchmarks.rivals import liger_log_probs, liger_loss, trl_kernel
from egpo_kernels import (
    AdvantageConfig,
    PolicyLossConfig,
    SamplingSupport,
    linear_policy_loss,
    pack_support,
    policy_loss,
)

SEQUENCES, LENGTH = 2, 3
TOKENS = SEQUENCES * LENGTH
HIDDEN = 128
PACKAGES = {"liger": "liger-kernel", "trl": "trl"}
"""Of other libraries."""


@dataclass(frozen=True)
class Case:
    """One call, forward and, where it says so, backward."""

    name: str
    run: Callable[[Batch], object]
    library: str = "egpo_kernels"
    extra_positions: int = 0
    """Positions beyond the tokens, for those who expect a whole sequence's logits."""
    listed: bool = True
    """Whether the table shows it; the others are there for their budgets."""


def make_batch(case: Case, vocab: int) -> Batch:
    """Bfloat16 logits that want a gradient; the policy has not moved yet, so every row has one."""
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, LENGTH + case.extra_positions)
    logits = torch.randn(*shape, vocab, generator=generator).to(torch.bfloat16)
    tokens = torch.randint(0, vocab, shape, generator=generator)
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    given = {"old_log_probs": log_probs, "advantages": torch.tensor([1.0, -1.0])}
    return Batch(tokens, logits=logits.requires_grad_(), log_probs=log_probs, **given)


def loss(batch: Batch, config: PolicyLossConfig | None = None, metrics: str = "none", **options) -> torch.Tensor:
    """Metrics "none" leave out the entropy that is otherwise reported."""
    return our_loss(batch, config=config or PolicyLossConfig(), metrics=metrics, backend="triton", **options)


def log_probs(batch: Batch, entropy: bool) -> None:
    found = our_log_probs(batch, entropy, backend="triton")
    (found.log_probs.sum() + (found.entropy.sum() if entropy else 0)).backward()


def loss_of_log_probs(batch: Batch, config: PolicyLossConfig, dtype: torch.dtype, off_policy: bool = True) -> None:
    now, old = batch.log_probs.to(dtype).requires_grad_(), batch.log_probs if off_policy else None
    policy_loss(now, old, batch.advantages, config=config, backend="triton").loss.backward()


def kept(batch: Batch) -> SamplingSupport:
    """Each row's token and seven others."""
    near = (batch.tokens[..., None] + torch.arange(8)) % batch.logits.shape[-1]
    return pack_support(near)


def split_loss(batch: Batch) -> torch.Tensor:
    """Of a rank's columns, alone in its group: what is behind them is padding, which nobody reads."""
    vocab = batch.logits.shape[-1] - PADDING
    return loss(batch._replace(tokens=batch.tokens % vocab), vocab_size=vocab)


def linear_loss(batch: Batch) -> None:
    """Of hidden states, whose rows keep some columns of the layer that makes such logits."""
    hidden = torch.zeros(*batch.tokens.shape, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(batch.logits.shape[-1], HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    given = {"old_log_probs": batch.old_log_probs, "support": kept(batch), "backend": "triton"}
    linear_policy_loss(hidden, weight, batch.tokens, batch.advantages, **given).loss.backward()


def groups(batch: Batch, config: AdvantageConfig, dtype: torch.dtype = torch.float32) -> None:
    rewards = (batch.advantages > 0).to(dtype)
    old = batch.log_probs.to(dtype)
    egpo_kernels.group_advantages(SEQUENCES, rewards, old, config=config, backend="triton")


def ligers(batch: Batch, level: str) -> None:
    mask = torch.ones(SEQUENCES, LENGTH)
    liger_loss(batch, completion_mask=mask, inplace=True, importance_sampling_level=level).backward()


def trls(batch: Batch) -> None:
    log_probs, entropy = trl_kernel(batch)
    (log_probs.sum() + entropy.sum()).backward()


ENTROPY = PolicyLossConfig(entropy_coef=0.01)
SEQUENCE_RATIO = PolicyLossConfig(ratio="sequence")
CISPO = PolicyLossConfig(surrogate="cispo")
SAPO = PolicyLossConfig(surrogate="sapo")
GMPO = PolicyLossConfig(surrogate="gmpo")
UNWEIGHTED = AdvantageConfig(weight="none", clamp="none", all_wrong="zero")
RENORMALISED = AdvantageConfig(clamp="negative_only", renorm="before", scale="none", singleton="raw")
WHITENED = AdvantageConfig(baseline="leave_one_out", scale="batch_whiten")

OURS = (
    Case("value", torch.no_grad()(loss)),
    Case("value, entropy reported", torch.no_grad()(partial(loss, metrics="all"))),
    Case("one pass", lambda batch: loss(batch).backward()),
    Case("one pass, in place", lambda batch: loss(batch, inplace_grad=True).backward()),
    Case("one pass, entropy reported", lambda batch: loss(batch, metrics="all").backward()),
    Case("one pass, entropy in the loss", lambda batch: loss(batch, ENTROPY).backward()),
    Case("one pass, another upstream gradient", lambda batch: (3 * loss(batch)).backward()),
    Case("one pass, cispo", lambda batch: loss(batch, CISPO).backward(), listed=False),
    Case("one pass, sapo", lambda batch: loss(batch, SAPO).backward(), listed=False),
    Case("gmpo", lambda batch: loss(batch, GMPO).backward(), listed=False),
    Case("sequence ratio", lambda batch: loss(batch, SEQUENCE_RATIO).backward()),
    Case("sequence ratio, in place", lambda batch: loss(batch, SEQUENCE_RATIO, inplace_grad=True).backward()),
    Case("token_log_probs", lambda batch: log_probs(batch, entropy=False)),
    Case("token_log_probs, entropy", lambda batch: log_probs(batch, entropy=True)),
    Case("one pass, kept tokens", lambda batch: loss(batch, support=kept(batch)).backward()),
    Case("hidden states, kept tokens", linear_loss),
    Case("vocabulary split over ranks", lambda batch: split_loss(batch).backward()),
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

RIVALS = (
    Case("fused_selective_log_softmax, value", liger_log_probs, "liger", extra_positions=1),
    Case("triton_grpo_loss, in place", lambda batch: ligers(batch, "token"), "liger", extra_positions=1),
    Case(
        "triton_grpo_loss, sequence ratio, in place", lambda batch: ligers(batch, "sequence"), "liger",
        extra_positions=1,
    ),
    Case("selective_log_softmax_and_entropy, value", torch.no_grad()(trl_kernel), "trl"),
    Case("selective_log_softmax_and_entropy", trls, "trl"),
)  # fmt: skip
