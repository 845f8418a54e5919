"""Memory traffic over the logits, counted in bytes under the interpreter: what SPEC calls e is one pass over [N, V]."""

import pytest
import torch

from benchmarks.counts.traffic import count_traffic
from egpo_kernels import PolicyLossConfig, egpo_loss, logits_policy_loss, recipes, token_log_probs
from tests.support.make_case import PUBLISHED

SEQUENCES, LENGTH, VOCAB = 4, 3, 16512
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def mask():
    counted = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    counted[0, 1] = counted[2, 2] = False
    return counted


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


def make_logits(dtype):
    values = torch.randn(SEQUENCES, LENGTH, VOCAB, generator=torch.Generator().manual_seed(1))
    return values.to(dtype).requires_grad_()


ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -2.0])


def row_bytes(dtype, rows):
    return rows * VOCAB * dtype.itemsize


def assert_read_once(traffic, logits, rows):
    """``rows`` rows were fetched in one launch, all of them whole."""
    seen = traffic.of(logits)
    assert seen.launches == 1
    assert seen.loaded_once == row_bytes(logits.dtype, rows)
    assert len(traffic.rows_loaded(logits.view(-1, VOCAB))) == rows


def assert_written_once(traffic, gradient, live):
    """Every element was stored once, but for the token of each live row, patched after the sweep."""
    seen = traffic.of(gradient)
    assert seen.launches == 1
    assert seen.stored_once == row_bytes(gradient.dtype, SEQUENCES * LENGTH)
    assert seen.stored - seen.stored_once == live * gradient.dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_reads_and_writes_once_in_one_launch(dtype, tokens, mask):
    logits, live = make_logits(dtype), int(mask.sum())
    with count_traffic() as traffic:
        loss, _ = logits_policy_loss(logits, tokens, ADVANTAGES, mask, backend="triton")
        loss.backward()
    assert_read_once(traffic, logits, live)
    assert_written_once(traffic, logits.grad, live)
    assert traffic.of(logits.grad).loaded == 0
    # Two sweeps: the second read is meant to come from cache, and the token's own logit is read by itself.
    assert traffic.of(logits).loaded == 2 * row_bytes(dtype, live) + live * dtype.itemsize


def test_masked_rows_are_not_read(tokens, mask):
    logits = make_logits(torch.bfloat16)
    with count_traffic() as traffic:
        logits_policy_loss(logits, tokens, ADVANTAGES, mask, backend="triton")
    for row in (~mask).nonzero().tolist():
        assert traffic.of(logits[tuple(row)]).loaded == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_needs_no_second_tensor(dtype, tokens, mask):
    logits = make_logits(dtype)
    with count_traffic() as traffic:
        loss, _ = logits_policy_loss(logits, tokens, ADVANTAGES, mask, inplace_grad=True, backend="triton")
        loss.backward()
    assert logits.grad.data_ptr() == logits.data_ptr()
    assert_read_once(traffic, logits, int(mask.sum()))
    assert_written_once(traffic, logits, int(mask.sum()))


@pytest.mark.parametrize("metrics", ["active", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_without_a_coefficient_are_only_zeroed(metrics, inplace, tokens, mask):
    logits = make_logits(torch.bfloat16)
    advantages = torch.tensor([0.0, 1.0, 0.0, -1.0])
    with count_traffic() as traffic:
        logits_policy_loss(logits, tokens, advantages, mask, metrics=metrics, inplace_grad=inplace, backend="triton")
    for sequence in (0, 2):
        seen = traffic.of(logits[sequence])
        assert seen.loaded == 0
        assert seen.stored == (row_bytes(torch.bfloat16, LENGTH) if inplace else 0)


def test_another_upstream_costs_one_pass_over_the_gradient(tokens, mask):
    logits = make_logits(torch.bfloat16)
    loss, _ = logits_policy_loss(logits, tokens, ADVANTAGES, mask, backend="triton")
    with count_traffic() as traffic:
        (loss * 3).backward()
    seen = traffic.of(logits.grad)
    assert seen.loaded == seen.stored == row_bytes(torch.bfloat16, SEQUENCES * LENGTH)
    assert traffic.of(logits).loaded == 0


@pytest.mark.parametrize("scale", [0.25, 65536.0])
def test_the_expected_upstream_costs_nothing(scale, tokens, mask):
    logits = make_logits(torch.float16)
    loss, _ = logits_policy_loss(logits, tokens, ADVANTAGES, mask, grad_scale=scale, backend="triton")
    with count_traffic() as traffic:
        (loss * scale).backward()
    assert traffic.of(logits.grad).loaded == traffic.of(logits.grad).stored == 0


LATE = {
    "sequence": PolicyLossConfig(ratio="sequence"),
    "sequence_token": PolicyLossConfig(ratio="sequence_token"),
    "gmpo": PolicyLossConfig(surrogate="gmpo"),
    "none": PolicyLossConfig(reduction="none"),
}


@pytest.mark.parametrize("name", LATE)
def test_a_late_coefficient_costs_one_more_read(name, tokens, mask):
    logits, live = make_logits(torch.bfloat16), int(mask.sum())
    old = torch.full((SEQUENCES, LENGTH), -8.0)
    with count_traffic() as forward:
        loss, _ = logits_policy_loss(
            logits, tokens, ADVANTAGES, mask, old_log_probs=old, config=LATE[name], backend="triton"
        )
    assert_read_once(forward, logits, live)
    assert forward.of(logits).loaded == row_bytes(torch.bfloat16, live) + live * 2
    with count_traffic() as backward:
        loss.sum().backward()
    flowing = int((logits.grad != 0).any(-1).sum())
    assert 0 < flowing <= live
    assert_read_once(backward, logits, flowing)
    assert_written_once(backward, logits.grad, flowing)


def test_uncertainty_from_the_same_logits_costs_one_more_read(tokens, mask):
    logits, live = make_logits(torch.bfloat16), int(mask.sum())
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    with count_traffic() as traffic:
        loss, _ = egpo_loss(logits, tokens, 4, rewards, mask=mask, backend="triton")
        loss.backward()
    seen = traffic.of(logits)
    assert seen.launches == 2
    assert seen.loaded_once == 2 * row_bytes(torch.bfloat16, live)
    assert_written_once(traffic, logits.grad, live)


def test_without_a_weight_egpo_loss_is_one_pass(tokens, mask):
    logits = make_logits(torch.bfloat16)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    with count_traffic() as traffic:
        egpo_loss(logits, tokens, 4, rewards, mask=mask, recipe=recipes.GRPO, backend="triton")[0].backward()
    assert_read_once(traffic, logits, int(mask.sum()))


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_no_recipe_costs_another_pass(name, off_policy, tokens, mask):
    """Two reads where a ratio is shared or the uncertainty comes from these logits, one everywhere else."""
    recipe, logits, live = PUBLISHED[name], make_logits(torch.bfloat16), int(mask.sum())
    old = torch.full((SEQUENCES, LENGTH), -10.0) if off_policy else None
    config = recipe.advantage
    own = config.weight != "none" and (not off_policy or config.statistic == "shannon")
    reads = 2 if recipe.loss.pools or own else 1
    with count_traffic() as traffic:
        rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        egpo_loss(
            logits, tokens, 4, rewards, mask=mask, old_log_probs=old, recipe=recipe, backend="triton"
        ).loss.backward()
    flowing = int((logits.grad != 0).any(-1).sum())
    seen = traffic.of(logits)
    assert seen.launches == reads and flowing > 0
    assert seen.loaded_once == row_bytes(torch.bfloat16, live + (flowing if reads == 2 else 0))
    assert_written_once(traffic, logits.grad, flowing)


OPTIONS = {
    "per-token advantages": {"advantages": torch.ones(SEQUENCES, LENGTH)},
    "temperature per sequence": {"temperature": torch.full((SEQUENCES,), 0.7)},
    "temperature per token": {"temperature": torch.full((SEQUENCES, LENGTH), 0.7)},
    "rollout weights": {"rollout_weights": torch.full((SEQUENCES, LENGTH), 0.5)},
    "KL times ratio": {"config": PolicyLossConfig(kl_coef=0.1, kl_times_ratio=True, kl_max=10.0)},
    "entropy bonus": {"config": PolicyLossConfig(entropy_coef=0.01)},
    "cispo with a cap": {"config": PolicyLossConfig(surrogate="cispo", ratio_cap=5.0)},
    "sapo, dr_grpo": {
        "config": PolicyLossConfig(surrogate="sapo", reduction="seq_mean_token_sum_norm", norm_length=LENGTH)
    },
    "global counts": {"num_tokens": 100, "num_sequences": torch.tensor(7.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_costs_another_pass(name, tokens, mask):
    logits, live = make_logits(torch.bfloat16), int(mask.sum())
    per_token = {name: torch.full((SEQUENCES, LENGTH), -10.0) for name in ("old_log_probs", "ref_log_probs")}
    given = {"advantages": torch.ones(SEQUENCES), **per_token, **OPTIONS[name]}
    with count_traffic() as traffic:
        logits_policy_loss(logits, tokens, given.pop("advantages"), mask, **given, backend="triton").loss.backward()
    assert_read_once(traffic, logits, live)
    assert_written_once(traffic, logits.grad, int((logits.grad != 0).any(-1).sum()))


@pytest.mark.parametrize("name", ["one pass", *LATE])
def test_a_value_alone_costs_one_read(name, tokens, mask):
    logits, live = make_logits(torch.bfloat16), int(mask.sum())
    config = LATE.get(name, PolicyLossConfig())
    with count_traffic() as traffic, torch.no_grad():
        logits_policy_loss(logits, tokens, ADVANTAGES, mask, config=config, backend="triton")
    assert_read_once(traffic, logits, live)
    assert traffic.of(logits).loaded == row_bytes(torch.bfloat16, live) + live * 2
    assert sum(launch.of(logits).stored for launch in traffic.launches) == 0


def test_log_probs_cost_one_read_and_one_read_and_write(tokens, mask):
    logits, live = make_logits(torch.bfloat16), int(mask.sum())
    with count_traffic() as forward:
        log_probs, entropy = token_log_probs(logits, tokens, mask=mask, return_entropy=True, backend="triton")
    assert_read_once(forward, logits, live)
    with count_traffic() as backward:
        (log_probs.sum() + entropy.sum()).backward()
    assert_read_once(backward, logits, live)
    assert_written_once(backward, logits.grad, live)


def test_strided_rows_are_read_where_they_lie(tokens, mask):
    wide = torch.randn(LENGTH, SEQUENCES, VOCAB + 56, generator=torch.Generator().manual_seed(2))
    wide = wide.to(torch.bfloat16).requires_grad_()
    logits = wide.transpose(0, 1)[..., :VOCAB]
    with count_traffic() as traffic:
        logits_policy_loss(logits, tokens, ADVANTAGES, mask, backend="triton")
    assert traffic.of(logits).loaded_once == row_bytes(torch.bfloat16, int(mask.sum()))
    assert traffic.of(wide).loaded_once == row_bytes(torch.bfloat16, int(mask.sum()))
