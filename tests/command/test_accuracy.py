"""The accuracy rule itself: what it allows, what it does not, and what it says."""

import math

import pytest
import torch

from egpo_kernels.command.accuracy import half_ulp, judge

EXACT = torch.tensor([1.0, -2.0, 1e-3], dtype=torch.float64)
PLAIN = EXACT.float()
EPS = torch.finfo(torch.float32).eps


def off(number, by):
    found = PLAIN.clone()
    found[number] += by
    return found


def test_what_is_allowed_is_the_sum_of_three_parts():
    reference = off(2, 3e-6)
    error = float((reference.double() - EXACT).abs().max())
    allowed = 1.5 * error + 4 * EPS * 2.0 + EPS / 2
    found = judge(off(0, 0.9 * allowed), reference, EXACT, 2.0)
    assert not found.wrong and found.allowed == pytest.approx(allowed) and 0.8 < found.share < 1
    assert judge(off(0, 1.1 * allowed), reference, EXACT, 2.0).wrong


def test_a_small_element_is_not_excused_by_a_large_one():
    exact = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    terms = exact.abs()
    wrong = exact.float() + torch.tensor([0.0, 4e-7])
    assert judge(wrong, exact.float(), exact, terms).wrong.startswith("1 of 2 too far off")
    assert not judge(exact.float() + torch.tensor([4e-7, 0.0]), exact.float(), exact, terms).wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_wrong_where_a_number_is_wanted_and_right_where_it_is(value):
    found = judge(off(1, value), PLAIN, EXACT, 0.0)
    assert "at (1,)" in found.wrong and "instead of -2.0" in found.wrong
    wanted = EXACT.clone()
    wanted[1] = value
    assert not judge(wanted.float(), PLAIN, wanted, 0.0).wrong
    assert "1 of 3 are wrong" in judge(PLAIN, PLAIN, wanted, 0.0).wrong


def test_a_lost_reference_excuses_nobody():
    assert judge(off(0, 1e-3), off(0, math.nan), EXACT, 0.0).wrong


def test_shape_and_dtype_are_the_references():
    assert "shape [2]" in judge(PLAIN[:2], PLAIN, EXACT, 0.0).wrong
    assert "torch.float16" in judge(PLAIN.half(), PLAIN, EXACT, 0.0).wrong


def test_nothing_is_not_wrong():
    assert judge(PLAIN[:0], PLAIN[:0], EXACT[:0], 0.0) == (0.0, 0.0, "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_a_unit_in_the_last_place(dtype):
    values = torch.tensor([1.0, 1.5, 1024.0, 0.0], dtype=dtype)
    above = torch.nextafter(values, torch.full_like(values, math.inf)) if dtype == torch.float32 else None
    found = half_ulp(values.double(), dtype)
    eps, info = torch.finfo(dtype).eps, torch.finfo(dtype)
    assert found.tolist() == [eps / 2, eps / 2, 512 * eps, info.smallest_normal * eps / 2]
    if above is not None:
        assert ((above.double() - values.double()) / 2)[:3].equal(found[:3])
