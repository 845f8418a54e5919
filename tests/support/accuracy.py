"""The one accuracy rule; the sizes of the terms it is measured in are in `tests.support.terms`.

    error <= 1.5 x largest error of `reference` in the same dtype + 4 eps x sum |terms| + 1/2 unit in the last place

Errors are distances from the same numbers computed in float64; for 16-bit logits that means the rounded logits,
upcast. The three parts answer three questions. What does the plainest code get? What must any float32 code lose? What
does the output's dtype lose, whatever was computed? Nothing here is tuned: eps is the compute dtype's, and `terms`
follow from the formulas. The last two parts hold element by element, so that a small element is not excused by a large
one.
"""

import torch
from torch import Tensor

from tests.support.device import ON_GPU

SHARES = ("clip_low/mean", "clip_high/mean", "at_lower/mean", "at_one/mean", "at_upper/mean")
"""Ends of the keys of shares: whole numbers once multiplied by their total, and compared as such."""


def assert_accurate(actual: Tensor, reference: Tensor, exact: Tensor, terms: Tensor | float, name: str) -> None:
    """Hold `actual` to the rule; `reference` has the same dtype, `exact` and `terms` broadcast in float64."""
    assert actual.shape == reference.shape == exact.shape, f"{name}: {actual.shape}, {reference.shape}, {exact.shape}"
    assert actual.dtype == reference.dtype, f"{name}: {actual.dtype} where reference has {reference.dtype}"
    assert exact.dtype == torch.float64, f"{name}: exact is {exact.dtype}"
    eps = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    got, plain, want = (tensor.detach().double() for tensor in (actual, reference, exact))
    finite = want.isfinite() & want.to(actual.dtype).isfinite()
    special = want.to(actual.dtype).double()
    same = (got == special) | (got.isnan() & special.isnan())
    assert (same | finite).all(), f"{name}: {_first(got, special, ~(same | finite))}"
    if not finite.any():
        return
    error = torch.where(finite, (got - want).abs(), 0.0)
    # Where reference itself is lost it excuses nobody.
    reference_error = torch.where(finite & plain.isfinite(), (plain - want).abs(), 0.0)
    limit = 1.5 * reference_error.max() + 4 * eps * terms + half_ulp(want, actual.dtype)
    wrong = finite & ~(error <= limit)
    if wrong.any():
        worst = (error / limit).nan_to_num(torch.inf)[wrong].max()
        largest = reference_error.max()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {got.numel()} too far off, {float(worst):.3g} times what is allowed; "
            f"largest error {float(error.max()):.3g}, of reference {float(largest):.3g}; {_first(got, want, wrong)}"
        )


def _first(got: Tensor, want: Tensor, wrong: Tensor) -> str:
    place = tuple(wrong.nonzero()[0].tolist())
    return f"at {place} {got[place].item()!r} instead of {want[place].item()!r}"


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `dtype` at the size of the float64 `values`."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(torch.where(values.isfinite(), values, 0.0))
    spacing = torch.ldexp(torch.full_like(values, info.eps), exponent - 1)
    return spacing.clamp(min=info.smallest_normal * info.eps) / 2


def assert_rounding(actual: Tensor, expected: Tensor) -> None:
    """Two computations of the same numbers by different ways, in one dtype: they differ by rounding only.

    One bound for all such tests: each way may lose 16 eps of the largest number.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    eps = torch.finfo(actual.dtype).eps
    largest = expected.detach().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=32 * eps * largest, equal_nan=True)


def assert_bits(actual: Tensor, expected: Tensor, name: str) -> None:
    """The same bits; NaN equals NaN, and 0 equals -0."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: {actual.shape}, {actual.dtype}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} differ, {_first(actual, expected, ~same)}"


def assert_alike(actual: Tensor, expected: Tensor, name: str) -> None:
    """The same numbers by different kernels, which the interpreter rounds alike and a GPU's compiler as it likes."""
    if ON_GPU:
        assert_rounding(actual, expected)
    else:
        assert_bits(actual, expected, name)


def assert_metrics(
    actual: dict, reference: dict, exact: dict, terms: dict, renormalised: bool = False, unsigned: int = 0
) -> None:
    """Every metric under the rule, whole numbers exactly, and the same keys.

    After renormalisation a weight is on a bound only by the accident of a rounding, so those shares are not compared.
    As many tokens as are ``unsigned`` have an advantage whose sign is a rounding's, and may be clipped or not.
    """
    assert actual.keys() == reference.keys() == exact.keys()
    for key, value in actual.items():
        assert value.dim() == 0 and not value.requires_grad, key
        if key.endswith(SHARES):
            total = "policy/tokens/sum" if key.startswith("policy/") else "egpo/sequences/sum"
            counts = [(found[key].double() * found[total].double()).round() for found in (actual, exact)]
            if key.startswith("policy/clip_") and unsigned:
                assert (counts[0] - counts[1]).abs() <= unsigned, key
            elif not (renormalised and "/at_" in key):
                assert_bits(*counts, key)
        elif key in terms:
            assert_accurate(value, reference[key], exact[key], terms[key], key)
        else:
            assert_bits(value.double(), exact[key], key)
