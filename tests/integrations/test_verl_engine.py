"""Our loss in verl's engines, in place of its `ppo_loss`."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed (make parity installs it)")

from verl.utils.metric import Metric
from verl.workers.utils.losses import ppo_loss

from egpo_kernels.integrations import verl_losses as losses
from tests.integrations.verl_runs import BATCH, PART, WHOLE, actor, engine
from tests.parity.batch import assert_same
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import ROOT

COUNTED = {"batch_num_tokens": 400}


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
    found, bonus, metrics = engine(losses.engine_loss, BATCH, actor(**more), padded, counts)
    expected, their_bonus, their_metrics = engine(ppo_loss, BATCH, actor(loss_mode=theirs, **more), padded, counts)
    assert_same(found, expected)
    assert_rounding(bonus, their_bonus)
    # verl's own loss knows nothing of the means that come with ours.
    assert their_metrics.keys() == metrics.keys() - (
        set() if theirs == "egpo" else {f"egpo/{key}" for key in losses.MEANS}
    )
    size = max(1.0, float(expected.loss.abs()), float(found.size))
    for key, value in their_metrics.items():
        if not isinstance(value, Metric):
            assert metrics[key] == value
            continue
        assert metrics[key].aggregation is value.aggregation, key
        assert_rounding(torch.tensor([*metrics[key].values, size]), torch.tensor([*value.values, size]))


def test_engine_loss_without_entropy_and_weights():
    for loss_mode in losses.LOSSES:
        config = actor(loss_mode=loss_mode)
        more = {"entropy": False, "weights": False, "ref": False}
        found, _, metrics = engine(losses.engine_loss, BATCH, config, False, **more)
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
        engine(losses.engine_loss, BATCH, actor(**options), False, entropy=entropy)


def test_a_step_of_verls_worker(tmp_path):
    (tmp_path / "model").mkdir()
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | one | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "tests.integrations.verl_worker", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.endswith("the same step\n"), done.stderr
