"""Results, and the row tensors every backend is handed."""

from typing import NamedTuple

from torch import Tensor

Metrics = dict[str, Tensor]


class LossOutput(NamedTuple):
    """``loss``, 0-d (or per token), and ``metrics``, a dict of detached 0-d tensors."""

    loss: Tensor
    metrics: Metrics


class GroupAdvantages(NamedTuple):
    """Per-sequence results of `group_advantages`, each ``[S]`` and without gradient.

    ``advantages = weights * base``; ``uncertainty`` is H in nats per token, NaN where it is not known.
    """

    advantages: Tensor
    weights: Tensor
    base: Tensor
    uncertainty: Tensor
    metrics: Metrics


class TokenLogProbs(NamedTuple):
    """Log-probs of the tokens and, if asked for, the entropy of each position, both in nats."""

    log_probs: Tensor
    entropy: Tensor | None


class ResponseSpans(NamedTuple):
    """``thinking`` and ``answer``: bool per token; ``untagged``: the number of responses without a closing tag."""

    thinking: Tensor
    answer: Tensor
    untagged: Tensor


class Rows(NamedTuple):
    """What the backends are handed per token, ``[N]``; None where the caller gave nothing.

    ``mask`` says which rows are looked at; every other field may hold anything where it is False. What is there as the
    caller gave it may lie ``[S, T]``, until somebody asks for `flat_rows`: a view costs a call as much as a check.
    """

    mask: Tensor
    tokens: Tensor | None = None
    temperature: Tensor | None = None
    advantages: Tensor | None = None
    factor: Tensor | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    rollout_weights: Tensor | None = None


class SamplingSupport(NamedTuple):
    """The tokens that a sampler kept (top-k, top-p, min-p) for each row: ``ids[offsets[r] : offsets[r + 1]]`` of row r.

    Rows are a batch's positions in order: ``s * T + t`` of padded ``[S, T]``, or the packed ones. An empty row has no
    record: it keeps the whole vocabulary. Sets hold the sampled token; where one does not, the functions that take a
    support add it. Both tensors are integer, on the device of what they go with, or on the CPU.
    """

    ids: Tensor
    offsets: Tensor
