"""Rows that verl appends so that a batch divides evenly change nothing.

verl 0.9.1, `verl/trainer/ppo/padding_utils.py` (`construct_minimal_padding_template`,
`upsample_batch_to_divisible_size`): 127 prompt tokens and one response token, the response mask 0, the reward 0, all
such rows in one group of their own. Their log-probs are what the policy makes of them: here NaN and large numbers.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed (make parity installs it)")

from verl import DataProto
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils import tensordict_utils as tu

import egpo_kernels as ek
from egpo_kernels.integrations import verl_losses as losses
from tests.integrations.verl_runs import (
    BATCH,
    PART,
    UID,
    WHOLE,
    actor,
    advantages,
    algorithm,
    micro_batch,
    nested,
    registered,
    rollout,
)
from tests.parity.batch import Batch
from tests.support.accuracy import assert_bits

GARBAGE = [torch.nan, torch.inf, -1e4]
PADDED = Batch(
    *(torch.cat([values, torch.tensor(GARBAGE)[:, None].expand(3, 24)]) for values in BATCH[:6]),
    mask=torch.cat([BATCH.mask, torch.zeros(3, 24, dtype=torch.bool)]),
    advantages=torch.cat([BATCH.advantages, torch.zeros(3)]),
)
# Without parts of the batch that are said to be elsewhere, and with them.
COUNTS = pytest.mark.parametrize("counts", [WHOLE, PART], ids=["whole", "part"])


@COUNTS
@pytest.mark.parametrize("mode", losses.MODES)
@pytest.mark.parametrize("loss_mode", losses.LOSSES)
def test_registered_losses(loss_mode, mode, counts):
    config = actor(loss_mode=loss_mode, info=counts)
    found, metrics = registered(PADDED, loss_mode, mode, config, PADDED.weights)
    expected, plain = registered(BATCH, loss_mode, mode, config, BATCH.weights)
    assert_bits(found.loss, expected.loss, "loss")
    assert_bits(found.gradient, torch.cat([expected.gradient, torch.zeros(3, 24)]), "gradient")
    assert metrics == plain


def template():
    """A row as verl makes it, from the first of the batch."""
    data, _ = micro_batch(BATCH, padded=False)
    source = {name: value.unbind()[0] for name, value in data.items() if isinstance(value, torch.Tensor)}
    return construct_minimal_padding_template(source, {}, eos_token_id=2)[0]


def engine(config, counts, pads):
    """Loss, gradients of log-probs and entropies, of verl's rows too, and metrics."""
    data, output = micro_batch(BATCH, padded=False, counts=counts)
    tensors = {name: [*value.unbind()] for name, value in data.items() if isinstance(value, torch.Tensor)}
    made = template()
    for name, rows in tensors.items():
        for value in GARBAGE[:pads]:
            # What verl computes for its rows, and what it makes; advantages are 0 times something.
            computed = torch.tensor([0.0 if name == "advantages" else value])
            rows.append(made[name] if name in ("prompts", "responses", "response_mask") else computed)
    info = {name: data[name] for name in ("batch_num_tokens", "global_batch_size", "dp_size")}
    data = tu.get_tensordict({name: nested(rows) for name, rows in tensors.items()}, info)
    leaves = {"log_probs": BATCH.log_probs, "entropy": BATCH.entropy}
    leaves = {name: values.clone().requires_grad_() for name, values in leaves.items()}
    theirs = torch.tensor(GARBAGE)[:, None].repeat(1, 128).requires_grad_()
    given = {name: nested([*output(leaf).unbind(), *theirs[:pads]]) for name, leaf in leaves.items()}
    loss, metrics = losses.engine_loss(config, model_output=given, data=data)
    loss.backward()
    numbers = {name: getattr(value, "values", value) for name, value in metrics.items()}
    gradients = [torch.zeros(8, 24) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
    return loss.detach(), *gradients, theirs.grad, numbers


@COUNTS
@pytest.mark.parametrize("kl", ["k1", "mse", "low_var_kl"])
@pytest.mark.parametrize("mode", losses.MODES)
def test_engine_loss(mode, kl, counts):
    bonus = {"entropy_coeff": 0.1, "use_kl_loss": True, "kl_loss_type": kl, "kl_loss_coef": 0.2}
    config = actor(loss_agg_mode=mode, loss_scale_factor=counts.get("loss_scale_factor"), **bonus)
    loss, gradient, of_entropy, of_padding, metrics = engine(config, counts, 3)
    expected, plain, plain_of_entropy, _, plain_metrics = engine(config, counts, 0)
    assert_bits(loss, expected, "loss")
    assert_bits(gradient, plain, "gradient")
    assert_bits(of_entropy, plain_of_entropy, "gradient of the entropies")
    assert_bits(of_padding, torch.zeros(3, 128), "gradient of the padding")
    assert metrics == plain_metrics


def with_padding(data, count):
    """A rollout batch with verl's rows, as its trainer pads them to a common width."""
    made, width = template(), data.batch["response_mask"].shape[1]
    reward = torch.nn.functional.pad(made["rm_scores"], (0, width - 1)).expand(count, width)
    mask = torch.nn.functional.pad(made["response_mask"], (0, width - 1)).expand(count, width)
    log_probs = torch.tensor(GARBAGE)[:count, None] * (torch.arange(width) < 1)
    more = {"token_level_rewards": reward, "token_level_scores": reward, "response_mask": mask}
    more["old_log_probs"] = log_probs
    uid = np.array(["pad0123456789abcdef0123456789abcdef"] * count, dtype=object)
    tensors = {name: torch.cat([values, more[name]]) for name, values in data.batch.items()}
    return DataProto.from_dict(tensors, {"uid": np.concatenate([data.non_tensor_batch["uid"], uid])})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("through", ["ray_trainer", "v1"])
@pytest.mark.parametrize("adv_estimator", ["egpo", "grpo"])
@pytest.mark.parametrize("recipe", sorted(ek.recipes.RECIPES.keys() - {"edge_grpo"}))
def test_advantages(recipe, adv_estimator, through, count):
    """LITE_PPO divides by the spread of the batch's rewards, to which verl's rows would add their zeros."""
    config = algorithm(adv_estimator, recipe=recipe)
    uid = np.array([f"{name}-{name}" for name in UID], dtype=object)
    found = advantages(with_padding(rollout(uid=uid), count), config, through).batch["advantages"]
    expected = advantages(rollout(uid=uid), config, through).batch["advantages"]
    assert_bits(found, torch.cat([expected, torch.zeros(count, 24)]), "advantages")
    assert expected.any()


def test_an_empty_response_of_a_group_still_counts_with_its_reward():
    """Such as verl's rejection sampling leaves: the others of its group are compared with it."""
    data = rollout()
    data.batch["response_mask"][4] = 0  # one of three of its group, and the one that is correct
    found = advantages(data, algorithm(recipe="grpo")).batch["advantages"]
    assert (found[[1, 6]][BATCH.mask[[1, 6]]] < 0).all() and not found[4].any()
