"""The public losses and log-probs: validate, choose a backend, call it, report."""

from typing import Any

from torch import Tensor

from egpo_kernels.config import recipes
from egpo_kernels.config.fields import check_bool
from egpo_kernels.config.results import LossOutput, SamplingSupport, TokenLogProbs
from egpo_kernels.config.settings import PolicyLossConfig, Recipe
from egpo_kernels.engine import calls, losses
from egpo_kernels.engine.kinds import kind_of_call
from egpo_kernels.engine.logits import LOSSES, SCORES, kind_of_loss, log_probs_of, read_logits
from egpo_kernels.engine.reports import reported
from egpo_kernels.inputs.validation import check_choice, check_instance
from egpo_kernels.parallel import reading


def egpo_loss(
    logits: Tensor,
    tokens: Tensor,
    groups: Any,
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    correct: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: SamplingSupport | None = None,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    recipe: Recipe | str = recipes.EGPO,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    group_size: int | None = None,
    grad_scale: float = 1.0,
    inplace_grad: bool = False,
    metrics: str = "all",
    backend: str = "auto",
) -> LossOutput:
    """EGPO loss of whole groups, from logits and rewards (arXiv 2602.22751, Eq. 2-13).

    It is `group_advantages` followed by `logits_policy_loss`, for a batch of whole groups. With micro-batches call the
    two separately. Without ``old_log_probs`` the update is on-policy: the ratio is 1, and the uncertainty of each
    sequence comes from these logits.

    Args:
        logits: ``[S, T, V]``, or ``[N, V]`` packed; fp16, bf16, fp32 or fp64; undivided by the temperature;
            ``logits[..., t, :]`` scores ``tokens[..., t]``; any strides with the vocabulary contiguous.
        tokens: ``[S, T]`` or ``[N]``, integer.
        groups: Group of each sequence: integer tensor ``[S]`` (any ids, any order), list of names, numpy array, or an
            int G for G consecutive sequences.
        rewards: ``[S]``.
        mask: Shaped like tokens, nonzero where a token is in the mask; None: where ``tokens != -100``.
        old_log_probs: Log-probs of the tokens at sampling time, in nats, shaped like tokens; None: on-policy, the
            ratio is 1.
        ref_log_probs: Log-probs under the reference, shaped like tokens; needed for ``kl_coef > 0``.
        rollout_weights: Factors of the surrogate, ``[S]``, ``[S, 1]`` or per token; NaN means 1, and a metric counts
            it.
        entropy_mask: Shaped like tokens: which tokens in the mask the uncertainty averages over; None: all of them.
        correct: ``[S]`` bool; None: ``reward > correct_threshold``.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        temperature: Sampling temperature, a float, ``[S]`` or per token.
        support: What the sampler kept for each row (top-k, top-p, min-p), a `SamplingSupport`: log-probs, entropy and
            gradient are over these tokens, and old and reference log-probs must be too. None: the whole vocabulary.
        vocab_group: A ``ProcessGroup`` or a 1-D ``DeviceMesh`` over whose ranks the vocabulary is split; see
            `logits_policy_loss`.
        vocab_start: Where this rank's columns begin; see `logits_policy_loss`.
        vocab_size: Ids of the vocabulary; see `logits_policy_loss`.
        recipe: A `Recipe` or its name.
        num_tokens: Tokens in the mask over the whole (global) batch, for ``token_mean``; a number or 0-d tensor.
        num_sequences: Sequences with a token in the mask over the whole batch, for the ``seq_mean`` reductions.
        group_size: Members every group must have; see `group_advantages`.
        grad_scale: The upstream gradient to expect; see `logits_policy_loss`.
        inplace_grad: Write the gradient over the logits; see `logits_policy_loss`.
        metrics: ``all``, ``active`` or ``none``; see `logits_policy_loss`.
        backend: ``auto``, ``triton``, ``portable`` or ``reference``.

    Returns:
        ``(loss, metrics)``: a 0-d float32 (float64) loss, or per token for reduction ``none``.

    Raises:
        ValueError: A wrong shape, device, value or combination.
        TypeError: A wrong type or dtype.
    """
    recipe = recipes.get(recipe)
    told = (recipe, metrics, num_tokens, num_sequences, group_size, groups)
    columns = reading.Given(vocab_group, vocab_start, vocab_size, told)
    call = read_logits(logits, tokens, mask, cu_seqlens, temperature, support, inplace_grad, backend, columns=columns)
    grouping = calls.Grouping(groups, rewards, entropy_mask, correct, group_size)
    given = calls.Constants(None, old_log_probs, ref_log_probs, rollout_weights)
    options = calls.Options(num_tokens, num_sequences, grad_scale, metrics)
    return reported(call, losses.loss_of_groups(call, given, grouping, recipe, options), options.metrics)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: PolicyLossConfig = recipes.EGPO.loss,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    metrics: str = "all",
    backend: str = "auto",
) -> LossOutput:
    """Policy loss from log-probabilities (EGPO, arXiv 2602.22751, Eq. 12), differentiable in them and in ``entropy``.

    An entropy without ``entropy_coef`` is only reported as a metric and gets no gradient, not even zeros.

    Args:
        log_probs: Log-probs of the tokens in nats, ``[S, T]`` or packed ``[N]``, floating.
        old_log_probs: Those at sampling time, shaped like log_probs; None: on-policy, the ratio is 1.
        advantages: ``[S]`` or shaped like log_probs; treated as constants.
        mask: Shaped like log_probs, nonzero where a token is in the mask; None: everywhere.
        ref_log_probs: Log-probs under the reference, shaped like log_probs; needed for ``kl_coef > 0``.
        entropy: Entropy of each position in nats; needed for ``entropy_coef != 0``.
        rollout_weights: Factors of the surrogate, ``[S]``, ``[S, 1]`` or per token; NaN means 1, and a metric counts
            it.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        config: Settings of the loss.
        num_tokens: Tokens in the mask over the whole (global) batch, for ``token_mean``; a number or 0-d tensor.
        num_sequences: Sequences with a token in the mask over the whole batch, for the ``seq_mean`` reductions.
        metrics: ``all`` or ``none``, which saves their computing.
        backend: ``auto``, ``triton``, ``portable`` or ``reference``.

    Returns:
        ``(loss, metrics)``: a 0-d float32 (float64) loss, or shaped like log_probs for reduction ``none``.

    Raises:
        ValueError: A wrong shape, device, value or combination.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, PolicyLossConfig)
    call, found = losses.read_log_probs(log_probs, entropy, mask, cu_seqlens, config, backend)
    options = calls.Options(num_tokens, num_sequences, metrics=check_choice("metrics", metrics, ("all", "none")))
    given = calls.Constants(advantages, old_log_probs, ref_log_probs, rollout_weights)
    rows = losses.loss_rows(call, given, config, options)
    at_once = call.backend == "portable" and config.reduction != "none"
    made = rows if at_once else rows.made(call.backend)
    return losses.loss_from_log_probs(call, made, config, options, found)


def logits_policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: SamplingSupport | None = None,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    config: PolicyLossConfig = recipes.EGPO.loss,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    grad_scale: float = 1.0,
    inplace_grad: bool = False,
    metrics: str = "all",
    backend: str = "auto",
) -> LossOutput:
    """Policy loss from logits (EGPO, arXiv 2602.22751, Eq. 12): loss and gradient in one pass over the vocabulary.

    The gradient is computed together with the loss: one read and one write of the logits' size. It is computed in
    backward (two reads and one write) where it depends on what is known only later: with a ratio per sequence
    (``sequence``, ``sequence_token``, the surrogate gmpo), with ``reduction="none"``, and with fp16 logits without
    ``grad_scale``.

    Args:
        logits: ``[S, T, V]``, or ``[N, V]`` packed; fp16, bf16, fp32 or fp64; undivided by the temperature;
            ``logits[..., t, :]`` scores ``tokens[..., t]``; any strides with the vocabulary contiguous.
        tokens: ``[S, T]`` or ``[N]``, integer.
        advantages: ``[S]`` or shaped like tokens; treated as constants.
        mask: Shaped like tokens, nonzero where a token is in the mask; None: where ``tokens != -100``.
        old_log_probs: Log-probs of the tokens at sampling time, in nats, shaped like tokens; None: on-policy, the
            ratio is 1.
        ref_log_probs: Log-probs under the reference, shaped like tokens; needed for ``kl_coef > 0``.
        rollout_weights: Factors of the surrogate, ``[S]``, ``[S, 1]`` or per token; NaN means 1, and a metric counts
            it.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        temperature: Sampling temperature, a float, ``[S]`` or per token.
        support: What the sampler kept for each row (top-k, top-p, min-p), a `SamplingSupport`: log-probs, entropy and
            gradient are over these tokens, and old and reference log-probs must be too. None: the whole vocabulary.
        vocab_group: A ``ProcessGroup`` or a 1-D ``DeviceMesh`` over whose ranks the vocabulary is split: each passes
            its own columns of logits and the same of everything else, and gets the whole loss and its own part of the
            gradient. One exchange, in forward. Logits that are a ``DTensor``, Shard on the vocabulary, say it
            themselves. None: not split.
        vocab_start: Where this rank's columns begin. None: ranks have equally many columns, in their order.
        vocab_size: Ids of the vocabulary, which must be given with ``vocab_start``; columns behind them are padding,
            which is not read and gets no gradient. None: all columns count.
        config: Settings of the loss.
        num_tokens: Tokens in the mask over the whole (global) batch, for ``token_mean``; a number or 0-d tensor.
        num_sequences: Sequences with a token in the mask over the whole batch, for the ``seq_mean`` reductions.
        grad_scale: The upstream gradient to expect (a GradScaler's scale, 1 / accumulation steps). The gradient is
            multiplied by it before it is rounded. An upstream gradient equal to it costs nothing; another one costs a
            pass over the gradient.
        inplace_grad: Write the gradient over the logits: no extra memory, but the logits are lost.
        metrics: ``all``: over all tokens in the mask. ``active``: without tokens whose gradient is known to be 0
            (advantage 0, no KL, no entropy bonus); their logits are not read. ``none``: as ``active``, and no metrics
            are returned.
        backend: ``auto``, ``triton``, ``portable`` or ``reference``.

    Returns:
        ``(loss, metrics)``: a 0-d float32 (float64) loss, or shaped like tokens for reduction ``none``.

    Raises:
        ValueError: A wrong shape, device, value or combination.
        TypeError: A wrong type or dtype.
    """
    rows = (mask, tokens, None, advantages, None, old_log_probs, ref_log_probs, rollout_weights)
    options = calls.Options(num_tokens, num_sequences, grad_scale, metrics)
    kind = None
    if support is vocab_group is vocab_start is vocab_size is None:
        kind = kind_of_loss(logits, rows, cu_seqlens, temperature, config, options, inplace_grad, backend)
    way = LOSSES.get(kind)
    if way is not None:
        return way.loss(logits, rows, temperature, options)
    check_instance("config", config, PolicyLossConfig)
    columns = reading.Given(vocab_group, vocab_start, vocab_size, (config, metrics, num_tokens, num_sequences))
    call = read_logits(
        logits, tokens, mask, cu_seqlens, temperature, support, inplace_grad, backend, kind=kind, columns=columns
    )
    given = calls.Constants(advantages, old_log_probs, ref_log_probs, rollout_weights)
    return reported(call, losses.loss_of_tokens(call, given, config, options), options.metrics)


def token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: SamplingSupport | None = None,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    return_entropy: bool = False,
    inplace_grad: bool = False,
    backend: str = "auto",
) -> TokenLogProbs:
    """Log-prob of each token and, if asked for, entropy of each position, from logits; both differentiable.

    Forward reads the logits once; backward reads them once and writes the gradient once.

    Args:
        logits: ``[S, T, V]`` or ``[N, V]``; fp16, bf16, fp32 or fp64; undivided by the temperature; any strides with
            the vocabulary contiguous.
        tokens: ``[S, T]`` or ``[N]``, integer.
        mask: Shaped like tokens, nonzero where a token is in the mask; None: where ``tokens != -100``.
        temperature: A float, ``[S]`` (padded) or per token.
        support: What the sampler kept for each row (top-k, top-p, min-p), a `SamplingSupport`: log-probs, entropy and
            gradient are over these tokens, and old and reference log-probs must be too. None: the whole vocabulary.
        vocab_group: A ``ProcessGroup`` or a 1-D ``DeviceMesh`` over whose ranks the vocabulary is split; see
            `logits_policy_loss`.
        vocab_start: Where this rank's columns begin; see `logits_policy_loss`.
        vocab_size: Ids of the vocabulary; see `logits_policy_loss`.
        return_entropy: Also return the entropy.
        inplace_grad: Write the gradient over the logits in backward.
        backend: ``auto``, ``triton``, ``portable`` or ``reference``.

    Returns:
        ``(log_probs, entropy)`` in nats, float32 (float64), shaped like tokens; 0 at masked positions; entropy None
        unless asked for. A token whose own logit is -inf has log-prob -inf and passes no gradient.

    Raises:
        ValueError: A wrong shape, device or value.
        TypeError: A wrong type or dtype.
    """
    kind = None
    if support is vocab_group is vocab_start is vocab_size is None:
        kind = kind_of_call(logits, (mask, tokens), temperature, backend, return_entropy, inplace_grad)
    way = SCORES.get(kind)
    if way is not None:
        return way.log_probs(logits, mask, tokens, temperature)
    packed, columns = (
        isinstance(logits, Tensor) and logits.dim() == 2,
        reading.Given(vocab_group, vocab_start, vocab_size),
    )
    call = read_logits(logits, tokens, mask, None, temperature, support, inplace_grad, backend, packed, kind, columns)
    return log_probs_of(call, check_bool("return_entropy", return_entropy))
