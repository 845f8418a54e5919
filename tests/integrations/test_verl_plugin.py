"""How verl finds us, from an entry point and from its command line, and what the page says."""

import importlib
import os
import subprocess
import sys
import types

import pytest
import tomllib

pytest.importorskip("verl", reason="verl is not installed (make parity installs it)")

from verl.utils.config import omega_conf_to_dataclass

import egpo_kernels as ek
from egpo_kernels.integrations import verl as ours
from tests.integrations.stand_ins import stand_in
from tests.integrations.verl_runs import (
    BATCH,
    actor,
    advantages,
    algorithm,
    expected_advantages,
    micro_batch,
    registered,
    rollout,
)
from tests.parity.batch import assert_same
from tests.support.accuracy import assert_bits
from tests.support.page import PAGES, ROOT, run

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
        assert_same(found, expected)
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


@pytest.mark.filterwarnings("ignore:torchtitan engine is not available:UserWarning")
def test_page(monkeypatch):
    from verl.workers.engine import BaseEngine, EngineRegistry

    stand_in(monkeypatch, "megatron.core", parallel_state=types.SimpleNamespace())
    engine = {"MegatronEngineWithLMHead": type("MegatronEngineWithLMHead", (BaseEngine,), {})}
    stand_in(monkeypatch, "verl.workers.engine.megatron.transformer_impl", **engine)
    monkeypatch.setattr(EngineRegistry, "_engines", {})
    handed = []
    group = types.SimpleNamespace(set_loss_fn=handed.append)
    names = run("docs/verl.md", {"actor_config": actor(), "worker_group": group, "data": rollout()})
    data, output = micro_batch(BATCH, padded=False)
    loss, _ = handed[0](model_output={"log_probs": output(BATCH.log_probs)}, data=data, dp_group=None)
    expected, _ = registered(BATCH, "egpo", "token-mean", actor(), BATCH.weights)
    assert_bits(loss, expected.loss, "loss")
    assert_bits(names["data"].batch["advantages"], expected_advantages(), "advantages")
