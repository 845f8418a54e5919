"""Every kernel of the library launched by its own host code, on tensors that are as plain as they can be."""

from typing import NamedTuple

import torch

import egpo_kernels.triton as backend
from egpo_kernels import AdvantageConfig, PolicyLossConfig
from egpo_kernels.config.results import Rows, SamplingSupport
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.formulas.advantages import collapse_tolerance
from egpo_kernels.formulas.kept import entries_of
from egpo_kernels.formulas.rows import Counts, Material, Measured, Purpose
from egpo_kernels.inputs.layout import PER_SEQUENCE, PER_TOKEN
from egpo_kernels.inputs.segments import Segments

VOCAB = 151936
WIDTH = 4096
PADDING = 64
ADVANTAGES = Rows._fields.index("advantages")


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
    tilted = config.has_bonus
    entropy = tilted or reported
    log_probs, bonus, maximum, sum_exp = backend.row_statistics(logits, rows, scale, entropy)
    upstream = [log_probs, log_probs.clone() if tilted else None]
    backend.logits_gradient(logits, rows, [maximum, sum_exp, bonus], upstream, scale, torch.zeros_like(logits))
    backend.logits_loss_gradient(logits, rows, config, scale, scale, entropy, torch.zeros_like(logits))
    backend.rescale_(logits, torch.ones((), device=device), 2.0 * scale)


def make_support(size: Size, device: str) -> SamplingSupport:
    """As many kept tokens for each row as a sequence has rows, its own among them."""
    count = size.sequences * size.length
    ids = torch.arange(size.length, device=device).repeat(count)
    return SamplingSupport(ids, torch.arange(count + 1, device=device) * size.length)


def launch_kept(
    dtype: torch.dtype, full: bool, size: Size = SMALL, width: int = WIDTH, scale: float = 1, device: str = "cpu"
) -> None:
    """The kernels over kept tokens, as logits and an output layer of this ``dtype`` have them launched; with
    ``full`` rows the entropy is in the loss.
    """
    wide, vocab = compute_dtype(dtype), 64
    rows = make_rows(wide, full, size, device)
    support = make_support(size, device)
    entries = backend.kept_entries(*support, rows.tokens, rows.mask, vocab)
    backend.support_metrics(*support, rows.tokens, rows.mask, wide)
    logits = torch.zeros(*size, vocab, dtype=dtype, device=device)
    backend.put_kept_(logits, entries, backend.kept_logits(logits, entries))
    # By torch's own operations, since kernels may be stubbed here.
    entries = entries_of(*support, rows.tokens, rows.mask, vocab)
    hidden, weight = (torch.zeros(count, width, dtype=dtype, device=device) for count in (len(rows.mask), vocab))
    values = backend.gathered_products(hidden, weight, entries)
    log_probs, entropy, maximum, sum_exp = backend.kept_statistics(values, entries, rows, scale, full)
    upstream = [log_probs, log_probs.clone() if full else None]
    slopes = backend.kept_gradient(values, entries, rows, [maximum, sum_exp, entropy], upstream, scale)
    backend.add_gathered(slopes, weight, entries.columns(vocab), entries.by_row(), torch.zeros_like(hidden))
    # The gradient of a 16-bit head is summed in float32 where it is not all there is to add.
    of_head = torch.zeros(vocab, width, dtype=wide if full else dtype, device=device)
    backend.add_gathered(slopes, hidden, entries.row_places(), entries.by_id(vocab), of_head)


def launch_shards(
    dtype: torch.dtype, full: bool, size: Size = SMALL, vocab: int = VOCAB, scale: float = 1, device: str = "cpu"
) -> None:
    """The kernels over a rank's columns of two ranks' logits; with ``full`` rows the entropy is wanted."""
    logits = torch.zeros(*size, vocab // 2, dtype=dtype, device=device)
    rows = make_rows(compute_dtype(dtype), full, size, device)
    count = len(rows.mask)
    told = backend.shard_statistics(logits, rows, scale, full, count, rows, 7, vocab // 2)
    backend.merged_shards(torch.stack([told, told]), rows, scale, full, vocab, count)


def launch_one_pass(dtype: torch.dtype, full: bool, config: PolicyLossConfig, vocab: int = VOCAB) -> None:
    """The kernel of `logits_policy_loss` that reads the logits, with its entropy where the loss has it."""
    logits = torch.zeros(*SMALL, vocab, dtype=dtype)
    rows = make_rows(torch.float32, full, SMALL, "cpu")
    backend.logits_loss_gradient(logits, rows, config, 1.0, 1.0, config.has_bonus, torch.zeros_like(logits))


def make_segments(packed: bool, size: Size, device: str) -> Segments:
    """Sequences as long as one another, known by their number or by their offsets."""
    offsets = torch.arange(size.sequences + 1, device=device) * size.length if packed else None
    return Segments(size.sequences * size.length, size.sequences, offsets)


def launch_rows(
    dtype: torch.dtype, full: bool, config: PolicyLossConfig | None, size: Size = SMALL, device: str = "cpu"
) -> None:
    """What makes rows, of a loss or (None) of log-probs alone.

    With every optional tensor of other dtypes than kernels read, between offsets; or with few, which stay as they are.
    """
    rows, segments = make_rows(dtype, full, size, device), make_segments(full, size, device)
    mask, tokens, *numbers = rows._replace(factor=None)
    counts, poison, kinds = Counts(), None, [PER_TOKEN] * len(Rows._fields)
    if full:
        numbers = [None if values is None else values.bfloat16() for values in numbers]
        poison = torch.ones((), device=device)
        given = [mask.long(), tokens.int(), *numbers]
    else:
        given = [None, tokens, *numbers]
    given[ADVANTAGES], kinds[ADVANTAGES] = torch.ones(size.sequences, dtype=dtype, device=device), PER_SEQUENCE
    for only_active in (False, True):
        backend.token_rows(Material(given, kinds, segments, poison, counts, Purpose(config, dtype, only_active)))
        counts = Counts(7.0, torch.tensor(3, device=device))


def launch_log_probs(
    dtype: torch.dtype, full: bool, config: PolicyLossConfig, size: Size = SMALL, device: str = "cpu"
) -> None:
    """The kernels of `policy_loss`."""
    rows, segments = make_rows(dtype, full, size, device), make_segments(full, size, device)
    log_probs = torch.zeros_like(rows.factor)
    entropy = log_probs.clone() if full else None
    backend.policy_loss(log_probs, entropy, rows, segments, config, VOCAB, per_token=not full, reported=True)
    upstream = torch.ones((), dtype=dtype, device=device) if full else torch.ones_like(log_probs)
    backend.policy_loss_gradient(log_probs, rows, segments, config, upstream, want_bonus=full)


def launch_groups(
    dtype: torch.dtype, config: AdvantageConfig, full: bool, size: Size = SMALL, device: str = "cpu"
) -> None:
    """The kernels of `group_advantages`."""
    rewards = torch.ones(size.sequences, dtype=dtype, device=device)
    ids = correct = group_size = None
    measured = Measured()
    if full:
        mask = torch.ones(size.sequences * size.length, dtype=torch.bool, device=device)
        measured = Measured(mask.to(dtype), mask, None, mask, negated=True)
        ids, correct = torch.zeros(size.sequences, dtype=torch.long, device=device), rewards.bool()
        group_size = size.sequences
    segments = make_segments(full, size, device)
    known = (correct, measured, segments, collapse_tolerance(dtype), config, group_size)
    backend.group_advantages(ids, size.sequences, rewards, *known, reported=True)


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
ROW_CONFIGS = (
    PolicyLossConfig(),
    PolicyLossConfig(reduction="seq_mean_token_mean"),
    PolicyLossConfig(reduction="seq_mean_token_sum_norm", norm_length=100),
    PolicyLossConfig(reduction="sum"),
    PolicyLossConfig(ratio="sequence", reduction="seq_mean_token_sum"),
)
