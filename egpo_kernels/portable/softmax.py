"""A chunk of rows: exponentials, statistics, and the gradient of the logits.

With ``x = (z - max z) / temperature``, ``s = sum e^x``, ``p = e^x / s``, upstream ``a = dL/dl`` and ``c = dL/dEnt``:
``Ent = log s - sum p x`` and ``dz = (a onehot - (a + c (Ent - log s)) p - c p x) / temperature``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.portable.chunks import Chunk


class Sums(NamedTuple):
    """Of rows ``[N]``: maximum, ``sum e^x`` and, where an entropy is wanted, ``sum x e^x``."""

    maximum: Tensor
    sum_exp: Tensor
    sum_x: Tensor | None

    @classmethod
    def nothing(cls, count: int, logits: Tensor, want_entropy: bool) -> "Sums":
        """Zeros, to be filled by `exponentials`."""
        dtype = compute_dtype(logits.dtype)
        made = [logits.new_zeros(count, dtype=dtype) for _ in range(2 + want_entropy)]
        return cls(made[0], made[1], made[2] if want_entropy else None)


class Slopes(NamedTuple):
    """What a row's gradient is made of, ``[N]`` each: of its token, of p, of p x (None: no part), and where there is
    one at all.
    """

    own: Tensor
    level: Tensor
    tilt: Tensor | None
    live: Tensor

    def at(self, place: slice) -> "Slopes":
        """Those of some rows, as views."""
        tilt = None if self.tilt is None else self.tilt[place]
        return Slopes(self.own[place], self.level[place], tilt, self.live[place])


def own_logits(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Token ids ``[N]`` that may be used as indices, and the tokens' logits ``[N]``, NaN where an id is none."""
    assert rows.tokens is not None
    column = rows.tokens.clamp(0, logits.shape[-1] - 1)
    own = logits.gather(-1, column.view(*logits.shape[:2], 1)).view(-1).to(compute_dtype(logits.dtype))
    return column, torch.where(column == rows.tokens, own, torch.nan)


def heats(rows: Rows, temperature: float) -> Tensor | float:
    """The temperature of all rows, or of each ``[N]``, NaN where it is none."""
    return temperature if rows.temperature is None else torch.where(rows.temperature > 0, rows.temperature, torch.nan)


def exponentials(chunk: Chunk, heat: Tensor | float, sums: Sums) -> None:
    """Fill ``chunk.power`` with e^x, with an entropy ``chunk.x`` with x e^x, and the chunk's place in ``sums``.

    Not torch.softmax: it goes over a row more often, and adds up a large vocabulary carelessly.
    """
    # What nobody reads again is written over: it is in cache.
    x = chunk.power if sums.sum_x is None else chunk.x
    logits, maximum = _widened(chunk.logits, x), sums.maximum[chunk.place]
    torch.amax(logits, -1, out=maximum)
    torch.exp(_exponents(logits, maximum, heat, x), out=chunk.power)
    _row_sums(chunk.power, sums.sum_exp[chunk.place])
    if sums.sum_x is not None:
        _sum_of_exponents(chunk, sums.sum_x[chunk.place])


def exponentials_again(chunk: Chunk, heat: Tensor | float, maximum: Tensor, weighted: bool) -> None:
    """Fill ``chunk.power`` and, if asked for, ``chunk.x`` as `exponentials` did, which found this ``maximum [R]``."""
    x = chunk.x if weighted else chunk.power
    torch.exp(_exponents(_widened(chunk.logits, x), maximum, heat, x), out=chunk.power)
    if weighted:
        x.mul_(chunk.power).nan_to_num_(0.0)  # 0 * -inf


def _widened(logits: Tensor, memory: Tensor) -> Tensor:
    """Logits in the dtype of ``memory``, which is where they are put unless they have it."""
    return logits if logits.dtype == memory.dtype else memory.copy_(logits)


def _exponents(logits: Tensor, maximum: Tensor, heat: Tensor | float, out: Tensor) -> Tensor:
    torch.sub(logits, maximum[:, None], out=out)
    if isinstance(heat, Tensor) or heat != 1:
        out.div_(heat[:, None] if isinstance(heat, Tensor) else heat)
    return out


def read_off(own: Tensor, heat: Tensor | float, sums: Sums) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy of rows ``[N]``, from their tokens' logits, their temperatures and their sums."""
    maximum, sum_exp, sum_x = sums
    log_sum = sum_exp.log()
    log_probs = torch.where(own == -torch.inf, -torch.inf, (own - maximum) / heat - log_sum)
    entropy = None if sum_x is None else torch.where(maximum == -torch.inf, 0.0, log_sum - sum_x / sum_exp)
    return log_probs, entropy


def _row_sums(matrix: Tensor, out: Tensor) -> None:
    # A sum over one row alone is split over threads and rounds differently: never sum fewer than two.
    if matrix.shape[0] == 1:
        out.copy_(matrix.expand(2, -1).sum(-1)[:1])
    else:
        torch.sum(matrix, -1, out=out)


def _sum_of_exponents(chunk: Chunk, out: Tensor) -> None:
    """Turn ``chunk.x`` from x into x e^x and fill ``out`` with its row sums."""
    _row_sums(chunk.x.mul_(chunk.power), out)
    # 0 * -inf is NaN where a probability is 0; looking for it is free on a CPU. A row that is NaN stays so by its sum.
    if chunk.x.device.type != "cpu" or out.isnan().any():
        _row_sums(chunk.x.nan_to_num_(0.0), out)


def slopes(
    own: Tensor,
    sum_exp: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    heat: Tensor | float,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
) -> Slopes:
    """What gradients of rows ``[N]`` are made of, from their tokens' ``own`` logits and what is known of them.

    Rows with nothing upstream, or whose token cannot be, have none.
    """
    live = mask & (grad_log_probs != 0)
    slope, tilt = grad_log_probs / heat, None
    level = -slope
    # A token that is in none of these columns has none of them to itself.
    slope = torch.where(own.isnan(), 0.0, slope)
    if grad_entropy is not None and entropy is not None:
        live = live | (mask & (grad_entropy != 0))
        tilt = -grad_entropy / heat
        level = level + tilt * (entropy - sum_exp.log())
        tilt = tilt / sum_exp
    return Slopes(slope, level / sum_exp, tilt, live & (own != -torch.inf))


def write_gradient(chunk: Chunk, column: Tensor, slope: Slopes) -> None:
    """Turn ``chunk.power`` into dz and write it to ``chunk.out``; rows that are not live get exact zeros."""
    gradient = chunk.out if chunk.out.dtype == chunk.power.dtype and slope.tilt is None else chunk.power
    torch.mul(chunk.power, slope.level[:, None], out=gradient)
    if slope.tilt is not None:
        gradient.addcmul_(chunk.x, slope.tilt[:, None])
    gradient.scatter_add_(-1, column[:, None], slope.own[:, None])
    if gradient is not chunk.out:
        chunk.out.copy_(gradient)
    if chunk.out.device.type != "cpu":
        chunk.out.masked_fill_(~slope.live[:, None], 0)
    elif not slope.live.numpy().all():
        chunk.out.index_fill_(0, (~slope.live).nonzero()[:, 0], 0)
