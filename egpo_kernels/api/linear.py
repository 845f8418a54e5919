"""The public functions from hidden states: the logits functions' names, results and metrics, without the logits."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config import recipes
from egpo_kernels.config.fields import check_bool
from egpo_kernels.config.settings import LossOutput, PolicyLossConfig, Recipe, TokenLogProbs
from egpo_kernels.engine import losses
from egpo_kernels.inputs.validation import check_instance
from egpo_kernels.linear.source import Given, read_hidden

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
    """`egpo_loss` of ``hidden @ weight.T`` (EGPO, arXiv 2602.22751, Eq. 2-13); the logits are never whole.

    Without ``old_log_probs`` the advantages need these log-probs first, so the gradient comes late: a head that trains
    costs four products of the size of the logits, a frozen one two. See `linear_policy_loss` for cost and memory.

    Args:
        hidden: See `linear_policy_loss`, as for weight, bias, lora, logit_scale, logit_softcap, logits_dtype,
            num_active and max_chunk_bytes.
        weight: ``[V, H]``.
        tokens: See `egpo_loss`, as for everything that is not named here.
        groups: Group of each sequence.
        rewards: ``[S]``.
        bias: ``[V]``.
        lora: ``(A, B, scale)``.
        logit_scale: A factor of the logits.
        logit_softcap: Their bound.
        logits_dtype: Their dtype.
        mask: Which tokens count.
        old_log_probs: Log-probs at sampling time, in nats; None: on-policy.
        ref_log_probs: Log-probs under the reference, in nats.
        rollout_weights: Weights on the surrogate.
        entropy_mask: Which counted tokens the uncertainty averages over.
        correct: ``[S]`` bool.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        temperature: A float, ``[S]`` or per token.
        recipe: A `Recipe` or its name.
        num_tokens: Counted tokens of the whole (global) batch.
        num_sequences: Sequences of the whole batch.
        group_size: Members every group must have.
        grad_scale: The upstream gradient to expect.
        metrics: ``all``, ``active`` or ``none``.
        num_active: Rows that count, or more.
        max_chunk_bytes: Memory of a chunk.
        backend: ``auto``, ``triton``, ``portable`` or ``reference``.

    Returns:
        ``(loss, metrics)``, as `egpo_loss`.

    Raises:
        ValueError: A wrong shape, device, value or combination.
        TypeError: A wrong type or dtype.
    """
    recipe = recipes.get(recipe)
    given = Given(hidden, weight, bias, lora, logit_scale, logit_softcap, num_active, max_chunk_bytes, logits_dtype)
    call = read_hidden(given, tokens, mask, cu_seqlens, temperature, backend)
    grouping = losses.Grouping(groups, rewards, entropy_mask, correct, group_size)
    constants = losses.Constants(None, old_log_probs, ref_log_probs, rollout_weights)
    options = losses.Options(num_tokens, num_sequences, grad_scale, metrics)
    return losses.loss_of_groups(call, constants, grouping, recipe, options)


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
    config: PolicyLossConfig = recipes.EGPO.loss,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    grad_scale: float = 1.0,
    metrics: str = "all",
    num_active: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> LossOutput:
    """`logits_policy_loss` of ``hidden @ weight.T`` (EGPO, arXiv 2602.22751, Eq. 12); the logits are never whole.

    The logits are ``z = c tanh(x / c)`` with ``x = logit_scale (h (W + scale B A)^T + bias)``, undivided by the
    temperature. They are made a chunk of rows at a time, and the gradients while the chunk is there:

    | products of the size of the logits     | head trains | head is frozen                |
    |----------------------------------------|-------------|-------------------------------|
    | coefficient known with the row         | 3           | 2                             |
    | known later (see `logits_policy_loss`) | 4           | 2, or 3 with ``entropy_coef`` |

    A frozen head's 16-bit gradient is rounded once more where it is scaled later.

    Adapters on a frozen weight count as a frozen head, plus products with r in place of H; where the coefficient is
    known later, 3. Only rows that count are multiplied, where the host knows their number.

    At the peak there live, beside the inputs: the gradients; one chunk; and, where there are several chunks and the
    head trains in 16 bits, its gradients in float32.

    Args:
        hidden: Last hidden states, ``[S, T, H]``, or ``[N, H]`` packed; fp16, bf16, fp32 or fp64; ``hidden[..., t, :]``
            scores ``tokens[..., t]``; any strides.
        weight: The output layer's, ``[V, H]``, in the dtype of hidden (or float32, with ``logits_dtype``). Under
            autocast both are converted.
        tokens: ``[S, T]`` or ``[N]``, integer.
        advantages: ``[S]`` or shaped like tokens; treated as constants.
        mask: Shaped like tokens, nonzero counts; None counts ``tokens != -100``. On a CPU while hidden is on a device,
            it tells the host which rows to multiply.
        bias: ``[V]``, or None.
        lora: ``(A, B, scale)`` with ``A [r, H]`` and ``B [V, r]``, both differentiable: the weight is W + scale B A,
            which is never formed.
        logit_scale: A factor of the logits, above 0 (Granite: ``1 / logits_scaling``).
        logit_softcap: The bound c of the logits (Gemma 2: ``final_logit_softcapping``), or None.
        logits_dtype: ``torch.float32``: logits of 16-bit hidden states and weight are float32, summed up so by the
            product, without a float32 copy of the weight; their gradient is rounded to 16 bits before it is multiplied.
            A float32 weight is multiplied in float32, autocast or not. None: the dtype of hidden.
        old_log_probs: Log-probs of the tokens at sampling time, in nats, shaped like tokens; None: on-policy, the
            ratio is 1.
        ref_log_probs: Log-probs under the reference, shaped like tokens; needed for ``kl_coef > 0``.
        rollout_weights: Weights on the surrogate, ``[S]``, ``[S, 1]`` or per token; NaN means 1 and is counted.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        temperature: Sampling temperature, a float, ``[S]`` or per token.
        config: The settings.
        num_tokens: Counted tokens of the whole (global) batch, for ``token_mean``; a number or 0-d tensor.
        num_sequences: Sequences of the whole batch, for the ``seq_mean`` reductions.
        grad_scale: The upstream gradient to expect; see `logits_policy_loss`.
        metrics: ``all``, ``active`` or ``none``; see `logits_policy_loss`.
        num_active: Rows that count, or more, for a mask on a device, where counting them would wait for it. Too few
            raise on a CPU; on a device they make the loss NaN, and raise under ``EGPO_KERNELS_DEBUG=1``.
        max_chunk_bytes: Memory of a chunk, a backend's scratch included, which is never exceeded but by a single row.
            None: 256 MiB on a CPU; on a GPU a 32nd of its memory (all of it: what is free changes from call to call,
            and with the chunks the bits would), at least 2048 rows; at least 4096 rows where weight trains, whose
            float32 gradient is read and written once a chunk.
        backend: ``auto``, ``triton``, ``portable`` or ``reference`` (which makes the logits whole).

    Returns:
        ``(loss, metrics)``: a 0-d float32 (float64) loss, or shaped like tokens for reduction ``none``.

    Raises:
        ValueError: A wrong shape, device, value or combination.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, PolicyLossConfig)
    given = Given(hidden, weight, bias, lora, logit_scale, logit_softcap, num_active, max_chunk_bytes, logits_dtype)
    call = read_hidden(given, tokens, mask, cu_seqlens, temperature, backend)
    constants = losses.Constants(advantages, old_log_probs, ref_log_probs, rollout_weights)
    options = losses.Options(num_tokens, num_sequences, grad_scale, metrics)
    return losses.loss_of_tokens(call, constants, config, options)


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
    return_entropy: bool = False,
    num_active: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TokenLogProbs:
    """`token_log_probs` of ``hidden @ weight.T``; the logits are never whole, forward or backward.

    One product of the size of the logits forward. With a head that trains three more in backward; with a frozen one
    one more in all, and two on top of it where a gradient comes through the entropy.

    Args:
        hidden: ``[S, T, H]`` or ``[N, H]``; see `linear_policy_loss`.
        weight: ``[V, H]``.
        tokens: ``[S, T]`` or ``[N]``, integer.
        bias: ``[V]``, or None.
        lora: ``(A, B, scale)``; see `linear_policy_loss`.
        logit_scale: A factor of the logits.
        logit_softcap: The bound of the logits, or None.
        logits_dtype: The dtype of the logits; see `linear_policy_loss`.
        mask: Shaped like tokens, nonzero counts; None counts ``tokens != -100``.
        temperature: A float, ``[S]`` (padded) or per token.
        return_entropy: Also return the entropy.
        num_active: Rows that count, or more; see `linear_policy_loss`.
        max_chunk_bytes: Memory of a chunk; see `linear_policy_loss`.
        backend: ``auto``, ``triton``, ``portable`` or ``reference`` (which makes the logits whole).

    Returns:
        ``(log_probs, entropy)`` in nats, as `token_log_probs`.

    Raises:
        ValueError: A wrong shape, device or value.
        TypeError: A wrong type or dtype.
    """
    packed = isinstance(hidden, Tensor) and hidden.dim() == 2
    given = Given(hidden, weight, bias, lora, logit_scale, logit_softcap, num_active, max_chunk_bytes, logits_dtype)
    call = read_hidden(given, tokens, mask, None, temperature, backend, one_sequence=packed)
    return losses.shaped_log_probs(call, check_bool("return_entropy", return_entropy))
