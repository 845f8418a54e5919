"""The public functions from hidden states: the logits functions' names, results and metrics, without the logits."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config import recipes
from egpo_kernels.config.fields import check_bool
from egpo_kernels.config.results import LossOutput, SamplingSupport, TokenLogProbs
from egpo_kernels.config.settings import PolicyLossConfig, Recipe
from egpo_kernels.engine import calls, losses
from egpo_kernels.engine.reports import reported
from egpo_kernels.inputs.validation import check_instance
from egpo_kernels.linear.source import Given, read_hidden
from egpo_kernels.parallel import reading

Lora = tuple[Tensor, Tensor, float]


def linear_egpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    groups: Any,
    rewards: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
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
    hidden_grad: str | None = None,
    sequence_parallel: bool = False,
    recipe: Recipe | str = recipes.EGPO,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    group_size: int | None = None,
    grad_scale: float = 1.0,
    metrics: str = "all",
    num_active: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> LossOutput:
    """`egpo_loss` of ``hidden @ weight.T`` (EGPO, arXiv 2602.22751, Eq. 2-13); without whole logits.

    Without ``old_log_probs`` the advantages need the log-probs of these hidden states first, so the gradient is
    computed later: a head that trains costs four matrix products of the logits' size, a frozen one two. See
    `linear_policy_loss` for cost and memory.

    Args:
        hidden: ``[S, T, H]`` or ``[N, H]``. See `linear_policy_loss` for this, weight, bias, lora, logit_scale,
            logit_softcap, logits_dtype, num_active and max_chunk_bytes.
        weight: ``[V, H]``.
        tokens: ``[S, T]`` or ``[N]``, integer. See `egpo_loss` for this and the other arguments.
        groups: Group of each sequence.
        rewards: ``[S]``.
        bias: ``[V]``.
        lora: ``(A, B, scale)``.
        logit_scale: Factor of the logits.
        logit_softcap: Softcap of the logits, or None.
        logits_dtype: Dtype of the logits.
        mask: Shaped like tokens, nonzero where a token is in the mask; None: where ``tokens != -100``.
        old_log_probs: Log-probs of the tokens at sampling time, in nats, shaped like tokens; None: on-policy, the ratio
            is 1.
        ref_log_probs: Log-probs under the reference, shaped like tokens; needed for ``kl_coef > 0``.
        rollout_weights: Factors of the surrogate, ``[S]``, ``[S, 1]`` or per token; NaN means 1, and a metric counts
            it.
        entropy_mask: Shaped like tokens: which tokens in the mask the uncertainty averages over; None: all of them.
        correct: ``[S]`` bool.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        temperature: A float, ``[S]`` or per token.
        support: What the sampler kept for each row (top-k, top-p, min-p), a `SamplingSupport`: log-probs, entropy and
            gradient are over these tokens, and old and reference log-probs must be too. None: the whole vocabulary.
        vocab_group: Over whose ranks the vocabulary is split; see `linear_policy_loss` for this and the next four.
        vocab_start: Where this rank's rows of weight begin.
        vocab_size: Ids of the vocabulary; rows of weight behind them are padding.
        hidden_grad: ``all_reduce``, ``reduce_scatter`` or ``partial``.
        sequence_parallel: Whether hidden is this rank's part of the tokens.
        recipe: A `Recipe` or its name.
        num_tokens: Tokens in the mask over the whole (global) batch, for ``token_mean``; a number or 0-d tensor.
        num_sequences: Sequences with a token in the mask over the whole batch, for the ``seq_mean`` reductions.
        group_size: Members every group must have.
        grad_scale: The upstream gradient to expect.
        metrics: ``all``, ``active`` or ``none``.
        num_active: Number of tokens in the mask, or an upper bound.
        max_chunk_bytes: Largest memory of a chunk.
        backend: ``auto``, ``triton``, ``portable`` or ``reference``.

    Returns:
        ``(loss, metrics)``, as `egpo_loss`.

    Raises:
        ValueError: A wrong shape, device, value or combination.
        TypeError: A wrong type or dtype.
    """
    recipe = recipes.get(recipe)
    told = (recipe, metrics, num_tokens, num_sequences, group_size, groups)
    given = Given(
        hidden, weight, bias, lora, logit_scale, logit_softcap, num_active, max_chunk_bytes, logits_dtype,
        reading.Given(vocab_group, vocab_start, vocab_size, told), hidden_grad, sequence_parallel,
    )  # fmt: skip
    call = read_hidden(given, tokens, mask, cu_seqlens, temperature, support, backend)
    grouping = calls.Grouping(groups, rewards, entropy_mask, correct, group_size)
    constants = calls.Constants(None, old_log_probs, ref_log_probs, rollout_weights)
    options = calls.Options(num_tokens, num_sequences, grad_scale, metrics)
    return reported(call, losses.loss_of_groups(call, constants, grouping, recipe, options), options.metrics)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: SamplingSupport | None = None,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    hidden_grad: str | None = None,
    sequence_parallel: bool = False,
    config: PolicyLossConfig = recipes.EGPO.loss,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    grad_scale: float = 1.0,
    metrics: str = "all",
    num_active: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> LossOutput:
    """`logits_policy_loss` of ``hidden @ weight.T`` (EGPO, arXiv 2602.22751, Eq. 12); without whole logits.

    The logits are ``z = c tanh(x / c)`` with ``x = logit_scale (h (W + scale B A)^T + bias)``, undivided by the
    temperature. They are computed a chunk of rows at a time, and their gradients while the chunk is in memory:

    | matrix products of the logits' size    | head trains | head is frozen                |
    |----------------------------------------|-------------|-------------------------------|
    | coefficient known with the row         | 3           | 2                             |
    | known later (see `logits_policy_loss`) | 4           | 2, or 3 with ``entropy_coef`` |

    If the coefficient is known later, the 16-bit gradient of a frozen head's hidden states is rounded once more.

    Adapters on a frozen weight cost as a frozen head, plus products with r for H; 3 if the coefficient is known later.
    Masked rows are not multiplied if the host knows how many rows are in the mask.

    The peak holds inputs, gradients, one chunk, and, if a 16-bit head trains in several, its gradients in float32.

    Args:
        hidden: Last hidden states, ``[S, T, H]``, or ``[N, H]`` packed; fp16, bf16, fp32 or fp64; ``hidden[..., t, :]``
            scores ``tokens[..., t]``; any strides.
        weight: ``[V, H]``, in the dtype of hidden (or float32, with ``logits_dtype``); autocast converts both.
        tokens: ``[S, T]`` or ``[N]``, integer.
        advantages: ``[S]`` or shaped like tokens; treated as constants.
        mask: Shaped like tokens, nonzero where a token is in the mask; None: where ``tokens != -100``. If it is on the
            CPU and hidden on a device, the host knows which rows to multiply.
        bias: ``[V]``, or None.
        lora: ``(A, B, scale)``, ``A [r, H]``, ``B [V, r]``: the weight is W + scale B A, which is never formed.
        logit_scale: A factor of the logits, above 0 (Granite: ``1 / logits_scaling``).
        logit_softcap: Softcap c of the logits (Gemma 2: ``final_logit_softcapping``), or None.
        logits_dtype: ``torch.float32``: the product of 16-bit hidden states and weight is summed and kept in float32,
            without a float32 copy of the weight; the gradient of the logits is rounded to 16 bits before it is
            multiplied. A float32 weight is multiplied in float32, also under autocast. None: the dtype of hidden.
        old_log_probs: Log-probs of the tokens at sampling time, in nats, shaped like tokens; None: on-policy, the
            ratio is 1.
        ref_log_probs: Log-probs under the reference, shaped like tokens; needed for ``kl_coef > 0``.
        rollout_weights: Factors of the surrogate, ``[S]``, ``[S, 1]`` or per token; NaN means 1, and a metric counts
            it.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        temperature: Sampling temperature, a float, ``[S]`` or per token.
        support: What the sampler kept for each row (top-k, top-p, min-p), a `SamplingSupport`: log-probs, entropy and
            gradient are over these tokens, and old and reference log-probs must be too. None: the whole vocabulary.
        vocab_group: Over whose ranks the vocabulary is split: each passes its own rows of weight (bias, B); see
            `logits_policy_loss`. One exchange a chunk. A ``DTensor`` as weight needs it, unless hidden is one too.
        vocab_start: Where this rank's rows of weight begin; see `logits_policy_loss`.
        vocab_size: Ids of the vocabulary; see `logits_policy_loss`. Rows of weight behind them get a gradient of 0.
        hidden_grad: Each rank makes a part of the gradient of hidden: ``all_reduce`` sums it in hidden's dtype, while
            the head's is made; ``partial`` leaves that to whoever made hidden; ``reduce_scatter`` goes with
            ``sequence_parallel``. None: that, or ``all_reduce``.
        sequence_parallel: Whether hidden is this rank's part of the tokens, ``[S, T / P, H]`` or ``[N / P, H]``, in the
            ranks' order. Everything per token is of all tokens.
        config: Settings of the loss.
        num_tokens: Tokens in the mask over the whole (global) batch, for ``token_mean``; a number or 0-d tensor.
        num_sequences: Sequences with a token in the mask over the whole batch, for the ``seq_mean`` reductions.
        grad_scale: The upstream gradient to expect; see `logits_policy_loss`.
        metrics: ``all``, ``active`` or ``none``; see `logits_policy_loss`.
        num_active: Number of tokens in the mask, or an upper bound, for a mask on a device: counting there would wait
            for it. Too small a number raises an error on a CPU; on a device it makes the loss NaN, or raises with
            ``EGPO_KERNELS_DEBUG=1``.
        max_chunk_bytes: Largest memory of a chunk, a backend's scratch memory included; only a single row may exceed
            it. None: 256 MiB on a CPU, 1/32 of its total memory on a GPU; but at least 2048 rows on a GPU, and at least
            4096 rows anywhere if weight trains.
        backend: ``auto``, ``triton``, ``portable`` or ``reference`` (which makes the logits whole).

    Returns:
        ``(loss, metrics)``: a 0-d float32 (float64) loss, or shaped like tokens for reduction ``none``.

    Raises:
        ValueError: A wrong shape, device, value or combination.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, PolicyLossConfig)
    told = (config, metrics, num_tokens, num_sequences)
    given = Given(
        hidden, weight, bias, lora, logit_scale, logit_softcap, num_active, max_chunk_bytes, logits_dtype,
        reading.Given(vocab_group, vocab_start, vocab_size, told), hidden_grad, sequence_parallel,
    )  # fmt: skip
    call = read_hidden(given, tokens, mask, cu_seqlens, temperature, support, backend)
    constants = calls.Constants(advantages, old_log_probs, ref_log_probs, rollout_weights)
    options = calls.Options(num_tokens, num_sequences, grad_scale, metrics)
    return reported(call, losses.loss_of_tokens(call, constants, config, options), options.metrics)


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: SamplingSupport | None = None,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    hidden_grad: str | None = None,
    sequence_parallel: bool = False,
    return_entropy: bool = False,
    num_active: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TokenLogProbs:
    """`token_log_probs` of ``hidden @ weight.T``; without whole logits, forward or backward.

    Forward takes one matrix product of the logits' size. Backward takes three more if the head trains. With a frozen
    head it takes one more in all, and two on top of that if a gradient comes through the entropy.

    Args:
        hidden: ``[S, T, H]`` or ``[N, H]``; see `linear_policy_loss`.
        weight: ``[V, H]``.
        tokens: ``[S, T]`` or ``[N]``, integer.
        bias: ``[V]``, or None.
        lora: ``(A, B, scale)``; see `linear_policy_loss`.
        logit_scale: Factor of the logits.
        logit_softcap: Softcap of the logits, or None.
        logits_dtype: Dtype of the logits; see `linear_policy_loss`.
        mask: Shaped like tokens, nonzero where a token is in the mask; None: where ``tokens != -100``.
        temperature: A float, ``[S]`` (padded) or per token.
        support: What the sampler kept for each row (top-k, top-p, min-p), a `SamplingSupport`: log-probs, entropy and
            gradient are over these tokens, and old and reference log-probs must be too. None: the whole vocabulary.
        vocab_group: Over whose ranks the vocabulary is split; see `linear_policy_loss` for this and the next four.
        vocab_start: Where this rank's rows of weight begin.
        vocab_size: Ids of the vocabulary; rows of weight behind them are padding.
        hidden_grad: ``all_reduce``, ``reduce_scatter`` or ``partial``.
        sequence_parallel: Whether hidden is this rank's part of the tokens.
        return_entropy: Also return the entropy.
        num_active: Number of tokens in the mask, or an upper bound; see `linear_policy_loss`.
        max_chunk_bytes: Largest memory of a chunk; see `linear_policy_loss`.
        backend: ``auto``, ``triton``, ``portable`` or ``reference`` (which makes the logits whole).

    Returns:
        ``(log_probs, entropy)`` in nats, as `token_log_probs`.

    Raises:
        ValueError: A wrong shape, device or value.
        TypeError: A wrong type or dtype.
    """
    packed = isinstance(hidden, Tensor) and hidden.dim() == 2
    given = Given(
        hidden, weight, bias, lora, logit_scale, logit_softcap, num_active, max_chunk_bytes, logits_dtype,
        reading.Given(vocab_group, vocab_start, vocab_size), hidden_grad, sequence_parallel,
    )  # fmt: skip
    call = read_hidden(given, tokens, mask, None, temperature, support, backend, one_sequence=packed)
    return losses.shaped_log_probs(call, check_bool("return_entropy", return_entropy))
