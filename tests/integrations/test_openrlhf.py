"""OpenRLHF's loss and experience maker beside ours."""

import importlib
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("openrlhf", reason="openrlhf is not installed (make parity installs it)")

from egpo_kernels import PolicyLossConfig, group_advantages, recipes
from egpo_kernels.integrations.openrlhf import actor_policy_loss, rollout_advantages
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.kept_sets import assert_over, joined, sets_with
from tests.integrations.models import VOCAB, make_model
from tests.parity.batch import Answer, assert_same, differentiated, make_batch, ours
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import run

BATCH = make_batch(empty=True)
TOKENS = BATCH.advantages[:, None] * BATCH.mask
PACKAGES = (
    "openrlhf.models",
    "openrlhf.trainer",
    "openrlhf.trainer.ray",
    "openrlhf.trainer.ppo_utils",
    "openrlhf.utils",
)


@pytest.fixture(scope="module")
def stack():
    """OpenRLHF's loss, experience maker and Experience, without what its packages import besides: GPU-only packages."""
    (root,) = find_spec("openrlhf").submodule_search_locations
    with pytest.MonkeyPatch.context() as patch:
        for name in (*PACKAGES, "deepspeed", "openrlhf.trainer.ray.launcher", "openrlhf.utils.utils"):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__path__ = [str(Path(root, *name.split(".")[1:]))] if name in PACKAGES else []
            patch.setitem(sys.modules, name, module)
        sys.modules["openrlhf.trainer.ray.launcher"].RayActorGroup = None
        sys.modules["openrlhf.utils.utils"].zero_pad_sequences = None
        yield SimpleNamespace(
            loss=importlib.import_module("openrlhf.models.loss"),
            counts=importlib.import_module("openrlhf.utils.loss_utils").get_loss_batch_info,
            Experience=importlib.import_module("openrlhf.trainer.ppo_utils.experience").Experience,
            maker=importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker"),
        )
        for name in [name for name in sys.modules if name.startswith("openrlhf.")]:
            patch.delitem(sys.modules, name)


def loss_of(function, counts, rows=slice(None)):
    """Loss and gradient as `ActorPPOTrainer.training_step` asks for them, and the numbers that it logs."""
    logged = []

    def loss(log_probs):
        given = log_probs[rows], BATCH.old_log_probs[rows], TOKENS[rows]
        found, *others = function(
            *given, action_mask=BATCH.mask[rows], rollout_log_probs=BATCH.sampler_log_probs[rows], **counts
        )
        logged.extend(others)
        return found

    return differentiated(loss, BATCH.log_probs), logged


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize(
    "options, settings",
    [
        ({}, {}),
        (
            {"clip_eps_low": 0.1, "clip_eps_high": 0.28, "dual_clip": 1.5},
            {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5},
        ),
        ({"token_level_loss": False}, {"reduction": "seq_mean_token_mean"}),
        ({"policy_loss_type": "gspo"}, {"ratio": "sequence", "reduction": "seq_mean_token_mean"}),
    ],
)
def test_same_numbers_as_theirs(stack, options, settings, dp_size):
    counts = stack.counts(None, BATCH.mask.float()) | {"dp_size": dp_size}
    found, logged = loss_of(partial(actor_policy_loss, config=PolicyLossConfig(**settings)), counts)
    given = {"num_tokens": counts["batch_num_tokens"] / dp_size, "num_sequences": counts["global_batch_size"] / dp_size}
    expected = ours(BATCH, **settings, **given)
    assert_bits(found.loss, expected.loss, "loss")
    assert_bits(found.gradient, expected.gradient, "gradient")
    theirs, their_log = loss_of(stack.loss.PolicyLoss(**options), counts)
    assert_same(expected, theirs)
    if "dual_clip" not in options and "policy_loss_type" not in options:
        assert_rounding(logged[0], their_log[0])
    assert logged[1] > 0 and logged[2:] == [None, None]


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean_token_mean"])
def test_micro_batches_add_up_to_the_step(stack, reduction):
    function = partial(actor_policy_loss, config=PolicyLossConfig(reduction=reduction))
    counts = stack.counts(None, BATCH.mask.float())
    whole = ours(BATCH, reduction=reduction)
    parts = [loss_of(function, counts, rows)[0] for rows in (slice(0, 3), slice(3, 8))]
    total = Answer(parts[0].loss + parts[1].loss, parts[0].gradient + parts[1].gradient)
    assert_same(whole, total)


def test_the_page_puts_both_halves_in(stack):
    page = run("docs/openrlhf.md")
    maker = object.__new__(page["ExperienceMaker"])
    maker.advantage_estimator, maker.kl_ctl = "group_norm", SimpleNamespace(value=0.0)
    advantage = SimpleNamespace(estimator="group_norm", gamma=1.0)
    reward = SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None)
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=4), reward=reward, algo=SimpleNamespace(advantage=advantage)
    )
    maker.args, maker.strategy = args, SimpleNamespace(args=args)
    rewards = torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0])
    places, width = [[5, 0, 2], [7, 6, 4, 3, 1]], [24, 24]
    experiences = [
        stack.Experience(
            index=index,
            rewards=rewards[index],
            action_log_probs=BATCH.old_log_probs[index, :end],
            action_mask=BATCH.mask[index, :end],
            kl=torch.zeros(len(index), end),
        )
        for index, end in zip(places, width, strict=True)
    ]
    found = maker.compute_advantages_and_returns(experiences)
    groups = torch.arange(8) // 4
    expected = group_advantages(groups, rewards, BATCH.old_log_probs, BATCH.mask).advantages
    for experience in found:
        assert_rounding(experience.advantages, expected[experience.index][:, None] * BATCH.mask[experience.index])
    trainer = SimpleNamespace()
    page["use_policy_loss"](trainer)
    counts = stack.counts(None, BATCH.mask.float())
    assert_same(ours(BATCH, **recipes.EGPO.loss.to_dict()), loss_of(trainer.actor_loss_fn, counts)[0])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kl_coef": 0.1}, r"config\.kl_coef is 0\.1; it must be 0, .* set algo\.kl\.use_loss"),
        ({"entropy_coef": -0.01}, r"config\.entropy_coef is -0\.01; it must be 0, .* set actor\.entropy_coef"),
    ],
)
def test_terms_that_openrlhf_adds_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        actor_policy_loss(BATCH.log_probs, BATCH.old_log_probs, TOKENS, BATCH.mask, config=PolicyLossConfig(**settings))


def test_a_recipe_is_not_its_half():
    with pytest.raises(TypeError, match="config is Recipe; it must be PolicyLossConfig"):
        actor_policy_loss(BATCH.log_probs, BATCH.old_log_probs, TOKENS, BATCH.mask, config=recipes.EGPO)


def test_experiences_without_log_probs_are_refused():
    given = [
        SimpleNamespace(index=[place], rewards=torch.zeros(1), action_log_probs=log_probs, action_mask=torch.ones(1, 2))
        for place, log_probs in enumerate((-torch.ones(1, 2), None))
    ]
    with pytest.raises(
        ValueError, match=r"experiences\[1\]\.action_log_probs is None; it must be \[B, A\]: ask the actor"
    ):
        rollout_advantages(given, 1)


def test_a_prompt_has_all_its_samples():
    lonely = SimpleNamespace(
        index=[0, 1, 2],
        rewards=torch.zeros(3),
        action_log_probs=-torch.ones(3, 2),
        action_mask=torch.ones(3, 2),
    )
    with pytest.raises(ValueError, match="group_size"):
        rollout_advantages([lonely], 4)


def test_a_fused_model_gives_log_probs_over_the_record(stack):
    model, generator = make_model(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (3, 9), generator=generator)
    attention = (torch.arange(9) < torch.tensor([9, 7, 9])[:, None]).long()
    logits = model(ids, attention_mask=attention).logits.detach()[:, :-1] / 0.9
    actions = attention[:, 1:].bool() & (torch.arange(8) >= torch.tensor([3, 2, 5])[:, None])
    # What was sampled, and in the first sample two tokens that an environment wrote.
    actions[0, 5:7] = False
    sets = [
        sets_with(row[first + 1 : last].tolist(), VOCAB)
        for row, first, last in zip(ids, (3, 2, 5), (9, 7, 9), strict=True)
    ]
    sets[0][2:4] = [], []
    given = ids, attention, actions, sets, 0.9
    found = run("docs/openrlhf.md")["replayed_log_probs"](fuse_policy_loss(model), *given).detach()
    kept = [each for each in joined(sets) if each]
    assert_over(found[actions], logits[actions], ids[:, 1:][actions], kept)
