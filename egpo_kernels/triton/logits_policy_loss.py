"""One launch over the rows: statistics, surrogate, and the gradient while the row is still in cache."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows, compute_dtype
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.triton.arithmetic import LOG2_E
from egpo_kernels.triton.launch import Launch, launch_for, num_programs
from egpo_kernels.triton.launcher import Launches, lie
from egpo_kernels.triton.policy_loss import Prepared, loss_of
from egpo_kernels.triton.sequence_ratio import Scores
from egpo_kernels.triton.settings import (
    RowPointers,
    choices_of,
    read_settings,
    row_pointers,
    settings_of,
    triton_dtype,
)
from egpo_kernels.triton.softmax import (
    load_token,
    matrix,
    row_inverse_temperature,
    row_pointer,
    sweep_statistics,
    token_statistics,
)
from egpo_kernels.triton.softmax_gradient import sweep_gradient
from egpo_kernels.triton.strips import write_zeros
from egpo_kernels.triton.surrogates import SURROGATES, slope_of, token_terms


@triton.jit
def row_derivatives(rows, row, log_prob, settings, choices, SURROGATE: tl.constexpr):
    """dL/dl and dL/dEnt of a row; nothing comes from one whose log-prob is -inf."""
    live = log_prob != float("-inf")
    factor = tl.load(rows.factor_ptr + row) * settings.grad_scale
    terms = token_terms(rows, row, live, tl.where(live, log_prob, 0.0), None, settings, choices, SURROGATE, False)
    slope = tl.where(live, slope_of(terms, factor, settings), 0.0)
    return slope, tl.where(live, -factor * settings.entropy_coef, 0.0)


@triton.jit(do_not_specialize=["length", "out_length", "num_rows"])
def logits_policy_loss_kernel(
    logits, out, rows, log_probs_ptr, entropy_ptr, numbers, choices: tl.constexpr, length, out_length,
    num_rows, extent, launch: tl.constexpr, SURROGATE: tl.constexpr, DTYPE: tl.constexpr, ENTROPY: tl.constexpr,
    TILTED: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th row: two sweeps, the second meant to be served by the cache.

    Rows outside the mask are not read; a row whose gradient is 0 is not read a second time.
    """
    settings = read_settings(numbers, DTYPE)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        out_ptr = row_pointer(out, row, out_length, launch.aligned and launch.agrees)
        if tl.load(rows.mask_ptr + row) != 0:
            row_ptr = row_pointer(logits, row, length, launch.aligned)
            inverse_temperature = row_inverse_temperature(rows, row, settings)
            token, logit = load_token(rows, row, row_ptr, extent.vocab, True, DTYPE)
            found = sweep_statistics(row_ptr, extent, LOG2_E * inverse_temperature, launch, DTYPE, ENTROPY)
            log_prob, entropy = token_statistics(found, logit, inverse_temperature)
            tl.store(log_probs_ptr + row, log_prob)
            if ENTROPY:
                tl.store(entropy_ptr + row, entropy)
            slope, bonus = row_derivatives(rows, row, log_prob, settings, choices, SURROGATE)
            if (slope != 0) | (bonus != 0):
                sweep_gradient(
                    row_ptr, out_ptr, extent, token, logit, found, entropy, slope, bonus, inverse_temperature, launch,
                    DTYPE, TILTED,
                )  # fmt: skip
            else:
                write_zeros(out_ptr, extent.vocab, launch)
        else:
            tl.store(log_probs_ptr + row, 0.0)
            if ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            write_zeros(out_ptr, extent.vocab, launch)


def kernel_of(launch: Launch) -> Any:
    """The kernel that a launch is for. Gluon is imported only where it is used: it is a part of triton still moving."""
    if launch.slots == 0:
        return logits_policy_loss_kernel
    from egpo_kernels.triton import ring

    return ring.ring_policy_loss_kernel


def logits_loss_gradient(
    logits: Tensor,
    rows: Rows,
    config: PolicyLossConfig,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy ``[N]`` of each row (0 outside the mask); its gradient goes to ``out``, maybe ``logits``."""
    found = _one_pass(logits, row_pointers(rows), config, temperature, grad_scale, want_entropy, out)
    return found[1:]


def logits_policy_loss(
    logits: Tensor,
    rows: Rows,
    config: PolicyLossConfig,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    reported: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss, 0-d, and the metrics vector, empty unless ``reported``; the gradient goes to ``out``, maybe ``logits``."""
    pointers = row_pointers(rows)
    launches, log_probs, entropy = _one_pass(
        logits, pointers, config, temperature, grad_scale, want_entropy, out, reported
    )
    numbers, surrogate = settings_of(config, 1.0, 1.0, log_probs.dtype), SURROGATES[config.surrogate]
    made = Prepared(launches, pointers, Scores(log_probs, entropy), numbers, choices_of(config), surrogate)
    # No token's loss depends on its sequence here.
    return loss_of(made, log_probs, Segments(log_probs.shape[0], 1), logits.shape[-1], False, reported)


def _one_pass(
    logits: Tensor,
    pointers: RowPointers,
    config: PolicyLossConfig,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    out: Tensor,
    *key: bool,
) -> tuple[Launches, Tensor, Tensor | None]:
    num_rows = pointers.mask_ptr.shape[0]
    dtype = compute_dtype(logits.dtype)
    log_probs = logits.new_empty(num_rows, dtype=dtype)
    entropy = torch.empty_like(log_probs) if want_entropy else None
    if num_rows == 0:
        return Launches(logits.device, dtype, "no rows", *key), log_probs, entropy
    where, length = matrix(logits)
    target, out_length = (where, length) if out is logits else matrix(out)
    launched = launch_for("logits_policy_loss_kernel", logits, out, may_ring=True)
    launches = Launches(
        logits.device, logits.dtype, out.dtype, launched.key, where.key, target.key, lie(pointers), length >> 31,
        out_length >> 31, num_rows >> 31, config.surrogate, choices_of(config), config.entropy_coef != 0, want_entropy,
        *key,
    )  # fmt: skip
    numbers, surrogate = settings_of(config, temperature, grad_scale, dtype), SURROGATES[config.surrogate]
    results, sizes = (log_probs, entropy), (length, out_length, num_rows)
    constants = (launched.launch, surrogate, triton_dtype(dtype), want_entropy, config.entropy_coef != 0)
    arguments = (where, target, pointers, *results, numbers, choices_of(config), *sizes, launched.extent, *constants)
    launches(kernel_of(launched.launch), num_programs(launched, num_rows, logits.device), arguments, launched.options)
    return launches, log_probs, entropy
