"""What `egpo-kernels check` is run on: every option, bounds that some tokens pass, every kind of group."""

import dataclasses
import math

import pytest
import torch

from egpo_kernels.command import checks, terms, variants
from egpo_kernels.command.batches import KL_STEPS
from egpo_kernels.command.scores import GROUPS, make_groups, make_scores
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Recipe
from egpo_kernels.formulas.advantages import collapse_tolerance, is_collapsed
from egpo_kernels.formulas.advantages import make_groups as sorted_groups

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")
SCORES = [make_scores(CPU, packed) for packed in (False, True)]
SMALL = checks.problems_of_logits(CPU, True)


@pytest.fixture(scope="module")
def problems():
    return checks.problems_of_logits(CPU, False)


def sequences(batch):
    """Of each row its sequence."""
    if batch.cu_seqlens is None:
        return torch.arange(batch.mask.shape[0])[:, None].expand_as(batch.mask).flatten()
    return torch.repeat_interleave(torch.arange(batch.rewards.shape[0]), batch.cu_seqlens.diff())


def counted(problem):
    """Log-ratios of tokens that have one, their advantages, their sequences."""
    batch, number = problem.exact, sequences(problem.exact)
    log_ratio = (batch.log_probs - batch.old_log_probs).flatten()
    live = batch.mask.flatten() & batch.log_probs.flatten().isfinite()
    return log_ratio[live], batch.advantages.flatten()[number][live], number[live]


def means(problem):
    """Log-ratios of sequences, as GSPO pools them: an impossible token counts with 0."""
    log_ratio, _, number = counted(problem)
    lengths = torch.bincount(sequences(problem.exact), problem.exact.mask.flatten().double())
    pooled = torch.bincount(number, log_ratio, minlength=lengths.shape[0])
    return (pooled / lengths)[lengths > 0]


# Options.


def test_all_dtypes_layouts_and_vocabularies_are_walked(problems):
    given = [problem.given for problem in problems]
    assert {one.logits.dtype for one in given} == {torch.float32, torch.float16, torch.bfloat16}
    assert {one.logits.shape[-1] for one in given} == {1031, 151936}
    assert {one.cu_seqlens is None for one in given} == {True, False}
    assert all(one.logits[~one.mask].isnan().all() and (one.tokens[~one.mask] == -100).all() for one in given)
    assert all((one.mask.sum() > 0) and (~one.mask).any() for one in given)


def test_an_accelerators_odd_vocabulary_has_whole_blocks():
    constants = pytest.importorskip("egpo_kernels.triton.launch").TABLE
    largest = max(
        rule.constants.num_warps * 32 * 16 // 2 * max(rule.constants.strips, rule.constants.gradient_strips)
        for rule in constants
    )
    assert checks._cases(torch.device("cuda"), False)[0].vocab == checks.ODD["gpu"] > largest + 16
    assert checks.ODD["gpu"] % 2 == checks.ODD["cpu"] % 2 == 1


def test_temperatures_are_1_another_number_and_one_for_each_token(problems):
    heats = [problem.given.temperature for problem in problems]
    numbers = {heat for heat in heats if isinstance(heat, float)}
    assert numbers == {1.0, checks.TEMPERATURE} and checks.TEMPERATURE != 1
    of_rows = [heat for heat in heats if not isinstance(heat, float)]
    assert of_rows and all(len(heat.unique()) == 3 for heat in of_rows)
    assert {isinstance(problem.given.temperature, float) for problem in SMALL} == {True, False}


@pytest.mark.parametrize("number", [0, 1])
def test_packed_batches_are_given_what_a_caller_may_leave_out(number):
    given, packed = SMALL[number].given, number == 1
    for name in ("rollout_weights", "entropy_mask", "correct", "num_tokens", "num_sequences"):
        assert (getattr(given, name) is not None) == packed, name
    if packed:
        assert given.rollout_weights[given.mask].isnan().any() and (given.rollout_weights[given.mask] == 0.5).any()
        assert (given.mask & (given.entropy_mask == 0)).any() and (given.correct != (given.rewards > 0.5)).any()
        assert given.num_tokens > given.mask.sum() and given.num_sequences > given.rewards.shape[0]


def test_every_field_of_the_settings_is_changed_and_every_choice_made():
    for kind, configs in ((PolicyLossConfig, variants.losses()), (AdvantageConfig, variants.advantages())):
        for field in dataclasses.fields(kind):
            held = {getattr(config, field.name) for config in configs.values()}
            assert len(held) > 1, field.name
            assert set(field.metadata.get("choices", ())) <= held, field.name
        assert len(set(configs.values())) == len(configs)


def test_a_new_choice_is_checked_by_itself(monkeypatch):
    field = PolicyLossConfig.__dataclass_fields__["kl"]
    monkeypatch.setattr(field, "metadata", {"choices": ("k1", "k2", "k3", "k4")})
    assert {"kl k4", "kl k4, kl_max"} <= set(variants.losses())


def test_estimates_of_the_kl_are_clamped_in_some_tokens_on_every_side_they_have():
    x = torch.tensor(KL_STEPS)
    for estimate in (-x, x.square() / 2, x.exp() - x - 1):
        assert (estimate.abs() > variants.KL_MAX).any() and (estimate.abs() < variants.KL_MAX).any()
        assert ((estimate.abs() - variants.KL_MAX).abs() > 0.05).all()
    assert (-x < -variants.KL_MAX).any() and (-x > variants.KL_MAX).any()


# Tokens and sequences.


def bounds(config):
    """The logarithms of what bounds a token's ratio, by the sign of the advantage that it counts for; 0 is both."""
    high = 1 + config.clip_high if config.ratio_cap is None else config.ratio_cap
    if config.surrogate == "gmpo":
        return [(-config.clip_low, -1), (config.clip_high, 1)]
    low = [(math.log(1 - config.clip_low), -1)] if config.clip_low < 1 else []
    found = [] if config.surrogate == "sapo" else [*low, (math.log(high), 1)]
    if config.dual_clip is not None:
        found.append((math.log(config.dual_clip), -1))
    if config.max_log_ratio < 20:
        found += [(-config.max_log_ratio, -1), (config.max_log_ratio, -1), (config.max_log_ratio, 1)]
    return found


@pytest.mark.parametrize("problem", SCORES, ids=["padded", "packed"])
def test_some_tokens_pass_every_bound_of_every_loss_and_none_is_near_it(problem):
    log_ratio, advantage, _ = counted(problem)
    pooled = means(problem)
    for name, config in variants.losses().items():
        shared = config.ratio != "token"
        for bound, sign in bounds(config):
            values = pooled if shared else log_ratio[advantage.sign() == sign]
            assert (values < bound).any() and (values > bound).any(), (name, bound)
            assert (values - bound).abs().min() > (1e-4 if shared else 0.02), (name, bound)


def test_log_ratios_of_logits_stay_further_from_a_clip_by_a_fifth(problems):
    rounded = [checks.make_problem(CPU, case, linear=True) for case in checks._cases(CPU, False)[:3]]
    for problem in [*problems, *SMALL, *rounded]:
        log_ratio, advantage, _ = counted(problem)
        for values in (log_ratio, means(problem)):
            for bound in (math.log(0.8), math.log(1.2)):
                assert (values - bound).abs().min() > 0.09
        assert (log_ratio[advantage < 0] < math.log(0.8)).any() and (log_ratio[advantage > 0] > math.log(1.2)).any()


def test_sequences_end_inside_and_outside_the_mask_are_empty_or_have_nothing_in_it():
    for problem in [*SMALL, *SCORES, *(make_groups(CPU, packed) for packed in (False, True))]:
        batch, number = problem.given, sequences(problem.given)
        mask, total = batch.mask.flatten(), batch.rewards.shape[0]
        lengths = torch.bincount(number, minlength=total)
        ends = lengths.cumsum(0)[lengths > 0] - 1
        assert mask[ends].any() and (~mask[ends]).any()
        assert (torch.bincount(number[mask], minlength=total) == 0).any()
        assert (lengths == 0).any() == (batch.cu_seqlens is not None)
    assert all((torch.bincount(sequences(p.given)[p.given.mask.flatten()], minlength=12)[7]) == 0 for p in SCORES)


def test_some_gradients_come_through_the_entropy_alone():
    for problem in SMALL:
        slope, bonus, _ = terms.of_loss(problem, checks.BOTH_TERMS)
        assert ((slope == 0) & (bonus != 0)).any() and ((slope != 0) & (bonus != 0)).any()
        slope, bonus, _ = terms.of_log_probs(problem)
        assert ((slope == 0) & (bonus != 0) & problem.given.mask.flatten()).any()


def test_logits_of_minus_infinity_are_a_tokens_own_scattered_and_a_block(problems):
    for problem in [*SMALL, *problems]:
        batch = problem.given
        logits, tokens = batch.logits[batch.mask], batch.tokens[batch.mask]
        gone = logits == -torch.inf
        assert gone.gather(-1, tokens[:, None]).sum() == 1
        half = logits.shape[-1] // 2
        blocks = gone[:, : half - 1].double().mean(-1)
        assert (blocks > 0.9).any() and ((blocks > 0) & (blocks < 0.5)).any() and (blocks == 0).any()


# Groups.


def test_groups_are_of_every_kind_in_any_order():
    problem = make_groups(CPU, False)
    batch = problem.given
    ordered = sorted_groups(batch.groups)
    assert (batch.groups.diff() < 0).any() and (batch.groups.diff() > 0).any()

    names = batch.groups.tolist()
    first = [names.index(name) for name in dict.fromkeys(names)]

    def total(values):
        """Over each sequence's group."""
        return ordered.restore(ordered.spread(ordered.sum(ordered.sort(values))))

    sizes = [int(size) for size in total(torch.ones_like(batch.rewards))[first]]
    assert sorted(sizes) == sorted(len(group) for group in GROUPS) and sizes.count(1) == 2
    usable = total(batch.rewards.isfinite().float())
    assert (usable == 1)[first].sum() == 3 and batch.rewards.isnan().any() and batch.rewards.isinf().any()

    def collapsed(tolerance):
        return is_collapsed(batch.rewards, ordered, tolerance)[first]

    own = collapsed(collapse_tolerance(torch.float32))
    assert (collapsed(0.5) & ~own).any() and (own & ~collapsed(0.0)).sum() == 1
    wrong = total((batch.rewards > 0.5).float())[first] == 0
    assert (wrong & ~own).any() and (wrong & own).any() and (~wrong & own).any() and (~wrong & ~own).any()
    different = batch.rewards.isfinite() & (batch.rewards.double() != problem.exact.rewards)
    assert different.sum() == 1 and batch.rewards[different].item() == pytest.approx(0.3, rel=1e-6)


def test_lengths_differ_so_that_tokens_and_sequences_are_not_weighed_alike():
    for packed in (False, True):
        batch = make_groups(CPU, packed).given
        assert len(torch.bincount(sequences(batch)[batch.mask.flatten()]).unique()) > 2


def test_terms_of_a_loss_follow_its_ratio():
    """The old policy's log-probs less 1: ratios, slopes and the loss are e times as large."""
    problem = SCORES[0]
    recipe = Recipe(loss=PolicyLossConfig(surrogate="gmpo", clip_low=1.0, clip_high=1e3))
    shifted = problem._replace(exact=problem.exact._replace(old_log_probs=problem.exact.old_log_probs - 1))
    one, other = (terms.of_loss(it, recipe.loss) for it in (problem, shifted))
    assert other.loss > 2 * one.loss and other.slope.sum() > 2 * one.slope.sum()
