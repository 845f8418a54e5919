"""Results that must agree bit for bit: run after run, beside other rows, in other layouts, in other calls."""

import pytest
import torch

import egpo_kernels as ek
import egpo_kernels.portable.chunks as portable_chunks
from tests.support import runs
from tests.support.accuracy import assert_alike, assert_bits, assert_rounding
from tests.support.batches import BACKENDS, FAST
from tests.support.case import STRIDES, Case
from tests.support.device import DEVICE
from tests.support.make_case import DTYPES, make_case
from tests.support.rows import assert_same, of_rows, one_pass, picked, rows_of

DTYPES_BUT_DOUBLE = DTYPES[:3]


def by_name(found: dict) -> dict:
    """Loss, gradient and every metric, side by side."""
    return {**{name: value for name, value in found.items() if name != "metrics"}, **found["metrics"]}


def whole(case: Case, backend: str, **options) -> dict:
    """`egpo_loss`: loss, gradient and every metric."""
    return by_name(runs.whole(case, backend, **options))


def of_logits(case: Case, backend: str, **options) -> dict:
    """`logits_policy_loss` with the case's advantages: loss, gradient and every metric."""
    return by_name(runs.alone(case, backend, **options))


CASES = {
    "on-policy": dict(old="none", mask="none"),
    "packed": dict(layout="packed", old="near", temperature="token", garbage=True),
    "sequence ratio": dict(old="near", recipe=ek.recipes.EGPO.replace(ratio="sequence", entropy_coef=0.1)),
    "grpo": dict(old="near", recipe=ek.recipes.GRPO.replace(kl_coef=0.1, dual_clip=3.0), strides="transposed"),
    "per token": dict(old="far", recipe=ek.recipes.EGPO.replace(reduction="none"), layout="packed"),
}


@pytest.mark.parametrize("dtype", DTYPES_BUT_DOUBLE, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs(backend, name, dtype):
    """Loss, gradient and metrics, even where fresh memory holds something else."""
    case = make_case(7, dtype=dtype, **CASES[name])
    first = whole(case, backend)
    fresh = torch.full_like(case.logits, torch.nan)
    del fresh
    assert_same(whole(case, backend), first)


@pytest.mark.parametrize("dtype", DTYPES_BUT_DOUBLE, ids=str)
@pytest.mark.parametrize("vocab", [2, 7, 64, 255, 1025])
@pytest.mark.parametrize("backend", FAST)
def test_row_beside_others(backend, vocab, dtype):
    """Log-prob, entropy and gradient of a row, alone, in another order, or in a smaller batch."""
    logits, tokens, upstream = rows_of(6, vocab, dtype)
    for run in (of_rows, one_pass):
        full = run(logits, tokens, backend, upstream)
        for rows in ([0], [5], [4, 1, 2], [5, 4, 3, 2, 1, 0]):
            assert_same(
                run(logits[rows], tokens[rows], backend, upstream[rows]), picked(full, rows), f"{run.__name__} {rows}"
            )


@pytest.mark.parametrize("backend", FAST)
def test_row_beside_masked_and_broken_ones(backend):
    """A neighbour that is masked, NaN or half -inf changes nothing either."""
    logits, tokens, upstream = rows_of(4, 65, torch.float32)
    full = of_rows(logits, tokens, backend, upstream)
    broken = logits.clone()
    broken[0], broken[1, 5:], tokens[1] = torch.nan, -torch.inf, 3
    mask = torch.tensor([True, True, True, True], device=DEVICE)
    for counts in (True, False):
        mask[0] = counts
        found = of_rows(broken, tokens, backend, upstream, mask=mask)
        assert_same(picked(found, [2, 3]), picked(full, [2, 3]), f"NaN row counted: {counts}")


@pytest.mark.parametrize("dtype", DTYPES_BUT_DOUBLE, ids=str)
@pytest.mark.parametrize("vocab", [33, 64])
def test_chunk_borders(vocab, dtype, monkeypatch):
    """The portable backend's chunks end where they like: chunks of 1, 2, 3 and all rows give the same bits."""
    logits, tokens, upstream = rows_of(7, vocab, dtype)
    expected = [run(logits, tokens, "portable", upstream) for run in (of_rows, one_pass)]
    for size in (1, 2, 3, 6):
        for name in ("CPU_CHUNK_BYTES", "DEVICE_CHUNK_BYTES"):
            monkeypatch.setattr(portable_chunks, name, size * vocab * 4)
        for run, full in zip((of_rows, one_pass), expected, strict=True):
            assert_same(run(logits, tokens, "portable", upstream), full, f"{size} rows a chunk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_of_a_large_vocabulary(dtype):
    """152k: eight rows to a chunk, of which the last is alone in its chunk."""
    logits, tokens, upstream = rows_of(9, 151_936, dtype)
    for run in (of_rows, one_pass):
        full = run(logits, tokens, "portable", upstream)
        for rows in ([8], [0], [7, 8, 1]):
            assert_same(
                run(logits[rows], tokens[rows], "portable", upstream[rows]),
                picked(full, rows),
                f"{run.__name__} {rows}",
            )


@pytest.mark.parametrize("strides", STRIDES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_strides(backend, dtype, strides):
    """Rows that lie elsewhere in memory, aligned differently (another kernel), are the same rows."""
    found, wanted = (
        whole(make_case(3, dtype=dtype, vocab=150, strides=kind), backend) for kind in (strides, STRIDES[0])
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_alike(found[name], value, name)


@pytest.mark.parametrize("name", ["on-policy", "sequence ratio", "grpo"])
@pytest.mark.parametrize("backend", FAST)
def test_packed_is_padded_without_the_padding(backend, name):
    """Leaving positions out that do not count changes neither gradient nor loss."""
    padded = make_case(11, **{"temperature": "token", **CASES[name], "mask": "bool"}).replace(rollout_weights=None)
    keep = padded.counted.view(padded.tokens.shape)
    packed = {
        field: value[keep]
        for field, value in vars(padded).items()
        if isinstance(value, torch.Tensor) and value.shape[:2] == keep.shape
    }
    ends = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    padded = padded.replace(advantages=padded.rewards)
    packed = padded.replace(**{**packed, "advantages": padded.rewards}, cu_seqlens=ends)
    for run in (whole, of_logits):
        found, expected = run(packed, backend), run(padded, backend)
        # A sequence's sum, or a group's, meets its tokens in other lanes.
        assert_alike(found["gradient"], expected["gradient"][keep], "gradient")
        assert not expected["gradient"][~keep].any()
        assert_rounding(found["loss"], expected["loss"])


@pytest.mark.parametrize("old", ["near", "none"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("dtype", DTYPES_BUT_DOUBLE, ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("backend", FAST)
def test_whole_groups_or_micro_batches(backend, layout, dtype, ratio, old):
    """`egpo_loss` gives the logits gradient of `group_advantages` and one `logits_policy_loss` per micro-batch.

    On-policy too, where the uncertainty comes from `token_log_probs` of the same logits.
    """
    recipe = ek.recipes.EGPO.replace(ratio=ratio, entropy_coef=0.05, kl_coef=0.1, nsr_scale=0.5)
    case = make_case(5, group_sizes=(4, 2), layout=layout, dtype=dtype, vocab=40, old=old, recipe=recipe)
    # Another upstream than the expected one multiplies a gradient that was made ahead after it was rounded.
    upstream = torch.ones((), device=DEVICE)
    case = case.replace(num_tokens=int(case.counted.sum()), rollout_weights=None, upstream=upstream)
    together = whole(case, backend)["gradient"]
    mask, log_probs = case.counted.view(case.tokens.shape), case.old_log_probs
    if log_probs is None:
        log_probs = ek.token_log_probs(
            case.logits, case.tokens, mask=mask, temperature=case.temperature, backend=backend
        ).log_probs
    grouped = ek.group_advantages(
        case.groups,
        case.rewards,
        log_probs,
        mask,
        cu_seqlens=case.cu_seqlens,
        entropy_mask=case.entropy_mask,
        correct=case.correct,
        config=recipe.advantage,
        backend=backend,
    )
    case = case.replace(advantages=grouped.advantages)
    parts = [of_logits(case.take(first, last), backend)["gradient"] for first, last in ((0, 1), (1, 4), (4, 6))]
    parts = torch.cat(parts)
    # On-policy the whole batch is read twice, a micro-batch of it in one pass: two kernels.
    one_kernel = old == "near" or ratio == "sequence" or dtype == torch.float16
    (assert_bits if one_kernel else assert_alike)(together[: len(parts)], parts, "gradient")
    assert together.any() and not together[len(parts) :].any()


SHIFTS = [
    # Logits on a grid of `step`, where the shifted ones are representable too: at most 24, 11 or 8 significant bits.
    (torch.float32, 2.0**-10, (1024.0, -1024.0, 8.0, -8.0)),
    (torch.float32, 1.0, (2.0**23, -(2.0**23), 1e6)),
    (torch.float16, 1.0, (1024.0, -1024.0, 100.0)),
    (torch.bfloat16, 1.0, (128.0, -128.0, 64.0)),
    (torch.bfloat16, 256.0, (2.0**15, -(2.0**15))),
    (torch.float64, 1.0, (2.0**52, -(2.0**52))),
]


@pytest.mark.parametrize("dtype, step, shifts", SHIFTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shifted_logits(backend, dtype, step, shifts):
    """Logits far above or below 0 lose nothing: the maximum is subtracted before anything is rounded."""
    case = make_case(9, vocab=50, dtype=dtype, old="none", mask="bool", temperature="float")
    generator = torch.Generator().manual_seed(1)
    grid = torch.randint(0, 60, case.logits.shape, generator=generator).double().to(DEVICE) * step
    recipe = ek.recipes.EGPO.replace(entropy_coef=0.1)
    # Divided by so much the grid spans some nats, whatever its step.
    case = case.replace(logits=grid.to(dtype), recipe=recipe, temperature=12.0 * step)
    expected = whole(case, backend)
    assert expected["gradient"].any()
    for shift in shifts:
        moved = (grid + shift).to(dtype)
        assert (moved.double() == grid + shift).all(), "the test's own shift rounds"
        assert_same(whole(case.replace(logits=moved), backend), expected, f"shifted by {shift}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend, name):
    case = make_case(13, **CASES[name])
    tensors = {field: value for field, value in vars(case).items() if isinstance(value, torch.Tensor)}
    before = {field: (value.clone(), value._version) for field, value in tensors.items()}
    whole(case, backend)
    of_logits(case, backend)
    for field, value in tensors.items():
        assert_bits(value, before[field][0], field)
        assert value._version == before[field][1], field


@pytest.mark.parametrize("run", [whole, of_logits], ids=lambda run: run.__name__)
@pytest.mark.parametrize("name", [name for name in CASES if name != "grpo"])
@pytest.mark.parametrize("backend", FAST)
def test_gradient_in_place_of_the_logits(backend, name, run):
    """The same bits, where the logits were; everything else is left alone."""
    case = make_case(17, dtype=torch.bfloat16, **CASES[name])
    expected = run(case, backend)
    tensors = {field: value for field, value in vars(case).items() if isinstance(value, torch.Tensor)}
    before = {field: value.clone() for field, value in tensors.items()}
    source = case.logits.clone()
    logits = source.requires_grad_() * 1  # as in training: an activation, not a leaf
    logits.retain_grad()
    found = run_on(run, case, logits, backend)
    assert_same(found, {key: expected[key] for key in found})
    assert_bits(logits.detach(), expected["gradient"], "the logits' memory")
    for field in tensors:
        assert_bits(tensors[field], before[field], field)


def run_on(run, case: Case, logits: torch.Tensor, backend: str) -> dict:
    """As `whole` and `of_logits`, on logits that have a history."""
    shared = dict(temperature=case.temperature, backend=backend, inplace_grad=True, **case.loss_arguments())
    shared["support"] = case.support
    if run is whole:
        rest = dict(entropy_mask=case.entropy_mask, correct=case.correct, recipe=case.recipe, mask=case.mask)
        loss, metrics = ek.egpo_loss(logits, case.tokens, case.groups, case.rewards, **shared, **rest)
    else:
        loss, metrics = ek.logits_policy_loss(
            logits, case.tokens, case.advantages, case.mask, config=case.recipe.loss, **shared
        )
    loss.backward(case.upstream.to(loss.dtype))
    return {"loss": loss.detach(), "gradient": logits.grad, **metrics}
