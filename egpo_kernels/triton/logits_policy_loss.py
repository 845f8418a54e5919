"""One launch over the rows: statistics, surrogate, and the gradient while the row is still in cache."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig, compute_dtype
from egpo_kernels.formulas.rows import Material
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.inputs.validation import checks_values
from egpo_kernels.inputs.values import check_rows
from egpo_kernels.triton.arithmetic import LOG2_E
from egpo_kernels.triton.launch import Launch, Launched, choice_of, launch_for, num_programs
from egpo_kernels.triton.launcher import Launches, lie
from egpo_kernels.triton.policy_loss import Prepared, loss_of
from egpo_kernels.triton.row_making import row_making
from egpo_kernels.triton.sequence_ratio import Scores
from egpo_kernels.triton.settings import (
    Choices,
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

KERNEL = "logits_policy_loss_kernel"


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


class Plan(NamedTuple):
    """What one pass goes by whatever its rows and numbers are: the kernel, how it is launched, constants of it and of
    the loss.
    """

    kernel: Any
    launched: Launched
    dtype: torch.dtype
    choices: Choices
    surrogate: Any
    constants: tuple[Any, ...]


def _plan(logits: Tensor, out: Tensor, config: PolicyLossConfig, want_entropy: bool) -> Plan:
    launched = launch_for(KERNEL, logits, out, may_ring=True)
    dtype, surrogate = compute_dtype(logits.dtype), SURROGATES[config.surrogate]
    of_loss = (surrogate, triton_dtype(dtype), want_entropy, config.has_bonus)
    constants = (launched.extent, launched.launch, *of_loss)
    return Plan(kernel_of(launched.launch), launched, dtype, choices_of(config), surrogate, constants)


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
    pointers = row_pointers(rows)
    made = _one_pass(
        logits, lie(pointers), lambda launches: pointers, config, temperature, grad_scale, want_entropy, out
    )
    return made.scores.log_probs_ptr, made.scores.entropy_ptr


def logits_policy_loss(
    logits: Tensor,
    material: Material,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    reported: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss, 0-d, and the metrics vector, empty unless ``reported``; the gradient goes to ``out``, maybe ``logits``.

    Rows are made on the way, of a loss's ``material``.
    """
    config, vocab = material.purpose.config, logits.shape[-1]
    assert config is not None
    key, make = row_making(material)

    def checked(launches: Launches) -> RowPointers:
        pointers = make(launches)
        if checks_values(logits.device):
            check_rows(Rows(*pointers), vocab)
        return pointers

    made = _one_pass(logits, (key, reported), checked, config, temperature, grad_scale, want_entropy, out)
    # No token's loss depends on its sequence here.
    return loss_of(made, Segments(material.segments.num_rows, 1), vocab, False, reported)


def _one_pass(
    logits: Tensor,
    key: Hashable,
    make: Callable[[Launches], RowPointers],
    config: PolicyLossConfig,
    temperature: float,
    grad_scale: float,
    want_entropy: bool,
    out: Tensor,
) -> Prepared:
    """Launch over the rows, of which ``key`` says how they lie; what is returned is ready for the loss."""
    where, length, where_key = matrix(logits)
    target, out_length, target_key = (where, length, None) if out is logits else matrix(out)
    # Not the config, whose coefficients may be others at every step.
    chosen = (choice_of(KERNEL, logits), config.surrogate, choices_of(config), config.has_bonus, want_entropy)
    launches = Launches(logits.device, chosen, where_key, target_key, key)
    plan = launches.worked_out(_plan, logits, out, config, want_entropy)
    pointers, dtype = make(launches), plan.dtype
    num_rows = pointers.mask_ptr.numel()
    log_probs = logits.new_empty(num_rows, dtype=dtype)
    entropy = logits.new_empty(num_rows, dtype=dtype) if want_entropy else None
    if num_rows:
        numbers = settings_of(config, temperature, grad_scale, dtype)
        arguments = (where, target, pointers, log_probs, entropy, numbers, plan.choices, length, out_length, num_rows)
        programs = num_programs(plan.launched, num_rows, logits.device)
        launches(plan.kernel, programs, arguments + plan.constants, plan.launched.options)
    numbers = settings_of(config, 1.0, 1.0, dtype)
    return Prepared(launches, pointers, Scores(log_probs, entropy), numbers, plan.choices, plan.surrogate)
