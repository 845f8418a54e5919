"""Assertions about numbers: the accuracy rule (`egpo_kernels.command.accuracy`), rounding alone, the same bits.

The sizes of the terms that the rule asks for are in `tests.support.terms`.
"""

import torch
from torch import Tensor

from egpo_kernels.command.accuracy import first_of, judge
from tests.support.device import ON_GPU

SHARES = ("clip_low/mean", "clip_high/mean", "at_lower/mean", "at_one/mean", "at_upper/mean")
"""Ends of the keys of shares: whole numbers once multiplied by their total, and compared as such."""


def assert_accurate(actual: Tensor, reference: Tensor, exact: Tensor, terms: Tensor | float, name: str) -> None:
    """Hold `actual` to the rule; `reference` has the same dtype, `exact` and `terms` broadcast in float64."""
    assert exact.dtype == torch.float64, f"{name}: exact is {exact.dtype}"
    wrong = judge(actual, reference, exact, terms).wrong
    assert not wrong, f"{name}: {wrong}"


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
    assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} differ, {first_of(actual, expected, ~same)}"


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
