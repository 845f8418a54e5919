"""Rows in strips of 16 bytes a thread: every launch constant, every place a row may start at, every one in a strip."""

from unittest import mock

import pytest

pytest.importorskip("triton")

import torch

import egpo_kernels as ek
import egpo_kernels.triton as backend
from benchmarks.counts.traffic import count_traffic
from egpo_kernels.config.results import Rows
from egpo_kernels.triton import launch
from egpo_kernels.triton.launch import Constants, Rule
from tests.support.accuracy import assert_accurate, assert_bits
from tests.support.device import DEVICE, ON_GPU
from tests.support.make_case import DTYPES, make_case
from tests.support.rows import of_rows
from tests.support.runs import advantages, check, whole
from tests.support.terms import group_terms

pytestmark = pytest.mark.gpu

# Blocks of one strip and of several, with and without loads ahead; programs of one warp and of two.
CONSTANTS = [Constants(1, 1, 1, 1, 1), Constants(1, 2, 3, 1, 2), Constants(2, 4, 3, 2, 1)]
EVERY_CONSTANT = pytest.mark.parametrize("constants", CONSTANTS, ids=lambda found: "-".join(map(str, found)))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ONE_PASS = ek.recipes.EGPO.replace(kl_coef=0.1, entropy_coef=0.05)
TWO_PASSES = ek.recipes.EGPO.replace(ratio="sequence", entropy_coef=0.05)
RECIPES = pytest.mark.parametrize("recipe", [ONE_PASS, TWO_PASSES], ids=["one pass", "two passes"])
SMALL = Constants(1, 2, 3, 2, 1)
WIDTHS = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}


def launched_with(constants):
    return mock.patch.object(launch, "TABLE", (Rule("", "", launch.ANY, 0, constants),))


def assert_accuracy(case):
    exact = advantages(case.double(), "reference")
    results = (whole(case, "triton"), whole(case, "reference"), whole(case.double(), "reference"))
    check(case, *results, exact.advantages, group_terms(case.double(), exact))


@RECIPES
@EVERY_DTYPE
@pytest.mark.parametrize("vocab", [7, 8, 264, 1027])
@EVERY_CONSTANT
def test_whatever_the_launch_constants(constants, vocab, dtype, recipe):
    with launched_with(constants):
        case = make_case(3, group_sizes=(2, 1), length=2, vocab=vocab, dtype=dtype, mask="bool", recipe=recipe)
        assert_accuracy(case.replace(rollout_weights=None))


def rows_on_policy(number):
    """Rows whose loss is the log-prob of their token, on-policy, with some entropy."""
    ones = torch.ones(number, device=DEVICE)
    tokens = torch.zeros(number, dtype=torch.long, device=DEVICE)
    return Rows(ones.bool(), tokens, None, -ones, ones, None, None, None)


CONFIG = ek.PolicyLossConfig(reduction="sum", entropy_coef=0.1)


def every_result(logits, token, out):
    """Statistics and both gradients of one row ``[1, 1, V]``, written to ``out`` one after the other."""
    rows = rows_on_policy(1)
    rows = rows._replace(tokens=rows.tokens + token)
    log_probs, entropy, maximum, sum_exp = backend.row_statistics(logits, rows, 0.7, True)
    found = [log_probs, entropy, maximum, sum_exp]
    backend.logits_gradient(logits, rows, [maximum, sum_exp, entropy], [log_probs, entropy], 0.7, out)
    found.append(out.clone())
    found += backend.logits_loss_gradient(logits, rows, CONFIG, 0.7, 1.0, True, out)
    return [*found, out.clone()]


def placed(row, start, fill=torch.nan):
    """The row ``start`` elements into memory that begins and ends with something else."""
    memory = torch.full((row.numel() + 64,), fill, dtype=row.dtype, device=DEVICE)
    memory[16 + start : 16 + start + row.numel()] = row
    return memory, memory[16 + start : 16 + start + row.numel()].view(1, 1, -1)


@pytest.mark.parametrize("vocab", [1, 5, 15, 17, 259, 1031])
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_a_row_has_the_same_bits_wherever_it_starts(dtype, vocab):
    """Also where its gradient lies otherwise in its 16 bytes, and over the logits; nothing beside it is touched."""
    row = (4 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype).to(DEVICE)
    with launched_with(SMALL):
        for token in {0, vocab // 2, vocab - 1}:
            wanted = None
            for start in range(WIDTHS[dtype]):
                for out_start in {start, 0, 1}:
                    memory, logits = placed(row, start)
                    target, out = placed(row, out_start, 7.0)
                    found = every_result(logits, token, out)
                    wanted = wanted or found
                    for place, (mine, first) in enumerate(zip(found, wanted, strict=True)):
                        assert_bits(mine, first, f"result {place}, row at {start}, gradient at {out_start}")
                    outside = torch.cat([target[: 16 + out_start], target[16 + out_start + vocab :]])
                    assert (outside == 7).all()
                rows = rows_on_policy(1)
                rows = rows._replace(tokens=rows.tokens + token)
                backend.logits_loss_gradient(logits, rows, CONFIG, 0.7, 1.0, True, logits)
                assert_bits(logits, wanted[-1], f"in place, row at {start}")
                assert memory[: 16 + start].isnan().all() and memory[16 + start + vocab :].isnan().all()


@pytest.mark.parametrize("offset", [0, 1])
@EVERY_DTYPE
def test_a_row_of_whole_accesses_has_the_same_bits_among_rows_that_are_not_aligned(dtype, offset):
    """Rows of a slice of wider logits: the first may be aligned by itself, and must not be taken another way alone."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(1, 9, 513, generator=generator).to(dtype).to(DEVICE)
    logits = wide[..., offset : offset + 512]
    rows = rows_on_policy(9)
    with launched_with(SMALL):
        together = backend.row_statistics(logits, rows, 0.7, True)
        for row in range(9):
            alone = backend.row_statistics(logits[:, row : row + 1], rows_on_policy(1), 0.7, True)
            for mine, all_of_them in zip(alone, together, strict=True):
                assert_bits(mine, all_of_them[row : row + 1], f"row {row}")
        for kernel in ("row_statistics_kernel", "logits_policy_loss_kernel"):
            ways = {launch.launch_for(kernel, logits[:, row : row + 1]).launch.odd for row in range(9)}
            assert len(ways) == 1


def test_a_small_entropy_keeps_its_digits():
    """All but one logit far below: an odd row's sums are in units of their own size."""
    tokens, upstream = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.ones(1, device=DEVICE)
    for vocab in (32_000, 32_003):
        logits = torch.full((1, vocab), -36.0, device=DEVICE)
        logits[0, 5] = 0.0
        given = (logits, logits, logits.double())
        ways = zip(given, ("triton", "reference", "reference"), strict=True)
        found, plain, exact = (of_rows(one, tokens, way, upstream.to(one.dtype))["entropy"] for one, way in ways)
        assert_accurate(found, plain, exact, exact, f"V {vocab}")


@pytest.mark.skipif(ON_GPU, reason="counts in the interpreter")
@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("vocab", [1, 9, 1031])
def test_nothing_outside_a_row_is_read_and_little_twice(vocab, start):
    memory, logits = placed(torch.zeros(vocab, dtype=torch.bfloat16), start)
    with launched_with(SMALL), count_traffic() as traffic:
        backend.row_statistics(logits, rows_on_policy(1), 1.0, True)
    assert traffic.of(memory[: 16 + start]).loaded == traffic.of(memory[16 + start + vocab :]).loaded == 0
    seen = traffic.of(logits)
    assert seen.loaded_once == 2 * vocab
    # An access of each strip, two behind the last, and the token's own logit.
    strips = -(-vocab // (32 * 8))
    assert seen.loaded - seen.loaded_once <= 2 * (8 * strips + 16 + 1)


def places(vocab, width):
    """Every kind of place in an odd row: edges, both ends of strips and blocks, inside."""
    strip = 32 * width
    found = {0, 1, width - 1, width, width + 1, strip - 1, strip, strip + width - 1, strip + width, 2 * strip - 1}
    found |= {2 * strip, 2 * strip + width, vocab - 2 * width, vocab - width - 1, vocab - width, vocab - 2, vocab - 1}
    return sorted(place for place in found if 0 <= place < vocab)


@pytest.mark.parametrize("shift", [0, 1], ids=["even", "odd"])
@pytest.mark.parametrize("top", [3e38, 1e30, 60.0, -1e30, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_maximum_of_any_size_at_every_place(dtype, top, shift):
    """A row's maximum there, all else far below or -inf: its token has probability 1, all others 0."""
    vocab, width = 5 * 32 * WIDTHS[dtype] + 3 * WIDTHS[dtype] + shift, WIDTHS[dtype]
    where = places(vocab, width)
    rows = rows_on_policy(len(where))._replace(tokens=torch.tensor(where, device=DEVICE))
    for below in (-torch.inf, -3.3e38):
        logits = torch.full((1, len(where), vocab), below, dtype=dtype, device=DEVICE)
        logits[0, torch.arange(len(where)), where] = top
        sure = logits.double().softmax(-1)[0, torch.arange(len(where)), where] == 1
        assert sure.all()
        with launched_with(SMALL):
            log_probs, entropy, maximum, sum_exp = backend.row_statistics(logits, rows, 1.0, True)
            out = torch.full_like(logits, torch.nan)
            found = backend.logits_loss_gradient(logits, rows, CONFIG, 1.0, 1.0, True, out)
        assert (log_probs == 0).all() and (entropy == 0).all() and (sum_exp == 1).all()
        assert (maximum == torch.tensor(top, dtype=dtype, device=DEVICE).float()).all()
        assert (found[0] == 0).all() and (found[1] == 0).all() and (out == 0).all()


@pytest.mark.parametrize("shift", [0, 1], ids=["even", "odd"])
@EVERY_DTYPE
def test_nothing_but_minus_infinity_at_every_place_of_a_strip(dtype, shift):
    """A run of -inf as long as an access, a strip or a block, from every kind of place: the accuracy rule."""
    width = WIDTHS.get(dtype, 2)
    vocab = 5 * 32 * width + 3 * width + shift
    runs = [(place, length) for place in places(vocab, width) for length in (1, width, 32 * width, 64 * width)]
    generator = torch.Generator().manual_seed(5)
    logits = (3 * torch.randn(len(runs), vocab, generator=generator)).to(dtype)
    for row, (place, length) in enumerate(runs):
        logits[row, place : place + length] = -torch.inf
    logits, tokens = logits.to(DEVICE), logits.float().argmax(-1).to(DEVICE)
    upstream = torch.ones(len(runs), dtype=torch.float32 if dtype != torch.float64 else dtype, device=DEVICE)
    with launched_with(SMALL):
        found = of_rows(logits, tokens, "triton", upstream)
    plain = of_rows(logits, tokens, "reference", upstream)
    exact = of_rows(logits.double(), tokens, "reference", upstream.double())
    log_p = logits.double().log_softmax(-1)
    p, size = log_p.exp(), log_p.abs().nan_to_num(0.0, 0.0)
    terms = {"log_probs": exact["log_probs"].abs() + 1, "entropy": (p * size * (1 + size)).sum(-1) + 1}
    terms["gradient"] = p * (2 + size) + 0.3 * p * (size + exact["entropy"][:, None] + 1) * (2 + size)
    terms["gradient"].scatter_add_(1, tokens[:, None], torch.ones_like(p[:, :1]))
    for name, value in found.items():
        assert_accurate(value, plain[name], exact[name], terms[name], name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocab", [2 * 256 + 16, 2 * 256 + 19])
def test_what_is_not_finite_is_seen_at_every_place(vocab, value):
    where = places(vocab, 8)
    logits = torch.zeros(1, len(where), vocab, dtype=torch.bfloat16, device=DEVICE)
    logits[0, torch.arange(len(where)), where] = value
    with launched_with(SMALL):
        log_probs, entropy, _, sum_exp = backend.row_statistics(logits, rows_on_policy(len(where)), 1.0, True)
    assert sum_exp.isnan().all() and log_probs.isnan().all() and entropy.isnan().all()


def test_constants_follow_from_kernel_gpu_vocabulary_and_dtype_alone():
    for kernel in ("row_statistics_kernel", "logits_gradient_kernel", "logits_policy_loss_kernel"):
        for dtype in DTYPES:
            for vocab in (5, 1031, 151_936):
                logits = torch.empty(1, 1, vocab, dtype=dtype, device=DEVICE)
                alone = launch.launch_for(kernel, logits, logits)
                many = logits.expand(3, 5, vocab)
                assert launch.launch_for(kernel, many, many) == alone
