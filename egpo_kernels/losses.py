"""Token level behind the public functions: from checked inputs to a loss, along the cheapest path that is right."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels import autograd, metrics, reference
from egpo_kernels import layout as layouts
from egpo_kernels.dispatch import choose_backend
from egpo_kernels.fields import check_number
from egpo_kernels.layout import Layout
from egpo_kernels.reduction import counts_per_sequence, per_row, reduction_factor
from egpo_kernels.types import LossOutput, PolicyLossConfig, Rows, TokenLogProbs, compute_dtype
from egpo_kernels.validation import (
    check_bool,
    check_choice,
    check_count,
    check_dense,
    check_logits,
    check_not_overlapping,
    check_temperatures,
    check_tokens,
)


class Call(NamedTuple):
    """Checked inputs: ``logits [B, T, V]`` (None where log-probs were given), mask, tokens and temperatures ``[N]``."""

    logits: Tensor | None
    rows: Rows
    layout: Layout
    temperature: float
    dtype: torch.dtype
    backend: str

    @property
    def vocab(self) -> int:
        """Vocabulary size, 0 where there are no logits."""
        return 0 if self.logits is None else self.logits.shape[-1]


class Constants(NamedTuple):
    """What the loss needs beside the model's output, as the caller gave it; no gradient flows into any of it."""

    advantages: Any
    old_log_probs: Any = None
    ref_log_probs: Any = None
    rollout_weights: Any = None


class Options(NamedTuple):
    """How the loss is normalised, scaled and reported."""

    num_tokens: Any = None
    num_sequences: Any = None
    grad_scale: Any = 1.0
    inplace_grad: Any = False
    metrics: Any = "all"


def read_logits(
    logits: Any,
    tokens: Any,
    mask: Any,
    cu_seqlens: Any,
    temperature: Any,
    backend: str,
    one_sequence: bool = False,
) -> Call:
    """Check logits, tokens, mask and temperature; flatten what is per token."""
    packed = cu_seqlens is not None or one_sequence
    logits = check_logits("logits", logits, packed)
    shape = tuple(logits.shape[:-1])
    if one_sequence:
        layout = layouts.one_sequence(shape, logits.device)
    else:
        layout = layouts.make_layout("logits", shape, cu_seqlens, logits.device)
    ids = layout.per_token("tokens", tokens, "integer").long()
    dtype = compute_dtype(logits.dtype)
    heat, heats = layouts.temperature_rows(temperature, layout, dtype)
    rows = Rows(layouts.counted(mask, ids, layout), ids, heats)
    backend = choose_backend(backend, logits.device)
    if backend == "reference":
        check_tokens(rows.tokens, rows.mask, logits.shape[-1])
        check_temperatures(rows.temperature, rows.mask)
    return Call(logits.unsqueeze(0) if packed else logits, rows, layout, heat, dtype, backend)


def read_log_probs(
    log_probs: Any, entropy: Any, mask: Any, cu_seqlens: Any, config: PolicyLossConfig, backend: str
) -> tuple[Call, TokenLogProbs]:
    """Check and flatten log-probs and entropy in place of logits."""
    check_dense("log_probs", log_probs, "floating")
    if entropy is None and config.entropy_coef != 0:
        raise ValueError(f"entropy is None with entropy_coef = {config.entropy_coef}; it must be given per token")
    layout = layouts.make_layout("log_probs", tuple(log_probs.shape), cu_seqlens, log_probs.device)
    dtype = compute_dtype(log_probs.dtype)
    flat = layout.per_token("log_probs", log_probs, "floating").to(dtype)
    flat_entropy = None if entropy is None else layout.per_token("entropy", entropy, "floating").to(dtype)
    rows = Rows(layouts.counted(mask, None, layout))
    call = Call(None, rows, layout, 1.0, dtype, choose_backend(backend, log_probs.device))
    return call, TokenLogProbs(flat, flat_entropy)


def log_probs_and_entropy(call: Call, inplace_grad: Any, want_entropy: bool) -> TokenLogProbs:
    """Log-probs ``[N]`` and, when wanted, entropy of the counted rows, differentiable in the logits."""
    assert call.logits is not None
    _check_inplace(call, inplace_grad)
    if call.backend == "reference":
        log_probs, entropy = reference.token_log_probs(call.logits, call.rows, call.temperature)
    else:
        log_probs, entropy = autograd.TokenLogProbs.apply(
            call.logits, call.temperature, want_entropy, inplace_grad, call.backend, *call.rows
        )
    return TokenLogProbs(log_probs, entropy if want_entropy else None)


def _check_inplace(call: Call, inplace_grad: Any) -> None:
    if check_bool("inplace_grad", inplace_grad):
        if call.backend == "reference":
            raise ValueError("inplace_grad is True with backend 'reference'; it must be False there")
        assert call.logits is not None
        check_not_overlapping(call.logits)


def wants_entropy(config: PolicyLossConfig, mode: str) -> bool:
    """Whether the entropy is in the loss, or cheap enough to report while the row is read."""
    return config.entropy_coef != 0 or mode != "none"


def loss_rows(call: Call, given: Constants, config: PolicyLossConfig, options: Options) -> Rows:
    """Spread what the loss needs over rows ``[N]``, with the mask of the rows that are looked at."""
    layout, dtype, mask, device = call.layout, call.dtype, call.rows.mask, call.layout.sequence.device
    if config.reduction == "seq_mean_token_sum_norm" and config.norm_length is None:
        raise ValueError(
            f"PolicyLossConfig.norm_length is None with reduction {config.reduction!r}; it must be given, a length in "
            "tokens: recipe.replace(norm_length=...)"
        )
    if config.kl_coef > 0 and given.ref_log_probs is None:
        raise ValueError(f"ref_log_probs is None with kl_coef = {config.kl_coef}; it must be given per token")

    def per_token(name: str, value: Any) -> Tensor | None:
        return None if value is None else layout.per_token(name, value, "floating").detach().to(dtype)

    advantages = layout.per_token_or_sequence("advantages", given.advantages, "real").detach().to(dtype)
    weights = given.rollout_weights
    if weights is not None:
        weights = layout.per_token_or_sequence("rollout_weights", weights, "real", columns=True).detach().to(dtype)
    num_tokens = check_count("num_tokens", options.num_tokens, device)
    num_sequences = check_count("num_sequences", options.num_sequences, device)
    factor = reduction_factor(mask, layout.offsets, layout.sequence, config, num_tokens, num_sequences, dtype)
    rows = call.rows._replace(
        advantages=advantages,
        factor=factor * layout.poison.to(dtype),
        old_log_probs=per_token("old_log_probs", given.old_log_probs),
        ref_log_probs=per_token("ref_log_probs", given.ref_log_probs),
        rollout_weights=weights,
    )
    mode = check_choice("metrics", options.metrics, ("all", "active", "none"))
    return rows if mode == "all" else rows._replace(mask=_active(rows, layout, config))


def _active(rows: Rows, layout: Layout, config: PolicyLossConfig) -> Tensor:
    """Counted rows whose gradient is not known to be zero before they are read."""
    assert rows.advantages is not None
    if config.kl_coef != 0 or config.entropy_coef != 0:
        return rows.mask
    active = rows.mask & (rows.advantages != 0)
    if rows.rollout_weights is not None:
        active = active & (rows.rollout_weights != 0)
    if config.pools:
        # A shared ratio needs every token of the sequences that have an active one.
        active = rows.mask & per_row(counts_per_sequence(active, layout.offsets) > 0, layout.sequence)
    return active


def loss_from_logits(
    call: Call, given: Constants, config: PolicyLossConfig, options: Options, found: TokenLogProbs | None = None
) -> LossOutput:
    """Loss of logits: in one pass where the gradient's coefficient is known, else by way of log-probs.

    ``found`` are log-probs of these logits that were already needed for something else.
    """
    rows = loss_rows(call, given, config, options)
    _check_inplace(call, options.inplace_grad)
    scale = check_number("grad_scale", options.grad_scale, low=0.0, high=float("inf"), open_low=True)
    assert call.logits is not None
    differentiated = torch.is_grad_enabled() and call.logits.requires_grad
    # fp16 cannot hold an unscaled gradient: without a scale it waits for the upstream one.
    unscaled = call.logits.dtype == torch.float16 and scale == 1.0
    late = config.pools or config.reduction == "none" or unscaled or call.backend == "reference"
    entropy = wants_entropy(config, options.metrics)
    if found is not None or late or not differentiated:
        if found is None:
            found = log_probs_and_entropy(call._replace(rows=rows), options.inplace_grad, entropy)
        return loss_from_log_probs(call, rows, config, options, found)
    loss, vector = autograd.LogitsPolicyLoss.apply(
        call.logits,
        autograd.anchor(call.logits),
        call.layout.offsets,
        call.layout.sequence,
        config.json,
        call.temperature,
        scale,
        entropy,
        options.inplace_grad,
        call.backend,
        *rows,
    )
    return LossOutput(loss, _named(vector, rows, config, options, entropy))


def loss_from_log_probs(
    call: Call, rows: Rows, config: PolicyLossConfig, options: Options, found: TokenLogProbs
) -> LossOutput:
    """Loss of log-probs ``[N]``, the middle step between statistics and gradient of the logits."""
    layout, per_token = call.layout, config.reduction == "none"
    if call.backend == "reference":
        losses, vector = reference.policy_loss(*found, rows, layout.offsets, config, call.vocab)
        loss = losses if per_token else metrics.total(losses)
    else:
        loss, vector = autograd.PolicyLoss.apply(
            *found, layout.offsets, layout.sequence, config.json, per_token, call.vocab, call.backend, *rows
        )
    loss = loss.view(layout.shape) if per_token else loss
    return LossOutput(loss, _named(vector, rows, config, options, found.entropy is not None))


def _named(
    vector: Tensor, rows: Rows, config: PolicyLossConfig, options: Options, has_entropy: bool
) -> dict[str, Tensor]:
    if options.metrics == "none":
        return {}
    without = [] if rows.ref_log_probs is not None else ["policy/ref_kl", "policy/loss/kl"]
    without += [] if has_entropy else ["policy/entropy"]
    without += [] if config.entropy_coef != 0 else ["policy/loss/entropy"]
    return metrics.named(vector, metrics.TOKEN, without)
