"""verl's own dispatch, trainers' functions and losses, with our names in its registries."""

import dataclasses
import importlib
import itertools
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # verl warns of engines that are not installed
    pytest.importorskip("verl", reason="verl is not installed (make parity installs it)")
    from verl.trainer.ppo import ray_trainer
    from verl.trainer.ppo.v1 import utils as v1

from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import Metric
from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import egpo_kernels as ek
from egpo_kernels.integrations import verl as ours
from egpo_kernels.integrations import verl_losses as losses
from tests.parity.batch import Answer, Batch, differentiated, make_batch
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import PAGES, run

ROOT = Path(__file__).resolve().parents[2]
BATCH = make_batch(empty=True)
TOKENS, SEQUENCES = int(BATCH.mask.sum()), 7
DIRECT = {
    "egpo": {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5},
    "egpo_gspo": {"ratio": "sequence_token", "clip_low": 0.1, "clip_high": 0.28},
    "egpo_cispo": {"surrogate": "cispo", "clip_high": 0.28},
    "egpo_sapo": {"surrogate": "sapo", "tau_positive": 1.2, "tau_negative": 1.3},
    "egpo_gmpo": {"surrogate": "gmpo", "clip_low": 0.1, "clip_high": 0.28},
}
SETTINGS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5, "tau_pos": 1.2, "tau_neg": 1.3}
SAME = {"egpo": "vanilla", "egpo_gspo": "gspo"}
# What verl divides by, in a batch that is everything, and in a part of a larger one.
WHOLE, PART = {}, {"dp_size": 2, "batch_num_tokens": 400, "global_batch_size": 32, "loss_scale_factor": 32}
COUNTED = {"batch_num_tokens": 400}


def actor(kind=FSDPActorConfig, loss_mode="egpo", info=None, **options):
    return kind(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=8,
        global_batch_info=dict(info or {}),
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        **{**SETTINGS, **options},
    )


def registered(batch: Batch, loss_mode: str, loss_agg_mode: str, config, weights=None):
    """Loss, gradient and metrics, through verl's registry."""
    seen = {}

    def function(log_probs):
        loss, metrics = get_policy_loss_fn(loss_mode)(
            old_log_prob=batch.old_log_probs,
            log_prob=log_probs,
            advantages=batch.advantages[:, None].expand(batch.mask.shape),
            response_mask=batch.mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=weights,
        )
        seen.update(metrics)
        return loss

    return differentiated(function, batch.log_probs), seen


def assert_same(found, expected, size):
    """Rounding of a loss is that of its terms."""
    assert_rounding(found.gradient, expected.gradient)
    assert_rounding(torch.stack([found.loss, size]), torch.stack([expected.loss, size]))


def size_of(batch, expected):
    """About the sum of the loss's terms, all of one sign."""
    return (expected.gradient.abs() * (1 + batch.log_probs.abs())).sum()


# The registered losses.


@pytest.mark.parametrize("mode", losses.MODES)
@pytest.mark.parametrize("loss_mode", DIRECT)
def test_registered_losses_are_our_own(loss_mode, mode):
    config = actor(loss_mode=loss_mode)
    found, metrics = registered(BATCH, loss_mode, mode, config, BATCH.weights)
    length = {"norm_length": 24.0} if mode.endswith("norm") else {}
    direct = ek.PolicyLossConfig(reduction=losses.MODES[mode], **length, **DIRECT[loss_mode])
    expected = differentiated(
        lambda log_probs: (
            ek.policy_loss(
                log_probs,
                BATCH.old_log_probs,
                BATCH.advantages,
                BATCH.mask,
                rollout_weights=BATCH.weights,
                config=direct,
            ).loss
        ),
        BATCH.log_probs,
    )
    assert_bits(found.loss, expected.loss, "loss")
    assert_bits(found.gradient, expected.gradient, "gradient")
    assert all(type(value) is float for value in metrics.values())
    assert {"egpo/ratio", "egpo/approx_kl", "egpo/clip_low", "egpo/clip_high"} < metrics.keys()


@pytest.mark.parametrize("info", [WHOLE, PART], ids=["whole", "part"])
@pytest.mark.parametrize("mode", losses.MODES)
@pytest.mark.parametrize("loss_mode", SAME)
def test_registered_losses_are_verls(loss_mode, mode, info):
    config = actor(ActorConfig, loss_mode, info)
    found, metrics = registered(BATCH, loss_mode, mode, config, BATCH.weights)
    expected, theirs = registered(BATCH, SAME[loss_mode], mode, config, BATCH.weights)
    assert_same(found, expected, size_of(BATCH, expected))
    assert theirs.keys() < metrics.keys()
    for key, value in theirs.items():
        assert_rounding(torch.tensor([metrics[key], 1.0]), torch.tensor([value, 1.0]))
    assert theirs["actor/pg_clipfrac"] and (loss_mode != "egpo" or theirs["actor/pg_clipfrac_lower"])


def test_one_clip_ratio_stands_for_both():
    config = actor(clip_ratio_low=None, clip_ratio_high=None, clip_ratio=0.05)
    found, _ = registered(BATCH, "egpo", "token-mean", config)
    expected, _ = registered(BATCH, "vanilla", "token-mean", config)
    assert_same(found, expected, size_of(BATCH, expected))
    as_mapping = OmegaConf.create(SETTINGS | {"clip_ratio": 0.05, "global_batch_info": {}})
    as_mapping.clip_ratio_low = as_mapping.clip_ratio_high = None
    assert_bits(registered(BATCH, "egpo", "token-mean", as_mapping)[0].loss, found.loss, "DictConfig")


def test_what_a_mapping_lacks_is_what_verl_takes():
    config = OmegaConf.create({"clip_ratio": 0.2, "clip_ratio_low": None, "global_batch_info": {}})
    config.clip_ratio_high = None
    far = BATCH._replace(log_probs=BATCH.log_probs + 2.0)
    found, metrics = registered(far, "egpo", "token-mean", config)
    expected, theirs = registered(far, "vanilla", "token-mean", config)
    assert_same(found, expected, size_of(far, expected))
    assert metrics["actor/pg_clipfrac_lower"] == theirs["actor/pg_clipfrac_lower"] > 0


def test_metrics_of_far_log_ratios_are_verls():
    far = BATCH._replace(old_log_probs=BATCH.old_log_probs - 50.0)
    (_, metrics), (_, theirs) = (registered(far, mode, "token-mean", actor()) for mode in ("egpo", "vanilla"))
    assert_rounding(torch.tensor(metrics["actor/ppo_kl"]), torch.tensor(theirs["actor/ppo_kl"]))


def test_a_sum_needs_no_count():
    config = actor(info={"dp_size": 2})
    found, expected = (registered(BATCH, mode, "token-sum", config)[0] for mode in ("egpo", "vanilla"))
    assert_same(found, expected, size_of(BATCH, expected))


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(losses.MODES)),
    st.sampled_from(sorted(DIRECT)),
    st.permutations(range(8)),
    st.lists(st.integers(0, 8), min_size=3, max_size=3),
    st.integers(0, 24),
)
def test_micro_batches_of_two_processes_add_up(mode, loss_mode, order, cuts, emptied):
    batch = BATCH._replace(mask=BATCH.mask.clone())
    batch.mask[:, emptied:] = False
    batch.mask[0, 0] = True
    counts = {"batch_num_tokens": int(batch.mask.sum()), "global_batch_size": int(batch.mask.any(-1).sum())}
    counts["loss_scale_factor"] = 24
    expected, _ = registered(batch, loss_mode, mode, actor(info=counts))
    loss, gradient = torch.zeros(()), torch.zeros(8, 24)
    edges = [0, *sorted(cuts), 8]
    for rows in (order[low:high] for low, high in itertools.pairwise(edges) if low < high):
        part = Batch(*(values[rows] for values in batch))
        found, metrics = registered(part, loss_mode, mode, actor(info=counts | {"dp_size": 2}))
        assert not any(np.isnan(value) for value in metrics.values())
        loss += found.loss / 2  # gradients are averaged over the processes, and so the loss that is reported
        gradient[rows] = found.gradient / 2
    assert_same(Answer(loss, gradient), expected, size_of(batch, expected))


@pytest.mark.parametrize(
    "loss_mode, mode, options, message",
    [
        ("egpo", "token-median", {}, r"actor\.loss_agg_mode is 'token-median'; it must be one of token-mean, "),
        (
            "egpo",
            "token-mean",
            {"clip_ratio_low": 1.5},
            r"actor\.clip_ratio_low is 1\.5; it must be a number in \[0, 1\]",
        ),
        ("egpo", "token-mean", {"clip_ratio_high": "x"}, r"actor\.clip_ratio_high is 'x'; it must be a number"),
        ("egpo", "token-mean", {"clip_ratio_c": 0.5}, r"actor\.clip_ratio_c is 0\.5; it must be a number in \(1, "),
        ("egpo_sapo", "token-mean", {"tau_pos": 0.0}, r"actor\.tau_pos is 0\.0; it must be"),
        ("egpo", "token-mean", {"info": {"dp_size": 2}}, r"'batch_num_tokens'\] is None with dp_size 2"),
        ("egpo", "seq-mean-token-sum", {"info": {"dp_size": 2}}, r"'global_batch_size'\] is None with dp_size 2"),
        (
            "egpo",
            "seq-mean-token-sum-norm",
            {"info": {"loss_scale_factor": 0}},
            r"actor\.loss_scale_factor is 0; it must be",
        ),
    ],
)
def test_refused_losses(loss_mode, mode, options, message):
    with pytest.raises(ValueError, match=message):
        registered(BATCH, loss_mode, mode, actor(loss_mode=loss_mode, **options))


# The loss of an engine.


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(batch: Batch, padded: bool, counts=WHOLE, weights=True, ref=True):
    """What an engine hands to a loss: a `TensorDict` and a function of ``[B, R]`` to the model's output."""
    generator = torch.Generator().manual_seed(1)
    width, prompts = batch.mask.shape[1], [1 + row % 3 for row in range(len(batch.mask))]
    lengths = [max(1, int(row.nonzero()[-1]) + 1) if row.any() else 1 for row in batch.mask]
    per_token = {"response_mask": batch.mask.long(), "old_log_probs": batch.old_log_probs}
    per_token["advantages"] = batch.advantages[:, None] * batch.mask
    per_token |= {"rollout_is_weights": batch.weights} if weights else {}
    per_token |= {"ref_log_prob": batch.ref_log_probs} if ref else {}
    tensors = {"prompts": torch.zeros(len(prompts), 3).long(), "responses": torch.zeros(len(prompts), width).long()}
    if padded:
        before = torch.arange(3) >= 3 - torch.tensor(prompts)[:, None]
        after = torch.arange(width) < torch.tensor(lengths)[:, None]
        tensors |= per_token | {"attention_mask": torch.cat([before, after], 1).long()}
    else:
        tensors["prompts"] = nested([row[:length] for row, length in zip(tensors["prompts"], prompts, strict=True)])
        for name, values in {"responses": tensors["responses"], **per_token}.items():
            tensors[name] = nested([row[:length] for row, length in zip(values, lengths, strict=True)])
    info = {name: counts.get(name) for name in ("batch_num_tokens", "global_batch_size")}
    data = tu.get_tensordict(tensors, info | {"dp_size": counts.get("dp_size", 1)})

    def output(values):
        rows = []
        for row, before, length in zip(values, prompts, lengths, strict=True):
            # Position t scores token t + 1; the last position scores nothing.
            rows.append(torch.cat([torch.randn(before - 1, generator=generator), row[:length], torch.randn(1)]))
        return nested(rows)

    return data, output


def engine(loss, batch, config, padded, counts=WHOLE, entropy=True, **more):
    data, output = micro_batch(batch, padded, counts, **more)
    seen, bonus = {}, batch.entropy.clone().requires_grad_()

    def function(log_probs):
        given = {"log_probs": output(log_probs)} | ({"entropy": output(bonus)} if entropy else {})
        value, metrics = loss(config, model_output=given, data=data, dp_group=None)
        seen.update(metrics)
        return value

    found = differentiated(function, batch.log_probs)
    return found, torch.zeros(8, 24) if bonus.grad is None else bonus.grad, seen


@pytest.mark.parametrize("padded", [False, True], ids=["nested", "padded"])
@pytest.mark.parametrize("counts", [WHOLE, PART, COUNTED], ids=["whole", "part", "counted"])
@pytest.mark.parametrize(
    "mode, options",
    [
        ("token-mean", {}),
        ("token-mean", {"entropy_coeff": 0.1}),
        ("token-sum", {"use_kl_loss": True, "kl_loss_type": "k1", "kl_loss_coef": 0.2, "entropy_coeff": -0.1}),
        ("seq-mean-token-mean", {"use_kl_loss": True, "kl_loss_type": "low_var_kl", "kl_loss_coef": 0.2}),
        ("seq-mean-token-sum", {"use_kl_loss": True, "kl_loss_type": "mse", "kl_loss_coef": 0.2}),
        ("seq-mean-token-sum-norm", {"use_kl_loss": True, "kl_loss_coef": 0.0}),
    ],
)
@pytest.mark.parametrize("theirs", ["egpo", "vanilla"])
def test_engine_loss_is_verls_ppo_loss(mode, options, counts, padded, theirs):
    more = options | {"loss_agg_mode": mode, "loss_scale_factor": counts.get("loss_scale_factor")}
    found, bonus, metrics = engine(ours.engine_loss, BATCH, actor(**more), padded, counts)
    expected, their_bonus, their_metrics = engine(ppo_loss, BATCH, actor(loss_mode=theirs, **more), padded, counts)
    assert_same(found, expected, size_of(BATCH, expected))
    assert_rounding(bonus, their_bonus)
    # verl's own loss knows nothing of the means that come with ours.
    assert their_metrics.keys() == metrics.keys() - (
        set() if theirs == "egpo" else {f"egpo/{key}" for key in losses.MEANS}
    )
    size = max(1.0, float(expected.loss.abs()), float(size_of(BATCH, expected)))
    for key, value in their_metrics.items():
        if not isinstance(value, Metric):
            assert metrics[key] == value
            continue
        assert metrics[key].aggregation is value.aggregation, key
        assert_rounding(torch.tensor([*metrics[key].values, size]), torch.tensor([*value.values, size]))


def test_engine_loss_without_entropy_and_weights():
    for loss_mode in DIRECT:
        config = actor(loss_mode=loss_mode)
        more = {"entropy": False, "weights": False, "ref": False}
        found, _, metrics = engine(ours.engine_loss, BATCH, config, False, **more)
        expected, _, theirs = engine(ppo_loss, BATCH, config, False, **more)
        assert_bits(found.loss, expected.loss, loss_mode)
        assert_bits(found.gradient, expected.gradient, loss_mode)
        assert metrics.keys() == theirs.keys()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_mode": "vanilla"}, r"actor\.policy_loss\.loss_mode is 'vanilla'; it must be one of egpo, "),
        ({"use_kl_loss": True, "kl_loss_type": "k3+"}, r"actor\.kl_loss_type is 'k3\+'; it must be one of kl, k1, "),
        ({"use_kl_loss": True, "kl_loss_coef": -1.0}, r"actor\.kl_loss_coef is -1\.0; it must be"),
        ({"entropy_coeff": float("nan")}, r"actor\.entropy_coeff is nan; it must be"),
        ({"entropy_coeff": 0.1, "entropy": False}, r"actor\.entropy_coeff is 0\.1 and the model gives no entropy"),
    ],
)
def test_refused_engine_losses(options, message):
    entropy = options.pop("entropy", True)
    with pytest.raises(ValueError, match=message):
        engine(ours.engine_loss, BATCH, actor(**options), False, entropy=entropy)


def test_a_step_of_verls_worker(tmp_path):
    (tmp_path / "model").mkdir()
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | one | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "tests.integrations.verl_worker", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.endswith("the same step\n"), done.stderr


# Advantages.


UID = np.array(["b", "a", "b", "c", "a", "b", "a", "c"], dtype=object)
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])


def rollout(rewards=REWARDS, uid=UID, log_probs="old_log_probs", scores=None, rows=slice(None)):
    token_rewards = torch.zeros(BATCH.mask.shape)
    token_rewards[:, 0], token_rewards[:, 1] = rewards - 0.25, 0.25
    tensors = {"token_level_rewards": token_rewards, "response_mask": BATCH.mask.long()}
    tensors |= {"token_level_scores": token_rewards if scores is None else scores[:, None] * (torch.arange(24) == 5)}
    tensors |= {log_probs: BATCH.old_log_probs} if log_probs else {}
    return DataProto.from_dict({name: values[rows] for name, values in tensors.items()}, {"uid": uid[rows]})


def algorithm(adv_estimator="egpo", kind="hydra", **settings):
    """``config.algorithm`` of the trainers (in struct mode, as hydra makes it), or verl's dataclass."""
    if kind == "dataclass":
        config = AlgoConfig(adv_estimator=adv_estimator)
        if settings:
            config.egpo = settings
        return config
    config = OmegaConf.create(dataclasses.asdict(AlgoConfig(adv_estimator=adv_estimator)))
    if settings:
        config.egpo = settings
    OmegaConf.set_struct(config, True)
    return config


def advantages(data, config, through="ray_trainer", **more):
    named = {"adv_estimator": config.adv_estimator, "gamma": 1.0, "lam": 1.0, "num_repeat": 4, "config": config, **more}
    if through == "ray_trainer":
        return ray_trainer.compute_advantage(data, **named)
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(data.non_tensor_batch["uid"])]
    return v1.compute_advantage_for_multi_trajectories(data, batch_keys=keys, **named)


def expected_advantages(rewards=REWARDS, uid=UID, config=ek.recipes.EGPO.advantage, correct=None, rows=slice(None)):
    found = ek.group_advantages(
        list(uid[rows]), rewards[rows], BATCH.old_log_probs[rows], BATCH.mask[rows], config=config, correct=correct
    )
    return found.advantages[:, None] * BATCH.mask[rows]


@pytest.mark.parametrize("through", ["ray_trainer", "v1"])
@pytest.mark.parametrize("kind", ["hydra", "dataclass"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nsr_scale": 0.5, "weight_bounds": [0.9, 1.5]},
        {"recipe": "egpo_c5"},
        {"recipe": "dapo"},
        {"recipe": "rloo", "singleton": "raw"},
    ],
    ids=str,
)
def test_advantages_are_our_own(settings, kind, through):
    data = advantages(rollout(), algorithm(kind=kind, **settings), through)
    changes = {name: value for name, value in settings.items() if name != "recipe"}
    recipe = ek.recipes.RECIPES[settings.get("recipe", "egpo")]
    expected = expected_advantages(config=recipe.replace(**changes).advantage)
    assert_bits(data.batch["advantages"], expected, "advantages")
    assert_bits(data.batch["returns"], expected, "returns")
    assert expected.any()


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 8), st.lists(st.sampled_from("abc"), min_size=8, max_size=8))
def test_groups_may_come_in_any_order(order, size, names):
    uid = np.array([f"{name}-{name}" for name in names], dtype=object)
    rows = list(order[:size])
    data = advantages(rollout(uid=uid).select_idxs(rows), algorithm(), "v1")
    assert_bits(data.batch["advantages"], expected_advantages(uid=uid, rows=rows), "advantages")


def test_other_estimators_are_verls():
    data = advantages(rollout(), algorithm("grpo"))
    plain = ray_trainer.compute_advantage.__wrapped__(
        rollout(), adv_estimator="grpo", config=algorithm("grpo"), num_repeat=4
    )
    assert_bits(data.batch["advantages"], plain.batch["advantages"], "advantages")
    assert v1.compute_advantage is ray_trainer.compute_advantage


@pytest.mark.parametrize("through", ["ray_trainer", "v1"])
def test_correctness_is_of_the_scores(through):
    rewards = REWARDS - 0.9  # a KL in the rewards
    data = advantages(rollout(rewards, scores=REWARDS), algorithm(), through)
    assert_bits(data.batch["advantages"], expected_advantages(rewards, correct=REWARDS > 0.5), "advantages")
    assert not torch.equal(data.batch["advantages"], expected_advantages(rewards))
    unscored = rollout(rewards)
    del unscored.batch["token_level_scores"]
    assert_bits(advantages(unscored, algorithm()).batch["advantages"], expected_advantages(rewards), "advantages")


def test_all_wrong_with_a_kl_in_the_rewards():
    """Such rewards differ, and the rule for groups that agree does not see them; the page names the one that does."""
    assert "+algorithm.egpo.all_wrong=negative_no_correct" in PAGES["docs/verl.md"]
    wrong = torch.zeros(8)
    data = advantages(rollout(-torch.arange(8) / 100, scores=wrong), algorithm(all_wrong="negative_no_correct"))
    assert_bits(data.batch["advantages"], expected_advantages(wrong), "advantages")


def test_log_probs_of_the_sampler_do():
    data = advantages(rollout(log_probs="rollout_log_probs"), algorithm())
    assert_bits(data.batch["advantages"], expected_advantages(), "advantages")
    both = rollout()
    both.batch["rollout_log_probs"] = -torch.rand(BATCH.mask.shape)
    assert_bits(advantages(both, algorithm()).batch["advantages"], expected_advantages(), "advantages")
    without = advantages(rollout(log_probs=None), algorithm(weight="none"))
    config = ek.recipes.EGPO.replace(weight="none").advantage
    assert_bits(without.batch["advantages"], expected_advantages(config=config), "advantages")


def test_sessions_of_several_outputs():
    """With adv_estimator=grpo verl passes on only the last output of a session and spreads its advantage."""
    keys = ["p_0_0", "p_0_1", "p_1_0", "p_2_0", "p_2_1", "p_3_0", "p_4_0", "p_5_0"]
    config, uid = algorithm("grpo", recipe="egpo"), np.array(["p"] * 8, dtype=object)
    data = v1.compute_advantage_for_multi_trajectories(
        rollout(uid=uid), batch_keys=keys, adv_estimator="grpo", config=config
    )
    last = [1, 2, 4, 5, 6, 7]
    found = ek.group_advantages(6, REWARDS[last], BATCH.old_log_probs[last], BATCH.mask[last]).advantages
    spread = found[[0, 0, 1, 2, 2, 3, 4, 5]]
    assert_bits(data.batch["advantages"], spread[:, None] * BATCH.mask, "advantages")


def test_a_mask_is_made_where_there_is_none():
    data = rollout()
    del data.batch["response_mask"]
    data.batch["responses"] = torch.zeros(8, 24).long()
    data.batch["attention_mask"] = torch.cat([torch.ones(8, 3), BATCH.mask], -1).long()
    assert_bits(advantages(data, algorithm()).batch["advantages"], expected_advantages(), "advantages")


@pytest.mark.parametrize(
    "config, given, message",
    [
        (algorithm(nsr_scale=-1.0), {}, r"algorithm\.egpo\.nsr_scale is -1\.0; it must be"),
        (algorithm(clip_high=0.2), {}, r"algorithm\.egpo has no setting 'clip_high'; it must be one of baseline, "),
        (algorithm(recipe="ppo"), {}, r"algorithm\.egpo: recipe is 'ppo'; it must be .* one of egpo, "),
        (algorithm(recipe="edge_grpo"), {}, r"entropy is None with weight .* statistic 'shannon'; it must be given"),
        (algorithm(), {"log_probs": None}, r"neither old_log_probs nor rollout_log_probs.*calculate_log_probs=True"),
        (algorithm("rloo", nsr_scale=0.5), {}, r"algorithm\.adv_estimator is 'rloo' beside algorithm\.egpo"),
        (algorithm("gae", nsr_scale=0.5), {}, r"algorithm\.adv_estimator is 'gae' beside algorithm\.egpo"),
        (
            OmegaConf.create({"adv_estimator": "egpo", "egpo": [1]}),
            {},
            r"algorithm\.egpo is \[1\]; it must be settings",
        ),
        (
            OmegaConf.create({"adv_estimator": "egpo", "egpo": True}),
            {},
            r"algorithm\.egpo is True; it must be settings",
        ),
    ],
)
def test_refused_advantages(config, given, message):
    with pytest.raises(ValueError, match=message):
        advantages(rollout(**given), config)


def test_verls_own_normalisation_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.norm_adv_by_std_in_grpo is False; it must be True here"):
        advantages(rollout(), algorithm(), norm_adv_by_std_in_grpo=False)


# How verl finds us.

DISCOVERY = """
import sys, warnings
import verl
print("verl.trainer.ppo.core_algos" in sys.modules, "egpo_kernels.integrations.verl" in sys.modules)
warnings.simplefilter("ignore")
from verl.trainer.ppo import core_algos
print(core_algos.get_policy_loss_fn("egpo").func.__module__)
import verl.trainer.ppo.v1.utils as v1
print(v1.compute_advantage.__wrapped__.__module__)
"""


def test_verl_finds_the_plugin(tmp_path):
    """A distribution with the entry point that pyproject.toml declares; importing verl imports no trainer for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name, target), *others = project["entry-points"]["verl.plugins"].items()
    assert not others
    folder = tmp_path / "egpo_kernels-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: egpo_kernels\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(f"[verl.plugins]\n{name} = {target}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    environment.pop("VERL_USE_EXTERNAL_PLUGINS", None)
    done = subprocess.run(
        [sys.executable, "-c", DISCOVERY], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "False",
        "True",
        "egpo_kernels.integrations.verl_losses",
        "verl.trainer.ppo.ray_trainer",
    ]


def test_importing_twice_changes_nothing():
    before = list(sys.meta_path)
    try:
        importlib.reload(ours)
        found, _ = registered(BATCH, "egpo", "token-mean", actor())
        expected, _ = registered(BATCH, "vanilla", "token-mean", actor())
        assert_same(found, expected, size_of(BATCH, expected))
        assert_bits(advantages(rollout(), algorithm()).batch["advantages"], expected_advantages(), "advantages")
    finally:
        sys.meta_path[:] = before


def another_verl(name, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


@pytest.mark.parametrize(
    "module, what",
    [
        (another_verl("verl.trainer.ppo.core_algos"), "register_policy_loss"),
        (another_verl("verl.trainer.ppo.ray_trainer"), "compute_advantage"),
        (
            another_verl("verl.trainer.ppo.ray_trainer", compute_advantage=lambda data, kind: data),
            "lacks adv_estimator",
        ),
    ],
)
def test_a_verl_that_we_do_not_know_is_told_of(module, what):
    with pytest.warns(
        RuntimeWarning, match=rf"adds nothing to {module.__name__} of verl .*{what}.*verl 0\.9\.1: install"
    ):
        ours._attach(module)


def test_command_line():
    """verl's own configuration, with hydra's overrides as the page has them."""
    hydra = importlib.import_module("hydra")
    overrides = [
        "algorithm.adv_estimator=egpo",
        "+algorithm.egpo.recipe=egpo_c5",
        "+algorithm.egpo.nsr_scale=0.5",
        "+algorithm.egpo.weight_bounds=[0.9,1.5]",
        "actor_rollout_ref.actor.policy_loss.loss_mode=egpo",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.clip_ratio_high=0.28",
    ]
    assert all(override in PAGES["docs/verl.md"] for override in overrides[:5])
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides)
    data = advantages(rollout(), config.algorithm, "v1")
    recipe = ek.recipes.EGPO_C5.replace(nsr_scale=0.5, weight_bounds=(0.9, 1.5))
    assert_bits(data.batch["advantages"], expected_advantages(config=recipe.advantage), "advantages")
    found, _ = registered(BATCH, "egpo", "token-mean", omega_conf_to_dataclass(config.actor_rollout_ref.actor))
    direct = ek.PolicyLossConfig(clip_high=0.28, dual_clip=3.0)
    expected = ek.policy_loss(BATCH.log_probs, BATCH.old_log_probs, BATCH.advantages, BATCH.mask, config=direct)
    assert_bits(found.loss, expected.loss, "loss")


# The page.


def test_page():
    losses = []
    group = types.SimpleNamespace(set_loss_fn=losses.append)
    names = run("docs/verl.md", {"actor_config": actor(), "worker_group": group, "data": rollout()})
    data, output = micro_batch(BATCH, padded=False)
    loss, _ = losses[0](model_output={"log_probs": output(BATCH.log_probs)}, data=data, dp_group=None)
    expected, _ = registered(BATCH, "egpo", "token-mean", actor(), BATCH.weights)
    assert_bits(loss, expected.loss, "loss")
    assert_bits(names["data"].batch["advantages"], expected_advantages(), "advantages")
