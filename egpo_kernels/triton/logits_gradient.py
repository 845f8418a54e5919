"""Gradient of the logits from saved statistics and upstream gradients: one read and one write."""

import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.triton.launch import choice_of, launch_for, num_programs
from egpo_kernels.triton.launcher import Launches, lie
from egpo_kernels.triton.settings import read_temperature, row_pointers, temperature_of, triton_dtype
from egpo_kernels.triton.softmax import RowStatistics, load_token, matrix, row_inverse_temperature, row_pointer
from egpo_kernels.triton.softmax_gradient import sweep_gradient
from egpo_kernels.triton.strips import write_zeros

KERNEL = "logits_gradient_kernel"


@triton.jit(do_not_specialize=["length", "out_length", "num_rows"])
def logits_gradient_kernel(
    logits, out, rows, maximum_ptr, sum_exp_ptr, entropy_ptr, slope_ptr, bonus_ptr, numbers,
    length, out_length, num_rows, extent, launch: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th row; one that nothing flows into is zeroed without being read."""
    settings = read_temperature(numbers, DTYPE)
    TILTED: tl.constexpr = bonus_ptr is not None
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row_ptr = row_pointer(logits, row, length, launch.aligned)
        out_ptr = row_pointer(out, row, out_length, launch.aligned and launch.agrees)
        live = tl.load(rows.mask_ptr + row) != 0
        slope = tl.load(slope_ptr + row, mask=live, other=0.0)
        bonus = slope * 0.0
        entropy = slope * 0.0
        if TILTED:
            bonus = tl.load(bonus_ptr + row, mask=live, other=0.0)
            entropy = tl.load(entropy_ptr + row)
        live = live & ((slope != 0) | (bonus != 0))
        token, logit = load_token(rows, row, row_ptr, extent.vocab, live, DTYPE)
        # In place, every warp must have read the token's logit before one of them writes over it.
        tl.debug_barrier()
        if live & (logit != float("-inf")):
            found = RowStatistics(tl.load(maximum_ptr + row), tl.load(sum_exp_ptr + row), None)
            sweep_gradient(
                row_ptr, out_ptr, extent, token, logit, found, entropy, slope, bonus,
                row_inverse_temperature(rows, row, settings), launch, DTYPE, TILTED,
            )  # fmt: skip
        else:
            write_zeros(out_ptr, extent.vocab, launch)


def logits_gradient(
    logits: Tensor,
    rows: Rows,
    statistics: list[Tensor],
    upstream: list[Tensor | None],
    temperature: float,
    out: Tensor,
) -> None:
    """Write dL/dlogits to ``out`` (which may be ``logits``) from ``upstream`` (dL/dl, dL/dEnt), ``[N]`` each.

    ``statistics`` are maximum, sum of exponentials and entropy, as `row_statistics` gave them.
    """
    num_rows = rows.mask.numel()
    if num_rows == 0:
        return
    dtype = compute_dtype(logits.dtype)
    (where, length, where_key), (target, out_length, target_key) = matrix(logits), matrix(out)
    pointers, given = row_pointers(rows), (*statistics, *upstream)
    tensors = lie((*pointers, *given))
    launches = Launches(logits.device, choice_of(KERNEL, logits), where_key, target_key, tensors, out is logits)
    launched = launches.worked_out(launch_for, KERNEL, logits, out)
    numbers, sizes = temperature_of(temperature, dtype), (length, out_length, num_rows)
    constants = (launched.launch, triton_dtype(dtype))
    arguments = (where, target, pointers, *given, numbers, *sizes, launched.extent, *constants)
    programs = num_programs(launched, num_rows, logits.device)
    launches(logits_gradient_kernel, programs, arguments, launched.options)
