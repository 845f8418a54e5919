"""Logits as what a loss is computed from."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from egpo_kernels import reference
from egpo_kernels.config.fields import check_bool, check_positive
from egpo_kernels.config.results import LossOutput, Rows, TokenLogProbs
from egpo_kernels.config.settings import PolicyLossConfig, compute_dtype
from egpo_kernels.engine import autograd, calls, losses, ops
from egpo_kernels.engine.kept import check
from egpo_kernels.engine.kinds import kind_of_call, remember
from egpo_kernels.engine.rows import REF_LOG_PROBS, Given, Unmade, operands
from egpo_kernels.engine.support import read_support, with_support
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.rows import NO_COUNTS
from egpo_kernels.inputs import layout as layouts
from egpo_kernels.inputs.validation import check_logits, check_not_overlapping
from egpo_kernels.inputs.values import check_rows
from egpo_kernels.parallel import reading
from egpo_kernels.parallel.shard import Shard
from egpo_kernels.parallel.whole import agreed, whole_rows


class Logits(NamedTuple):
    """Logits ``[B, T, V]``, undivided by the temperature, whether their gradient goes where they lie, and, where these
    are some columns of the vocabulary, which.
    """

    tensor: Tensor
    inplace: bool
    shard: Shard | None
    statuses: list[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.tensor.dtype

    @property
    def vocab(self) -> int:
        """Vocabulary size."""
        return self.tensor.shape[-1] if self.shard is None else self.shard.vocab

    @property
    def late(self) -> bool:
        """With other ranks there are statistics first, and the gradient costs in backward what it costs before."""
        return self.shard is not None

    @property
    def requires_grad(self) -> bool:
        """Whether they are differentiated."""
        return self.tensor.requires_grad

    def log_probs(
        self, call: calls.Call, rows: Rows, want_entropy: bool, entropy_gradient: bool = False
    ) -> TokenLogProbs:
        """See `egpo_kernels.engine.calls.Source`; a gradient through the entropy costs nothing more here."""
        if call.backend == "reference":
            log_probs, entropy = reference_scores(self.tensor, call, rows, self.shard, self.statuses)
            return TokenLogProbs(log_probs, entropy if want_entropy else None)
        fields = [*rows, *call.support]
        options = (call.temperature, want_entropy, self.inplace, call.backend)
        if self.shard is None:
            return _scores(ops.token_scores, self.tensor, fields, *options)
        log_probs, entropy, status = autograd.TokenLogProbs.apply(self.tensor, *options, self.shard.text, *fields)
        self.statuses.append(status)
        return TokenLogProbs(log_probs, entropy if want_entropy else None)

    def loss(
        self,
        call: calls.Call,
        unmade: Unmade,
        config: PolicyLossConfig,
        scale: float,
        want_entropy: bool,
        reported: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `egpo_kernels.engine.calls.Source`."""
        options = (self.inplace, want_entropy, reported, call.backend)
        left_out = losses.LEFT_OUT[unmade.given.tensors[REF_LOG_PROBS] is not None, want_entropy, config.has_bonus]
        remember(LOSSES, call.kind, LossWay(unmade.given.kinds, config.json, unmade.only_active, options, left_out))
        tensors, how = unmade.operands()
        tensors = [*tensors, *call.support]
        # A list is one argument, which costs the host less; a compiler must see what is in it.
        given = tensors if is_compiling() else [tensors]
        return autograd.LogitsPolicyLoss.apply(self.tensor, how, [call.temperature, scale], options, *given)


def reference_scores(
    logits: Tensor, call: calls.Call, rows: Rows, shard: Shard | None, statuses: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy ``[N]`` as `reference` makes them; of some columns by way of all of them."""
    poison = None
    if shard is not None:
        status = agreed(rows, call.temperature, shard, logits)
        statuses.append(status)
        logits, poison = whole_rows(logits, shard), status[1]
    vocab = logits.shape[-1]
    check_rows(rows, vocab)
    found = reference.token_log_probs(reference_logits(logits, rows, call.support), rows, call.temperature)
    return found if poison is None else (found[0] * poison, found[1] * poison)


def reference_logits(logits: Tensor, rows: Rows, support: tuple[Tensor, ...]) -> Tensor:
    """Logits ``[B, T, V]`` as `reference` takes them, -inf where a sampler kept others."""
    if not support:
        return logits
    ids, offsets = support
    check(rows, (ids, offsets), logits.shape[-1])
    return reference.kept_logits(logits, rows, ids, offsets)


def _scores(
    operator: Callable[..., list[Tensor]],
    logits: Tensor,
    rows: list[Tensor | None],
    temperature: float,
    want_entropy: bool,
    inplace: bool,
    backend: str,
) -> TokenLogProbs:
    """Log-probs ``[N]`` and, if wanted, entropy; ``operator`` gives them where nobody asks for a gradient."""
    if autograd.looks_at(logits):
        found = autograd.TokenLogProbs.apply(logits, temperature, want_entropy, inplace, backend, "", *rows)
    else:
        found = operator(logits, rows, temperature, want_entropy, backend)
    return TokenLogProbs(found[0], found[1] if want_entropy else None)


def _padded(logits: Tensor) -> layouts.Layout:
    return layouts.make_layout("logits", logits.shape[:2], None, logits.device)


class LossWay(NamedTuple):
    """How a kind of call gets its loss in one pass: how many numbers each tensor holds, the settings' JSON, whether
    only active rows are looked at, the options of `egpo_kernels.engine.autograd.LogitsPolicyLoss`, and which metrics
    are left out.
    """

    kinds: list[int]
    config: str
    only_active: bool
    options: tuple[bool, bool, bool, str]
    left_out: tuple[str, ...]

    def loss(
        self, logits: Tensor, given: Sequence[Tensor | None], temperature: Any, options: calls.Options
    ) -> LossOutput:
        """Loss and metrics; ``given`` is in the order of `egpo_kernels.config.results.Rows`."""
        heat = check_positive("temperature", temperature)
        inplace, _, reported, _ = self.options
        if inplace:
            check_not_overlapping(logits)
        counts = NO_COUNTS
        if options.num_tokens is not None or options.num_sequences is not None:
            fields = Given(list(given), self.kinds)
            counts = losses.read_counts(options, fields, _padded(logits), compute_dtype(logits.dtype))
        scalars = [heat, check_positive("grad_scale", options.grad_scale)]
        num_sequences, length, _ = logits.shape
        size = (num_sequences * length, num_sequences)
        tensors, how = operands(given, self.kinds, size, counts, self.config, self.only_active)
        loss, vector = autograd.LogitsPolicyLoss.apply(logits, how, scalars, self.options, tensors)
        return LossOutput(loss, metrics.named(vector, metrics.TOKEN, self.left_out) if reported else {})


class ScoresWay(NamedTuple):
    """How a kind of call gets log-probs alone: how many numbers each tensor holds, whether all of them are rows as they
    are, whether the entropy is wanted, whether the gradient goes over the logits, the backend.
    """

    kinds: list[int]
    are_rows: bool
    want_entropy: bool
    inplace: bool
    backend: str

    def log_probs(self, logits: Tensor, mask: Tensor | None, tokens: Tensor, temperature: Any) -> TokenLogProbs:
        """Log-probs and entropy ``[S, T]``."""
        temperature = check_positive("temperature", temperature)
        if self.inplace:
            check_not_overlapping(logits)
        rows = [mask, tokens, None, None, None, None, None, None]
        if not self.are_rows:
            unmade = Unmade(Given(rows, self.kinds), _padded(logits), compute_dtype(logits.dtype))
            rows = list(unmade.made(self.backend))
        return losses.shaped(_scores(ops.token_scores.of_plain, logits, rows, temperature, *self[2:]), logits.shape[:2])


LOSSES: dict[Hashable, LossWay] = {}
SCORES: dict[Hashable, ScoresWay] = {}


def kind_of_loss(
    logits: Any,
    given: Sequence[Any],
    cu_seqlens: Any,
    temperature: Any,
    config: Any,
    options: calls.Options,
    inplace_grad: Any,
    backend: Any,
) -> Hashable | None:
    """The kind of a call whose loss may go in one pass; ``given`` as for `LossWay.loss`."""
    wanted = isinstance(logits, Tensor) and logits.requires_grad and torch.is_grad_enabled()
    if not wanted or cu_seqlens is not None or type(config) is not PolicyLossConfig or config.late:
        return None
    chosen = (config.json, inplace_grad, options.metrics, options.grad_scale == 1.0)
    return kind_of_call(logits, given, temperature, backend, *chosen)


def log_probs_of(call: calls.Call, return_entropy: bool) -> TokenLogProbs:
    """`egpo_kernels.engine.losses.shaped_log_probs`, whose way is remembered."""
    assert isinstance(call.source, Logits)
    if call.backend != "reference":
        options = (return_entropy, call.source.inplace, call.backend)
        remember(SCORES, call.kind, ScoresWay(call.given.kinds, not any(call.unmade().fresh()), *options))
    return losses.shaped_log_probs(call, return_entropy)


def read_logits(
    logits: Any,
    tokens: Any,
    mask: Any,
    cu_seqlens: Any,
    temperature: Any,
    support: Any,
    inplace_grad: Any,
    backend: str,
    one_sequence: bool = False,
    kind: Hashable | None = None,
    columns: reading.Given = reading.NOTHING,
) -> calls.Call:
    """Check logits, tokens, mask and temperature; the call's ``kind`` is only handed on."""
    packed, shard = cu_seqlens is not None or one_sequence, None
    if isinstance(logits, Tensor) and logits.dim():
        logits, shard = reading.read_shard("logits", logits, -1, columns)
    logits = check_logits("logits", logits, packed, may_be_empty=shard is not None)
    shape = tuple(logits.shape[:-1])
    if one_sequence:
        layout = layouts.one_sequence(shape, logits.device)
    else:
        layout = layouts.make_layout("logits", shape, cu_seqlens, logits.device)
    inplace = check_bool("inplace_grad", inplace_grad)
    source = Logits(logits.unsqueeze(0) if packed else logits, inplace, shard, [])
    call = calls.read_tokens(source, layout, tokens, mask, temperature, backend, kind)
    if source.inplace:
        if call.backend == "reference":
            raise ValueError("inplace_grad is True with backend 'reference'; it must be False there")
        check_not_overlapping(source.tensor)
    return call if support is None else with_support(call, read_support(support, layout))
