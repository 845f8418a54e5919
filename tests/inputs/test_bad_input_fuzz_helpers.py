"""Garbage for the helpers of a rollout batch: a documented error that names an argument, or a documented result."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.support.batches import LAYOUTS, make_batch
from tests.support.fuzz import CALM, attempt
from tests.support.garbage import garbage_for

HELPERS = ["rollout_weights", "off_policy_mask", "top_entropy_mask", "response_spans", "informative_groups"]
HELPERS += ["soft_overlong_penalty", "next_token_targets"]


def valid_helper(name, layout):
    """Arguments that a helper accepts."""
    batch = make_batch(layout)
    where = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens}
    both = {"log_probs": batch.old_log_probs, "sampler_log_probs": batch.ref_log_probs, **where}
    return {
        "rollout_weights": {**both, "level": "token", "outside": "mask", "bounds": (0.5, 2.0)},
        "off_policy_mask": {**both, "advantages": batch.advantages, "threshold": 0.1},
        "top_entropy_mask": {"entropy": -batch.old_log_probs, "fraction": 0.5, **where},
        "response_spans": {"tokens": batch.tokens, "close_tag": [1, 2], **where},
        "informative_groups": {"groups": batch.groups, "rewards": batch.rewards},
        "soft_overlong_penalty": {"lengths": batch.mask.sum(-1).reshape(-1), "max_length": 30, "buffer": 10},
        "next_token_targets": {"input_ids": batch.tokens, "mask": batch.mask, "cu_seqlens": batch.cu_seqlens},
    }[name]


def check_shapes(name, arguments, result):
    first = next(iter(arguments.values()))
    shape = {"informative_groups": "rewards", "off_policy_mask": "advantages"}.get(name)
    shape = first.shape if shape is None else arguments[shape].shape
    if name == "rollout_weights" and arguments["level"] == "sequence":
        offsets = arguments["cu_seqlens"]
        shape = (first.shape[0] if offsets is None else offsets.shape[0] - 1,)
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    if name == "response_spans":
        assert tensors.pop().shape == ()
    for tensor in tensors:
        assert tensor.shape == shape and not tensor.requires_grad
        assert name in ("rollout_weights", "soft_overlong_penalty", "next_token_targets") or tensor.dtype == torch.bool


@pytest.mark.parametrize("name", HELPERS)
@settings(max_examples=150, **CALM)
@given(data=st.data())
def test_garbage_for_helpers(name, data):
    arguments = valid_helper(name, data.draw(st.sampled_from(LAYOUTS)))
    names = data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=2, unique=True))
    arguments |= {key: data.draw(garbage_for(arguments[key]), label=key) for key in names}
    result = attempt(getattr(ek, name), arguments)
    if result is not None:
        check_shapes(name, arguments, result)


NO_BOUNDS = [(10**400, 10**401), (0.5, 10**400), (torch.inf, torch.inf), (1e-300, 2)]
NO_BOUNDS += ["ab", {0.5: 1, 2: 1}, np.array(1.0), np.ones((2, 2)), (1.0, 2.0, 3.0)]
NO_BOUNDS += [(torch.nan, 1.0), (1.0, 0.5), (-1, 1), (True, 2)]


@pytest.mark.parametrize("bounds", [(0, 2), [0.5, 2.0], np.array([0.5, 2.0]), [np.float32(0.5), np.int64(2)]])
def test_bounds_of_any_sequence(bounds):
    given = valid_helper("rollout_weights", "padded")
    found, wanted = (ek.rollout_weights(**given | {"bounds": each}) for each in (bounds, tuple(map(float, bounds))))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bounds", NO_BOUNDS)
def test_bounds_that_are_none(bounds):
    with pytest.raises((ValueError, TypeError), match=r"bounds is .* must be a pair"):
        ek.rollout_weights(**valid_helper("rollout_weights", "padded") | {"bounds": bounds})
