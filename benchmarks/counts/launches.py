"""Every kernel of the library launched by its own host code, on tensors that are as plain as they can be."""

from typing import NamedTuple

import torch

import egpo_kernels.triton as backend
from egpo_kernels import AdvantageConfig, PolicyLossConfig
from egpo_kernels.config.settings import Rows
from egpo_kernels.formulas.advantages import collapse_tolerance

VOCAB = 151936


class Size(NamedTuple):
    """How many sequences of which length."""

    sequences: int = 2
    length: int = 2


SMALL = Size()


def make_rows(dtype: torch.dtype, full: bool, size: Size, device: str) -> Rows:
    """Rows with every optional tensor, or with none."""
    count = size.sequences * size.length

    def vector() -> torch.Tensor:
        return torch.ones(count, dtype=dtype, device=device)

    optional = vector() if full else None
    mask = torch.ones(count, dtype=torch.bool, device=device)
    tokens = torch.zeros(count, dtype=torch.long, device=device)
    return Rows(mask, tokens, optional, vector(), vector(), optional, optional, optional)


def launch_logits(
    dtype: torch.dtype,
    full: bool,
    config: PolicyLossConfig,
    size: Size = SMALL,
    vocab: int = VOCAB,
    scale: float = 1,
    device: str = "cpu",
    reported: bool = False,
) -> None:
    """The kernels over logits, as `logits_policy_loss` and `token_log_probs` launch them.

    The entropy is made where it is in the loss, or ``reported``.
    """
    logits = torch.zeros(*size, vocab, dtype=dtype, device=device)
    rows = make_rows(torch.float64 if dtype == torch.float64 else torch.float32, full, size, device)
    tilted = config.entropy_coef != 0
    entropy = tilted or reported
    log_probs, bonus, maximum, sum_exp = backend.row_statistics(logits, rows, scale, entropy)
    upstream = [log_probs, log_probs.clone() if tilted else None]
    backend.logits_gradient(logits, rows, [maximum, sum_exp, bonus], upstream, scale, torch.zeros_like(logits))
    backend.logits_loss_gradient(logits, rows, config, scale, scale, entropy, torch.zeros_like(logits))
    backend.rescale_(logits, torch.ones((), device=device), 2.0 * scale)


def launch_one_pass(dtype: torch.dtype, full: bool, config: PolicyLossConfig, vocab: int = VOCAB) -> None:
    """The kernel of `logits_policy_loss` that reads the logits, with its entropy where the loss has it."""
    logits = torch.zeros(*SMALL, vocab, dtype=dtype)
    rows = make_rows(torch.float32, full, SMALL, "cpu")
    backend.logits_loss_gradient(logits, rows, config, 1.0, 1.0, config.entropy_coef != 0, torch.zeros_like(logits))


def launch_log_probs(
    dtype: torch.dtype, full: bool, config: PolicyLossConfig, size: Size = SMALL, device: str = "cpu"
) -> None:
    """The kernels of `policy_loss`."""
    rows = make_rows(dtype, full, size, device)
    log_probs = torch.zeros_like(rows.factor)
    index = torch.arange(size.sequences, device=device).repeat_interleave(size.length)
    segments = [torch.arange(size.sequences + 1, device=device) * size.length, index]
    entropy = log_probs.clone() if full else None
    backend.policy_loss(log_probs, entropy, rows, segments, config, VOCAB)
    backend.policy_loss_gradient(log_probs, entropy, rows, segments, config)


def launch_groups(
    dtype: torch.dtype, config: AdvantageConfig, full: bool, size: Size = SMALL, device: str = "cpu"
) -> None:
    """The kernels of `group_advantages`."""
    count = size.sequences * size.length
    ids = torch.zeros(size.sequences, dtype=torch.long, device=device)
    rewards = torch.ones(size.sequences, dtype=dtype, device=device)
    values = torch.zeros(count, dtype=dtype, device=device) if full else None
    mask = torch.ones(count, dtype=torch.bool, device=device) if full else None
    correct = torch.ones(size.sequences, dtype=torch.bool, device=device) if full else None
    lengths = torch.full_like(ids, size.length) if config.scale == "batch_whiten" else None
    offsets = torch.arange(size.sequences + 1, device=device) * size.length
    known = (correct, values, mask, lengths, offsets, collapse_tolerance(dtype))
    backend.group_advantages(ids, rewards, *known, config, size.sequences if full else None)


GROUP_CONFIGS = (
    AdvantageConfig(),
    AdvantageConfig(weight="none", clamp="none", all_wrong="zero"),
    AdvantageConfig(clamp="symmetric", renorm="after", all_wrong="negative_no_correct", lock_all_wrong=True),
    AdvantageConfig(clamp="negative_only", renorm="before", scale="none", singleton="raw"),
    AdvantageConfig(baseline="leave_one_out", scale="batch_whiten", clamp="positive_only"),
    AdvantageConfig(baseline="correctness", scale="none", weight="none", clamp="none"),
    AdvantageConfig(scale="group_mean", statistic="shannon", clamp="none"),
    AdvantageConfig(baseline="none", scale="batch_std", weight="none", clamp="none"),
)
LOSS_CONFIGS = (
    PolicyLossConfig(),
    PolicyLossConfig(ratio="sequence"),
    PolicyLossConfig(ratio="sequence_token"),
    PolicyLossConfig(surrogate="cispo"),
    PolicyLossConfig(surrogate="sapo"),
    PolicyLossConfig(surrogate="gmpo"),
)
