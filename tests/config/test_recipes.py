"""Recipes: what each row sets, by hand-computed advantages and losses, and by every backend; the pages' tables."""

import math
import re
from pathlib import Path

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.recipes import RECIPES
from tests.support.batches import FAST
from tests.support.device import DEVICE
from tests.support.make_case import PUBLISHED, make_case
from tests.support.page import shown
from tests.support.recipe_table import recipe_table, short_table
from tests.support.runs import advantages, check, whole
from tests.support.terms import group_terms

ROOT = Path(__file__).resolve().parents[2]
INF = math.inf

# One batch for all: two groups of four, answers of two tokens each. H is the mean of 2 NLLs.
#   group 0: rewards 1 0 0 0, H = 1 2 3 2, mean H 2
#   group 1: rewards 0 0 0 0, H = 1 1 1 1: all wrong
REWARDS = [1.0, 0.0, 0.0, 0.0] + [0.0] * 4
H = [1.0, 2.0, 3.0, 2.0] + [1.0] * 4
STD = 0.5  # of 1 0 0 0: mean 1/4, squares 9/16 + 3/16 = 3/4, over 3: 1/4
# Advantages without a weight: (1 - 1/4) / STD and -1/4 / STD.
GRPO = [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]
# EGPO: weights 2/1 = 2, 2/2 = 1, 2/3 -> 0.8 (lower bound), 1; the second group is penalised, at weight 1.
EGPO = [2 * 1.5, -0.5, -0.8 * 0.5, -0.5, -1, -1, -1, -1]
# Mean of the clamped weights 2 1 0.8 1 is 1.2; of the raw ones 2 1 2/3 1 it is 7/6.
C5 = [3 / 1.2, -0.5 / 1.2, -0.4 / 1.2, -0.5 / 1.2, -1, -1, -1, -1]
# Divided by 7/6 first: 12/7, 6/7, 4/7, 6/7, of which the correct one stays and the incorrect are in [0.8, 1].
C6 = [1.5 * 12 / 7, -0.5 * 6 / 7, -0.4, -0.5 * 6 / 7, -1, -1, -1, -1]
EDGE = [1.5 * 2, -0.5, -0.5 * 2 / 3, -0.5, 0, 0, 0, 0]
RLOO = [1.0, -1 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0]  # 1 - 0, and 0 less the mean of 1 0 0
CENTRED = [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
# Whitened: every answer has two tokens, so the mean is 0; squares 2 (9/16 + 3/16) = 3/2 over 16 - 1 tokens: 1/10.
WHITENED = [value * math.sqrt(10) for value in CENTRED]
# The batch's rewards: mean 1/8, squares 49/64 + 7/64 = 7/8 over 7: std 1 / sqrt(8).
OF_BATCH = [value * math.sqrt(8) for value in CENTRED]
MAXRL = [value * 4 for value in CENTRED]  # over the group's mean 1/4; the other group's mean is 0

ADVANTAGES = {
    "EGPO": EGPO,
    "EGPO_C1": EGPO,
    "EGPO_C2": EGPO,
    "EGPO_C3": EGPO,
    "EGPO_C4": EGPO,
    "EGPO_C5": C5,
    "EGPO_C6": C6,
    **dict.fromkeys(("GRPO", "DAPO", "GSPO", "CISPO", "SAPO", "GMPO"), GRPO),
    "DR_GRPO": CENTRED,
    "EDGE_GRPO": EDGE,
    "NSR": [0.0] + [-1.0] * 7,
    "PSR": [1.0] + [0.0] * 7,
    "W_REINFORCE": [0.1] + [-1.0] * 7,
    "RLOO": RLOO,
    "REINFORCE_PP_BASELINE": WHITENED,
    "LITE_PPO": OF_BATCH,
    "MAXRL": MAXRL,
}

# The clamp's corners: in one group of two each, H = 1 and 3 about a mean of 2, weights 2 and 2/3. In the first the
# sure answer is correct, in the second the unsure one is; base advantages +- 1 / sqrt(2).
CORNERS = {
    "EGPO": [2.0, 0.8, 1.0, 1.0],
    "EGPO_C1": [2.0, 0.8, 2.0, 0.8],
    "EGPO_C2": [2.0, 0.8, 1.0, 0.8],
    "EGPO_C3": [2.0, 0.8, 2.0, 1.0],
}

# The loss of two answers, of one token and of two, ratios e^0.5 and e^-0.5, log-probs -1, advantages 1 and -1.
UP, DOWN = math.exp(0.5), math.exp(-0.5)


def gate(ratio, tau):
    return 4 / tau / (1 + math.exp(-tau * (ratio - 1)))


# Each token's loss: of the correct answer, of the incorrect one.
CLIPPED = (-1.2, 0.8)
TOKENS = {
    "DAPO": (-1.28, 0.8),
    "GSPO": (-1.0004, 0.9997),
    "CISPO": (-UP * -1.0, DOWN * -1.0),  # -ratio A l; no cap is reached
    "SAPO": (-gate(UP, 1.0), gate(DOWN, 1.05)),
    "GMPO": (-math.exp(0.4), math.exp(-0.4)),
}
REDUCE = {
    "token_mean": lambda first, second: (first + 2 * second) / 3,
    "seq_mean_token_mean": lambda first, second: (first + second) / 2,
    "seq_mean_token_sum": lambda first, second: (first + 2 * second) / 2,
    "seq_mean_token_sum_norm": lambda first, second: (first + 2 * second) / 2 / 7,  # PUBLISHED gives it length 7
}
BY_TOKEN = "EGPO EGPO_C1 EGPO_C2 EGPO_C3 EGPO_C4 EGPO_C5 EGPO_C6 DAPO EDGE_GRPO NSR PSR W_REINFORCE"
REDUCTIONS = {
    **dict.fromkeys([*BY_TOKEN.split(), "REINFORCE_PP_BASELINE", "LITE_PPO", "MAXRL", "CISPO"], "token_mean"),
    **dict.fromkeys(["GRPO", "GSPO", "SAPO", "GMPO"], "seq_mean_token_mean"),
    "RLOO": "seq_mean_token_sum",
    "DR_GRPO": "seq_mean_token_sum_norm",
}


def config_of(name):
    return PUBLISHED[name.lower()]


def rollout(rewards, uncertainty, groups, name, backend, **options):
    """Answers of two tokens, whose NLLs (and entropies) average to the uncertainty."""
    spread = torch.tensor([0.5, -0.5], dtype=torch.float64)
    per_token = (torch.tensor(uncertainty, dtype=torch.float64)[:, None] + spread).to(DEVICE)
    return ek.group_advantages(
        groups,
        torch.tensor(rewards, dtype=torch.float64, device=DEVICE),
        -per_token,
        entropy=per_token,
        config=config_of(name).advantage,
        backend=backend,
        **options,
    )


def test_recipes_are_those_of_the_table():
    assert set(ADVANTAGES) == {recipe.name for recipe in RECIPES.values()}
    assert set(RECIPES) == {name.lower() for name in ADVANTAGES} == {name.lower() for name in REDUCTIONS}
    for name, recipe in RECIPES.items():
        assert getattr(ek.recipes, recipe.name) is recipe and ek.recipes.get(name) is recipe


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_recipes_advantages_by_hand(name, backend):
    found = rollout(REWARDS, H, 4, name, backend)
    # uncertainty_eps = 1e-5 and std_eps = 1e-6 are left out of the sums above.
    torch.testing.assert_close(found.advantages.cpu(), torch.tensor(ADVANTAGES[name]).double(), rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("name", CORNERS)
def test_recipes_clamp_corners_by_hand(name, backend):
    found = rollout([1.0, 0, 0, 1.0], [1.0, 3, 1, 3], 2, name, backend)
    torch.testing.assert_close(found.weights.cpu(), torch.tensor(CORNERS[name]).double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_recipes_c4_locks_the_weights_of_all_wrong_groups(backend):
    free, locked = (rollout([0.0, 0.0], [1.0, 3.0], 2, name, backend) for name in ("EGPO", "EGPO_C4"))
    torch.testing.assert_close(free.advantages.cpu(), torch.tensor([-1.0, -0.8]).double(), rtol=2e-5, atol=0)
    assert locked.advantages.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_recipes_of_a_lone_answer(name, backend):
    """Advantage 0 without a comparison; what needs none is given all the same."""
    found = rollout([1.0], [2.0], 1, name, backend).advantages.tolist()
    assert found == [{"NSR": 0.0, "PSR": 1.0, "W_REINFORCE": pytest.approx(0.1)}.get(name, 0.0)]


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_recipes_whiten_a_small_spread(backend):
    """Rewards 2e-4 apart in two answers of two tokens: squares 4e-8 over 3, and 1e-8 beside them."""
    found = rollout([2e-4, 0.0], [1.0, 1.0], 2, "REINFORCE_PP_BASELINE", backend).advantages.cpu()
    wanted = 1e-4 / math.sqrt(4e-8 / 3 + 1e-8)
    torch.testing.assert_close(found, torch.tensor([wanted, -wanted], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_recipes_of_gspo_and_gspo_token_by_hand(backend):
    """Two tokens whose log-ratios cancel (ratio 1), advantages 1 and -2: each its own gradient, or the mean of both."""
    old = torch.tensor([[-1.1, -0.9]], dtype=torch.float64, device=DEVICE)
    advantages = torch.tensor([[1.0, -2.0]], dtype=torch.float64, device=DEVICE)
    for ratio, wanted in (("sequence_token", [[-1.0, 2.0]]), ("sequence", [[0.5, 0.5]])):
        log_probs = torch.full_like(old, -1.0, requires_grad=True)
        config = ek.PolicyLossConfig(ratio=ratio, reduction="sum")
        loss, _ = ek.policy_loss(log_probs, old, advantages, config=config, backend=backend)
        loss.backward()
        torch.testing.assert_close(loss.item(), 1.0, rtol=1e-14, atol=0)
        torch.testing.assert_close(log_probs.grad.cpu(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_recipes_maxrl_says_nothing_where_the_mean_is_not_positive(backend):
    """Divided by a mean below 0, the better answer would be punished."""
    found = rollout([-1.0, 0.5, -1.0, 1.0, 3.0, 1.0], [1.0] * 6, 2, "MAXRL", backend)
    wanted = torch.tensor([0, 0, 0, 0, 0.5, -0.5], dtype=torch.float64)
    torch.testing.assert_close(found.advantages.cpu(), wanted, rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_recipes_whiten_what_is_compared(backend):
    """A lone answer and one without a reward stay 0 and out of the statistics, as do tokens that do not count."""
    rewards = torch.tensor([1.0, 0.0, 5.0, torch.nan, 1.0, 2.0, 2.0], dtype=torch.float64, device=DEVICE)
    groups = torch.tensor([0, 0, 1, 2, 2, 3, 3], device=DEVICE)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]], device=DEVICE)
    config = ek.recipes.REINFORCE_PP_BASELINE.advantage
    found = ek.group_advantages(groups, rewards, mask=mask, config=config, backend=backend).advantages.cpu()
    # Counted: 1/2 three times, -1/2 once, 0 twice (a group that agrees): mean 1/6, squares 1 - 6/36 over 5.
    mean, std = 1 / 6, math.sqrt((1 - 1 / 6) / 5)
    wanted = [(0.5 - mean) / std, (-0.5 - mean) / std, 0, 0, 0, -mean / std, -mean / std]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"mask is None with scale 'batch_whiten', .*; it must be given"):
        ek.group_advantages(groups, rewards, config=config, backend=backend)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_recipes_losses_by_hand(name, backend):
    numbers = ([[-1.0, 0.0], [-1.0, -1.0]], [[-1.5, 0.0], [-0.5, -0.5]], [1.0, -1.0])
    log_probs, old, advantages = (torch.tensor(it, dtype=torch.float64, device=DEVICE) for it in numbers)
    mask = torch.tensor([[1, 0], [1, 1]], device=DEVICE)
    loss, _ = ek.policy_loss(log_probs, old, advantages, mask, config=config_of(name).loss, backend=backend)
    wanted = REDUCE[REDUCTIONS[name]](*TOKENS.get(name, CLIPPED))
    torch.testing.assert_close(loss.cpu(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_recipes_caps_and_bounds_by_hand():
    """Where one token cannot show it: a cap of cispo, and two tokens that gmpo pools."""
    log_probs = torch.tensor([[-0.1, -0.1]], dtype=torch.float64)
    old = log_probs - torch.tensor([[2.0, -0.2]], dtype=torch.float64)
    one = torch.tensor([1.0], dtype=torch.float64)

    def loss(name, **settings):
        config = RECIPES[name].replace(**settings).loss
        return ek.policy_loss(log_probs, old, one, config=config, backend="reference").loss.item()

    # e^2 = 7.39 is capped at 5; -ratio A l with l = -0.1, over two tokens.
    assert loss("cispo") == pytest.approx((5 * 0.1 + math.exp(-0.2) * 0.1) / 2, rel=1e-14)
    assert loss("cispo", ratio_cap=3) == pytest.approx((3 * 0.1 + math.exp(-0.2) * 0.1) / 2, rel=1e-14)
    assert loss("cispo", clip_high=2.0) == loss("cispo", ratio_cap=3)
    # Below there is no bound unless it is asked for: e^-0.2 = 0.82 is at least 0.9.
    assert loss("cispo", clip_low=0.1) == pytest.approx((5 * 0.1 + 0.9 * 0.1) / 2, rel=1e-14)
    # 2 is clipped to 0.4, -0.2 is not: the mean is 0.1, and each token's loss is -e^0.1.
    assert loss("gmpo") == pytest.approx(-math.exp(0.1), rel=1e-14)
    # Clipping is one-sided: with a negative advantage 2 stays, and -0.2 is inside.
    assert -ek.policy_loss(log_probs, old, -one, config=RECIPES["gmpo"].loss).loss.item() == pytest.approx(
        -math.exp(0.9), rel=1e-14
    )


def test_recipes_dr_grpo_wants_its_length():
    logits, tokens = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    for call in (
        lambda: ek.egpo_loss(logits, tokens, 2, torch.tensor([1.0, 0.0]), recipe="dr_grpo"),
        lambda: ek.logits_policy_loss(logits, tokens, torch.ones(2), config=ek.recipes.DR_GRPO.loss),
        lambda: ek.policy_loss(logits[..., 0], None, torch.ones(2), config=ek.recipes.DR_GRPO.loss),
    ):
        with pytest.raises(ValueError, match=r"norm_length is None .*replace\(norm_length="):
            call()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_recipes_on_every_backend(name, backend, layout):
    """Loss, gradient and metrics of whole groups, off-policy with far tokens, against the specification."""
    case = make_case(7, group_sizes=(4, 3, 1), layout=layout, recipe=PUBLISHED[name], old="far", garbage=True)
    exact = advantages(case.double(), "reference")
    given = whole(case.double(), "reference")
    found = group_terms(case.double(), exact)
    check(case, whole(case, backend), whole(case, "reference"), given, exact.advantages, found)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_recipes_are_data(recipe):
    """Written down and read back, a recipe is the same, under any name."""
    assert ek.Recipe.from_dict(recipe.to_dict()) == recipe
    assert ek.Recipe.from_dict(recipe.to_dict() | {"name": "mine"}) == recipe.replace(name="mine")


def test_recipes_names_decide_nothing():
    decision = re.compile(r"\bif .*recipe\.name|recipe\.name\s*(?:[=!]=|\.|in\b)|recipe\s*==")
    for path in (ROOT / "egpo_kernels").rglob("*.py"):
        assert path.name == "recipes.py" or not decision.search(path.read_text()), path


def test_recipes_of_the_pages_are_rendered_from_the_presets():
    assert shown("recipes") == recipe_table(), "run python -m tests.support.recipe_table"
    short = short_table()
    assert shown("recipes in short") == short, "run python -m tests.support.recipe_table"
    named = re.findall(r"`(\w+)`", short)
    assert {*named, *(f"EGPO_C{place}" for place in range(2, 6))} == {recipe.name for recipe in RECIPES.values()}
