"""Garbage thrown at every public function: a documented error that names an argument, or a result."""

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.support.batches import make_batch
from tests.test_validation import FUNCTIONS, valid

SHAPES = [
    (),
    (0,),
    (1,),
    (4,),
    (5,),
    (16,),
    (4, 1),
    (4, 4),
    (0, 4),
    (4, 0),
    (4, 4, 37),
    (15, 37),
    (4, 0, 37),
    (4, 4, 1),
]
WHOLE = [torch.int64, torch.int8, torch.uint32, torch.bool]
FLOATING = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2]
PLAIN = [
    None,
    True,
    False,
    0,
    1,
    2,
    4,
    -1,
    10**30,
    0.5,
    -0.5,
    float("nan"),
    float("inf"),
    1j,
    "",
    "x",
    "none",
    "egpo",
    b"x",
]
PLAIN += [(), [], [1, 2], [1, 1, 2, 2], ["a", "a", "b", "b"], [None] * 4, {}, {"a": 1}, object(), len, torch.float32]
PLAIN += [
    ek.AdvantageConfig(),
    ek.PolicyLossConfig(reduction="none"),
    ek.recipes.GRPO,
    ek.Recipe,
    np.float32(2),
    np.int64(2),
]
PLAIN += [np.ones(4), np.array(["a", "b"]), np.ones((4, 2), dtype=int), torch.nn.Linear(2, 2)]


def tensor(shape, dtype_and_fill, how):
    dtype, fill = dtype_and_fill
    made = torch.full(shape, fill, dtype=torch.float32).to(dtype)
    if how == "meta":
        return made.to("meta")
    if how == "sparse" and dtype in (torch.float32, torch.int64):
        return made.to_sparse()
    if how == "strided":
        return made.mT.contiguous().mT if made.dim() > 1 else made[::2] if made.dim() else made
    return made.requires_grad_() if how == "grad" and dtype in FLOATING[:4] else made


FILLED = st.one_of(
    st.tuples(st.sampled_from(WHOLE), st.sampled_from([0, 1, 3, 99])),
    st.tuples(st.sampled_from(WHOLE[:2]), st.sampled_from([-1, -100])),
    st.tuples(st.sampled_from(FLOATING), st.sampled_from([0.0, 1.0, -1.0, torch.nan, torch.inf, -torch.inf])),
)
TENSORS = st.builds(
    tensor, st.sampled_from(SHAPES), FILLED, st.sampled_from(["plain", "plain", "meta", "sparse", "strided", "grad"])
)
GARBAGE = st.one_of(TENSORS, st.sampled_from(PLAIN))


def snapshot(value):
    """What a tensor or array holds, NaN equal to NaN."""
    if isinstance(value, torch.Tensor) and not value.is_meta and value.layout == torch.strided:
        return repr((value if value.is_complex() else value.double()).tolist())
    return repr(value.tolist()) if isinstance(value, np.ndarray) else None


@pytest.mark.parametrize("name", [*FUNCTIONS, "next_token_targets"])
@settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_garbage_is_refused_by_name_or_answered(name, data):
    layout = data.draw(st.sampled_from(["padded", "packed"]))
    arguments = valid(name, layout)
    names = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=3, unique=True))
    arguments |= {key: data.draw(GARBAGE, label=key) for key in names}
    if name != "next_token_targets":
        arguments["backend"] = data.draw(st.sampled_from(["portable", "reference"]))
    before = {key: snapshot(value) for key, value in arguments.items()}
    try:
        result = getattr(ek, name)(**arguments)
    except (ValueError, TypeError) as error:
        # Each message names an argument (or a setting) that was given, and ends in what to do about it.
        assert re.search(rf"\b({'|'.join(arguments)})\b", str(error)), error
    else:
        assert isinstance(result, (ek.LossOutput, ek.GroupAdvantages, ek.TokenLogProbs, tuple))
    assert {key: snapshot(value) for key, value in arguments.items()} == before


def test_positional_arguments_are_counted():
    batch = make_batch()
    for name in ("egpo_loss", "logits_policy_loss"):
        with pytest.raises(TypeError, match="positional argument"):
            getattr(ek, name)(*[batch.logits] * 6)
    with pytest.raises(TypeError, match="old_logprobs"):
        ek.egpo_loss(batch.logits, batch.tokens, 2, batch.rewards, old_logprobs=batch.old_log_probs)
