"""Our policy losses in verl's registry: the numbers of a direct call, and of verl's own losses."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("verl", reason="verl is not installed (make parity installs it)")

from omegaconf import OmegaConf
from verl.workers.config import ActorConfig

import egpo_kernels as ek
from egpo_kernels.integrations import verl_losses as losses
from tests.integrations.verl_runs import BATCH, PART, SETTINGS, WHOLE, actor, registered
from tests.parity.batch import Answer, Batch, assert_same, differentiated
from tests.support.accuracy import assert_bits, assert_rounding

DIRECT = {
    "egpo": {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5},
    "egpo_gspo": {"ratio": "sequence_token", "clip_low": 0.1, "clip_high": 0.28},
    "egpo_cispo": {"surrogate": "cispo", "clip_low": 0.1, "clip_high": 0.28},
    "egpo_sapo": {"surrogate": "sapo", "tau_positive": 1.2, "tau_negative": 1.3},
    "egpo_gmpo": {"surrogate": "gmpo", "clip_low": 0.1, "clip_high": 0.28},
}
SAME = {"egpo": "vanilla", "egpo_gspo": "gspo", "egpo_cispo": "cispo"}


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
    assert_same(found, expected)
    assert theirs.keys() < metrics.keys()
    for key, value in theirs.items():
        assert_rounding(torch.tensor([metrics[key], 1.0]), torch.tensor([value, 1.0]))
    assert theirs["actor/pg_clipfrac"] and (loss_mode != "egpo" or theirs["actor/pg_clipfrac_lower"])


def test_one_clip_ratio_stands_for_both():
    config = actor(clip_ratio_low=None, clip_ratio_high=None, clip_ratio=0.05)
    found, _ = registered(BATCH, "egpo", "token-mean", config)
    expected, _ = registered(BATCH, "vanilla", "token-mean", config)
    assert_same(found, expected)
    as_mapping = OmegaConf.create(SETTINGS | {"clip_ratio": 0.05, "global_batch_info": {}})
    as_mapping.clip_ratio_low = as_mapping.clip_ratio_high = None
    assert_bits(registered(BATCH, "egpo", "token-mean", as_mapping)[0].loss, found.loss, "DictConfig")


def test_what_a_mapping_lacks_is_what_verl_takes():
    config = OmegaConf.create({"clip_ratio": 0.2, "clip_ratio_low": None, "global_batch_info": {}})
    config.clip_ratio_high = None
    far = BATCH._replace(log_probs=BATCH.log_probs + 2.0)
    found, metrics = registered(far, "egpo", "token-mean", config)
    expected, theirs = registered(far, "vanilla", "token-mean", config)
    assert_same(found, expected)
    assert metrics["actor/pg_clipfrac_lower"] == theirs["actor/pg_clipfrac_lower"] > 0


def test_metrics_of_far_log_ratios_are_verls():
    far = BATCH._replace(old_log_probs=BATCH.old_log_probs - 50.0)
    (_, metrics), (_, theirs) = (registered(far, mode, "token-mean", actor()) for mode in ("egpo", "vanilla"))
    assert_rounding(torch.tensor(metrics["actor/ppo_kl"]), torch.tensor(theirs["actor/ppo_kl"]))


def test_a_sum_needs_no_count():
    config = actor(info={"dp_size": 2})
    found, expected = (registered(BATCH, mode, "token-sum", config)[0] for mode in ("egpo", "vanilla"))
    assert_same(found, expected)


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
    assert_same(expected, Answer(loss, gradient))


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
