"""The one accuracy rule, for `egpo-kernels check` and for the tests.

    error <= 1.5 x largest error of `reference` in the same dtype + 4 eps x sum |terms| + 1/2 unit in the last place

Errors are distances from the same numbers computed in float64; for 16-bit logits that means the rounded logits,
upcast. The three parts answer three questions. What does the plainest code get? What must any float32 code lose? What
does the output's dtype lose, whatever was computed? Nothing here is tuned: eps is the compute dtype's, and the terms
follow from the formulas. The last two parts hold element by element, so that a small element is not excused by a large
one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.settings import compute_dtype


class Judgement(NamedTuple):
    """What the rule says of one result: error and limit of its worst element, and what is wrong, empty if nothing."""

    error: float
    allowed: float
    wrong: str

    @property
    def share(self) -> float:
        """Error as a share of what is allowed; infinite where there is no such number."""
        return self.error / self.allowed if self.allowed else torch.inf if self.error else 0.0


def judge(actual: Tensor, reference: Tensor, exact: Tensor, terms: Tensor | float) -> Judgement:
    """Hold ``actual`` to the rule.

    Args:
        actual: The result, of any shape and floating dtype.
        reference: What `reference` computes from the same inputs, of the same shape and dtype.
        exact: What it computes from them in float64, float64.
        terms: Sizes of the terms that each element is the sum of, in float64; broadcast.
    """
    if not actual.shape == reference.shape == exact.shape:
        return unfit(f"shape {list(actual.shape)} where reference has {list(reference.shape)}")
    if actual.dtype != reference.dtype:
        return unfit(f"{actual.dtype} where reference has {reference.dtype}")
    got, plain, want = (tensor.detach().double() for tensor in (actual, reference, exact))
    special = want.to(actual.dtype).double()
    finite = want.isfinite() & special.isfinite()
    other = ~((got == special) | (got.isnan() & special.isnan()) | finite)
    if other.any():
        return unfit(f"{int(other.sum())} of {got.numel()} are wrong; {first_of(got, special, other)}")
    if not finite.any():
        return Judgement(0.0, 0.0, "")
    error = torch.where(finite, (got - want).abs(), 0.0)
    # Where reference itself is lost it excuses nobody.
    plain_error = torch.where(finite & plain.isfinite(), (plain - want).abs(), 0.0).max()
    eps = torch.finfo(compute_dtype(actual.dtype)).eps
    limit = 1.5 * plain_error + 4 * eps * terms + half_ulp(want, actual.dtype)
    excess = (error / limit).nan_to_num(torch.inf)
    worst = int(torch.where(finite, excess, -1.0).argmax())
    wrong = finite & ~(error <= limit)
    at_worst = (float(error.flatten()[worst]), float(limit.expand_as(error).flatten()[worst]))
    if not wrong.any():
        return Judgement(*at_worst, "")
    why = (
        f"{int(wrong.sum())} of {got.numel()} too far off, {float(excess[wrong].max()):.3g} times what is allowed; "
        f"largest error {float(error.max()):.3g}, of reference {float(plain_error):.3g}; {first_of(got, want, wrong)}"
    )
    return Judgement(*at_worst, why)


def unfit(why: str) -> Judgement:
    """What cannot be measured against the rule, and so is wrong."""
    return Judgement(torch.nan, torch.nan, why)


def first_of(got: Tensor, want: Tensor, wrong: Tensor) -> str:
    """The first element that is wrong, in words."""
    place = tuple(wrong.nonzero()[0].tolist())
    return f"at {place} {got[place].item()!r} instead of {want[place].item()!r}"


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of ``dtype`` at the size of the float64 ``values``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(torch.where(values.isfinite(), values, 0.0))
    spacing = torch.where(values == 0, 0.0, torch.ldexp(torch.full_like(values, info.eps), exponent - 1))
    return spacing.clamp(min=info.smallest_normal * info.eps) / 2
