"""Token level behind the public functions: from checked inputs to a loss, along the cheapest path that is right."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from egpo_kernels import reference
from egpo_kernels.config.fields import check_positive
from egpo_kernels.config.results import LossOutput, Metrics, Rows, TokenLogProbs
from egpo_kernels.config.settings import PolicyLossConfig, Recipe, compute_dtype
from egpo_kernels.engine import autograd, rows
from egpo_kernels.engine.calls import Call, Constants, Grouping, Options
from egpo_kernels.engine.dispatch import choose_backend
from egpo_kernels.engine.groups import PerToken, advantages_of_groups
from egpo_kernels.engine.rows import Given, Unmade
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.lazy import merged
from egpo_kernels.formulas.rows import NO_COUNTS, Counts
from egpo_kernels.inputs import layout as layouts
from egpo_kernels.inputs.layout import PER_SEQUENCE, Layout, group_ids
from egpo_kernels.inputs.segments import flat
from egpo_kernels.inputs.validation import check_choice, check_count, check_dense, check_tensor

PER_TOKEN_OR_SEQUENCE = (("advantages", rows.ADVANTAGES), ("rollout_weights", rows.ROLLOUT_WEIGHTS))

MARKS = 1 << 20
"""Groups that an exchange tells apart."""
# Metrics by whether there is a KL, an entropy, and an entropy in the loss.
LEFT_OUT = {
    (with_kl, has_entropy, with_bonus): (() if with_kl else ("policy/ref_kl", "policy/loss/kl"))
    + (() if has_entropy else ("policy/entropy",))
    + (() if with_bonus else ("policy/loss/entropy",))
    for with_kl, has_entropy, with_bonus in itertools.product((False, True), repeat=3)
}


def read_log_probs(
    log_probs: Any, entropy: Any, mask: Any, cu_seqlens: Any, config: PolicyLossConfig, backend: str
) -> tuple[Call, TokenLogProbs]:
    """Check log-probs and entropy in place of logits, and leave their shape."""
    check_dense("log_probs", log_probs, "floating")
    if entropy is None and config.has_bonus:
        raise ValueError(f"entropy is None with entropy_coef = {config.entropy_coef}; it must be given per token")
    layout = layouts.make_layout("log_probs", tuple(log_probs.shape), cu_seqlens, log_probs.device)
    dtype = compute_dtype(log_probs.dtype)
    values = layout.shaped("log_probs", log_probs, "floating").to(dtype)
    entropies = None if entropy is None else layout.shaped("entropy", entropy, "floating").to(dtype)
    given = Given.nothing()
    if mask is not None:
        given.put(rows.MASK, layout.shaped("mask", mask, "real"))
    call = Call(None, given, layout, 1.0, dtype, choose_backend(backend, log_probs.device))
    return call, TokenLogProbs(values, entropies)


def wants_entropy(config: PolicyLossConfig, mode: str) -> bool:
    """Whether the entropy is in the loss, or cheap enough to report while the row is read."""
    return config.has_bonus or mode != "none"


def loss_rows(call: Call, given: Constants, config: PolicyLossConfig, options: Options) -> Unmade:
    """Check what the loss needs beside log-probs, and which rows are looked at."""
    layout, poison = call.layout, call.layout.poison
    if config.reduction == "seq_mean_token_sum_norm" and config.norm_length is None:
        raise ValueError(
            f"PolicyLossConfig.norm_length is None with reduction {config.reduction!r}; it must be given, a length in "
            "tokens: recipe.replace(norm_length=...)"
        )
    if config.kl_coef > 0 and given.ref_log_probs is None:
        raise ValueError(f"ref_log_probs is None with kl_coef = {config.kl_coef}; it must be given per token")

    fields = call.given.copy()
    if given.old_log_probs is not None:
        fields.put(rows.OLD_LOG_PROBS, layout.shaped("old_log_probs", given.old_log_probs, "floating"))
    if given.ref_log_probs is not None:
        fields.put(rows.REF_LOG_PROBS, layout.shaped("ref_log_probs", given.ref_log_probs, "floating"))
    for name, place in PER_TOKEN_OR_SEQUENCE:
        value = getattr(given, name)
        if value is not None or place == rows.ADVANTAGES:
            values, kind, sound = layout.field(name, value, "real", lambda: call.given.counted(layout))
            fields.put(place, values, kind)
            if sound is not None:
                poison = sound if poison is None else poison * sound
    counts = read_counts(options, call.given, layout, call.dtype)
    active = check_choice("metrics", options.metrics, ("all", "active", "none")) != "all"
    return Unmade(fields, layout, call.dtype, config, counts, poison, active)


def read_counts(options: Options, given: Given, layout: Layout, dtype: torch.dtype) -> Counts:
    """Check global counts; a traced call has them in tensors, since operators' numbers are constants there."""
    if options.num_tokens is None and options.num_sequences is None:
        return NO_COUNTS

    def count(name: str, value: Any) -> Tensor | float | None:
        found = check_count(name, value, layout.device, lambda: given.counted(layout))
        if isinstance(found, Tensor):
            return found.detach() if found.requires_grad else found
        if not is_compiling() or found is None:
            return found
        # Not full, which would take a number as it is now for good.
        return found * torch.ones((), dtype=dtype, device=layout.device)

    return Counts(count("num_tokens", options.num_tokens), count("num_sequences", options.num_sequences))


def shaped_log_probs(call: Call, return_entropy: bool) -> TokenLogProbs:
    """Log-probs and entropy in the caller's shape."""
    assert call.source is not None
    made = call.unmade().made(call.backend)
    log_probs, entropy = call.source.log_probs(call, made, return_entropy, False)
    if call.support:
        log_probs = call.layout.poisoned(log_probs)
    return shaped(TokenLogProbs(log_probs, entropy), call.layout.shape)


def shaped(found: TokenLogProbs, shape: Sequence[int]) -> TokenLogProbs:
    """Those of rows ``[N]`` in another shape."""
    log_probs, entropy = found
    return TokenLogProbs(log_probs.view(shape), None if entropy is None else entropy.view(shape))


def loss_of_groups(call: Call, given: Constants, grouping: Grouping, recipe: Recipe, options: Options) -> LossOutput:
    """Advantages of whole groups, then the loss; both from the same log-probs where the advantages need them."""
    assert call.source is not None
    layout, config = call.layout, recipe.advantage
    rewards = check_tensor("rewards", grouping.rewards, "real", {"[S]": (layout.num_sequences,)}, layout.device)
    old, entropy, found = given.old_log_probs, None, None
    if config.weight != "none" and (old is None or config.statistic == "shannon"):
        want_entropy = config.statistic == "shannon" or wants_entropy(recipe.loss, options.metrics)
        unmade = (
            call.unmade() if call.source.shard is None else _told(call, given, rewards, grouping, recipe.loss, options)
        )
        found = call.source.log_probs(call, unmade.made(call.backend), want_entropy, recipe.loss.has_bonus)
        old = found.log_probs.detach().view(layout.shape) if old is None else old
        entropy = None if found.entropy is None else found.entropy.detach().view(layout.shape)
    grouped = advantages_of_groups(
        grouping.groups,
        rewards,
        PerToken(old, entropy, grouping.entropy_mask, *call.given.tensors[: rows.TOKENS + 1]),
        grouping.correct,
        layout,
        config,
        grouping.group_size,
        options.metrics != "none",
        call.backend,
    )
    given = given._replace(advantages=grouped.advantages[:, None])
    loss, seen = loss_of_tokens(call, given, recipe.loss, options, found)
    return LossOutput(loss, merged(grouped.metrics, seen))


def _told(
    call: Call, given: Constants, rewards: Tensor, grouping: Grouping, config: PolicyLossConfig, options: Options
) -> Unmade:
    """What rows for log-probs are made of, with all that other ranks must have alike: their exchange is the only one.

    In the place of advantages, which come of it, are rewards, and groups in a place that is free.
    """
    layout = call.layout
    unmade = loss_rows(call, given._replace(advantages=rewards[:, None]), config, options)
    unmade = unmade._replace(config=None, only_active=False, given=unmade.given.copy())
    ids = None  # names are told as options are
    if isinstance(grouping.groups, Tensor):
        ids, _ = group_ids(grouping.groups, layout.num_sequences, layout.device, grouping.group_size)
    free = [place for place in rows.FREE if unmade.given.tensors[place] is None]
    if free and (ids is not None or grouping.correct is not None):
        marks = torch.zeros(layout.num_sequences, device=layout.device, dtype=call.dtype)
        if ids is not None:
            marks = marks + ids % MARKS  # whole numbers that a float32 holds
        if grouping.correct is not None:
            correct = check_tensor("correct", grouping.correct, "bool", {"[S]": rewards.shape}, layout.device)
            marks = marks + MARKS * correct
        unmade.given.put(free[0], marks, PER_SEQUENCE)
    return unmade


def loss_of_tokens(
    call: Call, given: Constants, config: PolicyLossConfig, options: Options, found: TokenLogProbs | None = None
) -> LossOutput:
    """Loss in one pass where the gradient's coefficient is known, else by way of log-probs.

    ``found`` are log-probs of the same source that were already needed for something else.
    """
    assert call.source is not None
    unmade = loss_rows(call, given, config, options)
    scale = check_positive("grad_scale", options.grad_scale)
    # fp16 cannot hold an unscaled gradient: without a scale it waits for the upstream one.
    unscaled = call.source.dtype == torch.float16 and scale == 1.0
    late = config.late or unscaled or call.source.late or call.backend == "reference"
    entropy = wants_entropy(config, options.metrics)
    if found is not None or late or not (torch.is_grad_enabled() and call.source.requires_grad):
        made = unmade.made(call.backend)
        if found is None:
            found = call.source.log_probs(call, made, entropy, config.has_bonus)
        return loss_from_log_probs(call, made, config, options, found)
    loss, vector = call.source.loss(call, unmade, config, scale, entropy, options.metrics != "none")
    return LossOutput(loss, _named(vector, given.ref_log_probs is not None, config, options, entropy))


def loss_from_log_probs(
    call: Call, made: Rows | Unmade, config: PolicyLossConfig, options: Options, found: TokenLogProbs
) -> LossOutput:
    """Loss of log-probs, ``[N]`` or as they lie, the middle step between statistics and gradient of the logits.

    Rows that are not made are for `portable` to make as it needs them, with a loss that is one number.
    """
    reported = options.metrics != "none"
    if found.entropy is not None and not config.has_bonus:
        # A gradient of zeros would have the source differentiate an entropy that is only reported.
        found = found._replace(entropy=found.entropy.detach())
    if isinstance(made, Unmade):
        wanted = tuple(torch.is_grad_enabled() and it is not None and it.requires_grad for it in found)
        both = (any(wanted), wanted[1])
        tensors, how = made.operands()
        loss, vector = autograd.GivenPolicyLoss.apply(*found, how, both, reported, tensors)
    else:
        loss, vector = _loss_of_rows(call, flat(found.log_probs), flat(found.entropy), made, config, reported)
    loss = loss.view(call.layout.shape) if config.reduction == "none" else loss
    fields = made.given.tensors if isinstance(made, Unmade) else made
    with_kl = fields[rows.REF_LOG_PROBS] is not None
    return LossOutput(loss, _named(vector, with_kl, config, options, found.entropy is not None))


def _loss_of_rows(
    call: Call, log_probs: Tensor, entropy: Tensor | None, made: Rows, config: PolicyLossConfig, reported: bool
) -> tuple[Tensor, Tensor]:
    """Loss of log-probs ``[N]``, 0-d or per token, and the metrics vector."""
    layout, per_token = call.layout, config.reduction == "none"
    if call.backend == "reference":
        segments = layout.segments
        return reference.policy_loss(log_probs, entropy, made, segments, config, call.vocab, per_token, reported)
    whole = (config.json, call.vocab, per_token, reported, call.backend)
    return autograd.PolicyLoss.apply(log_probs, entropy, layout.known_offsets, layout.num_sequences, *whole, *made)


def _named(vector: Tensor, with_kl: bool, config: PolicyLossConfig, options: Options, has_entropy: bool) -> Metrics:
    if options.metrics == "none":
        return {}
    return metrics.named(vector, metrics.TOKEN, LEFT_OUT[with_kl, has_entropy, config.has_bonus])
