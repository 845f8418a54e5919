"""Forward only: log-prob, entropy, maximum and sum of exponentials of each row, in one read of the logits."""

import triton
import triton.language as tl
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.triton.arithmetic import LOG2_E
from egpo_kernels.triton.launch import choice_of, launch_for
from egpo_kernels.triton.launcher import Launches, lie
from egpo_kernels.triton.settings import read_temperature, row_pointers, temperature_of, triton_dtype
from egpo_kernels.triton.softmax import (
    load_token,
    matrix,
    row_inverse_temperature,
    row_pointer,
    sweep_statistics,
    token_statistics,
)

KERNEL = "row_statistics_kernel"


@triton.jit(do_not_specialize=["length"])
def row_statistics_kernel(
    logits, rows, log_probs_ptr, entropy_ptr, maximum_ptr, sum_exp_ptr, numbers, length, extent,
    launch: tl.constexpr, DTYPE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One program a row; rows outside the mask are not read and get 0."""
    row = tl.program_id(0)
    if tl.load(rows.mask_ptr + row) == 0:
        tl.store(log_probs_ptr + row, 0.0)
        if maximum_ptr is not None:
            tl.store(maximum_ptr + row, 0.0)
            tl.store(sum_exp_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        return
    row_ptr = row_pointer(logits, row, length, launch.aligned)
    inverse_temperature = row_inverse_temperature(rows, row, read_temperature(numbers, DTYPE))
    _, logit = load_token(rows, row, row_ptr, extent.vocab, True, DTYPE)
    found = sweep_statistics(row_ptr, extent, LOG2_E * inverse_temperature, launch, DTYPE, ENTROPY)
    log_prob, entropy = token_statistics(found, logit, inverse_temperature)
    tl.store(log_probs_ptr + row, log_prob)
    if maximum_ptr is not None:
        tl.store(maximum_ptr + row, found.maximum)
        tl.store(sum_exp_ptr + row, found.sum_exp)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)


def row_statistics(
    logits: Tensor, rows: Rows, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy (``[0]`` unless wanted), maximum and sum of exponentials ``[N]``; 0 outside the mask."""
    log_probs, entropy, maximum, sum_exp = _launched(logits, rows, temperature, want_entropy, True)
    assert log_probs is not None and maximum is not None and sum_exp is not None
    return log_probs, log_probs.new_empty(0) if entropy is None else entropy, maximum, sum_exp


def token_scores(logits: Tensor, rows: Rows, temperature: float, want_entropy: bool) -> list[Tensor]:
    """Log-prob and, if wanted, entropy ``[N]``; 0 outside the mask."""
    found = _launched(logits, rows, temperature, want_entropy, False)
    return [values for values in found if values is not None]


def _launched(
    logits: Tensor, rows: Rows, temperature: float, want_entropy: bool, saves: bool
) -> tuple[Tensor | None, ...]:
    """Log-prob, entropy, maximum and sum; the last two, which a backward pass needs, where it ``saves`` them."""
    num_rows, dtype = rows.mask.numel(), compute_dtype(logits.dtype)
    wanted = (True, want_entropy, saves, saves)
    results = tuple([logits.new_empty(num_rows, dtype=dtype) if each else None for each in wanted])
    if num_rows == 0:
        return results
    pointers, (where, length, key) = row_pointers(rows), matrix(logits)
    launches = Launches(logits.device, choice_of(KERNEL, logits), key, lie(pointers), wanted)
    launched = launches.worked_out(launch_for, KERNEL, logits)
    numbers = temperature_of(temperature, dtype)
    constants = (launched.launch, triton_dtype(dtype), want_entropy)
    arguments = (where, pointers, *results, numbers, length, launched.extent, *constants)
    launches(row_statistics_kernel, num_rows, arguments, launched.options)
    return results
