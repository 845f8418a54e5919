"""What is refused, and in which words: a message names the argument, what it is and what it must be."""

import re

import numpy as np
import pytest
import torch

import egpo_kernels as ek
from tests.support.batches import BACKENDS, LAYOUTS, make_batch
from tests.support.calls import FUNCTIONS, LOSS, OF_HIDDEN, OF_LOGITS, call, lead, valid
from tests.support.garbage import quiet

TENSORS = [
    (name, key, layout)
    for layout in LAYOUTS
    for name in FUNCTIONS
    for key, value in valid(name, layout).items()
    if torch.is_tensor(value)
]
REAL = ("mask", "entropy_mask", "advantages", "rewards", "rollout_weights", "temperature", "num_sequences")


def refused(name, key, value, layout="padded", backend="portable"):
    """The message of the error that the value gives."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call(name, valid(name, layout) | {key: value}, backend)
    message = str(caught.value)
    assert re.search(rf"\b{key}\b", message), message
    return message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*FUNCTIONS, "next_token_targets"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_valid_arguments_are_accepted(name, layout, backend):
    arguments = valid(name, layout)
    before = {key: value.clone() for key, value in arguments.items() if torch.is_tensor(value)}
    call(name, arguments, backend)
    assert all(torch.equal(arguments[key], value) for key, value in before.items())


# Tensors.


def every_backend(test):
    # What is refused is refused before a device is asked.
    return pytest.mark.cpu(pytest.mark.parametrize("backend", BACKENDS)(test))


@pytest.mark.parametrize("name, key, layout", TENSORS)
@every_backend
def test_tensor_of_a_wrong_kind(name, key, layout, backend):
    given = valid(name, layout)[key]
    wrong = [given.to(torch.complex64), {}, object()]
    wrong += [torch.empty(given.shape, dtype=dtype) for dtype in (torch.int4, torch.bits8, torch.float8_e5m2)]
    if key != "groups":
        wrong.append([0.0] * 4)
    if key in ("tokens", "groups", "cu_seqlens"):
        wrong += [given.float(), given.bool()]
    elif key not in REAL:
        wrong.append(given.long())
    for value in wrong:
        message = refused(name, key, value, layout, backend)
        assert re.search(r"\bmust be\b", message), message


# Logits, log-probs and offsets say what shape the others must have.
SHAPED = [case for case in TENSORS if case[1] not in (lead(case[0]), "cu_seqlens")]


@pytest.mark.parametrize("name, key, layout", SHAPED)
@every_backend
def test_tensor_of_a_wrong_shape(name, key, layout, backend):
    given = valid(name, layout)[key]
    for value in (given[None], given[..., None, None], given.flatten()[:1].expand(3), given.flatten()[:0]):
        message = refused(name, key, value, layout, backend)
        assert str(list(value.shape)) in message or f"{len(value)} entries" in message, message


@pytest.mark.parametrize("name, key, layout", TENSORS)
@every_backend
def test_tensor_on_another_device(name, key, layout, backend):
    value = valid(name, layout)[key].to("meta")
    if key in ("logits", "log_probs", "hidden") or (name, key) == ("group_advantages", "rewards"):
        # It says where the others must be.
        with pytest.raises(ValueError, match=r"is on cpu; it must be on meta|backend is 'triton'"):
            call(name, valid(name, layout) | {key: value}, backend)
    else:
        assert "is on meta; it must be on cpu" in refused(name, key, value, layout, backend)


# num_sequences is 0-d, and 0-d tensors are always dense.
@pytest.mark.parametrize("name, key, layout", [case for case in TENSORS if case[1] != "num_sequences"])
@every_backend
def test_tensor_that_is_not_dense(name, key, layout, backend):
    given = valid(name, layout)[key]
    assert "dense" in refused(name, key, given.to_sparse(), layout, backend)
    if given.dim() > 1:
        with quiet():
            nested = [torch.nested.nested_tensor(list(given), layout=kind) for kind in (torch.strided, torch.jagged)]
        for value in nested:
            assert "dense" in refused(name, key, value, layout, backend)


# Logits.


@pytest.mark.parametrize("name", OF_LOGITS)
def test_logits(name):
    logits = valid(name)["logits"]
    assert "int64" in refused(name, "logits", logits.long())
    assert "float8" in refused(name, "logits", logits.to(torch.float8_e4m3fn))
    assert "must not be empty" in refused(name, "logits", logits[..., :0])
    assert "pass logits.contiguous()" in refused(name, "logits", logits.transpose(1, 2).contiguous().transpose(1, 2))
    assert "[S, T, V]" in refused(name, "logits", logits[0, 0])
    if name != "token_log_probs":
        assert "[S, T, V]" in refused(name, "logits", logits[0])
        assert "[N, V]" in refused(name, "logits", logits, layout="packed")


# Hidden states and the output layer.


@pytest.mark.parametrize("name", OF_HIDDEN)
def test_hidden_and_weight(name):
    hidden, weight = (valid(name)[key] for key in ("hidden", "weight"))
    assert "[S, T, H]" in refused(name, "hidden", hidden[0, 0])
    assert "H = 4" in refused(name, "weight", weight[:, :3])
    for value in (hidden.long(), hidden.to(torch.float8_e4m3fn)):
        assert "must be a floating" in refused(name, "hidden", value)
    for value in (weight[:0], weight[0], weight[None], weight[..., :0], weight.new_empty(0)):
        assert "it must be a whole [V, H] with H = 4" in refused(name, "weight", value)
    for key, value in (("weight", weight.double()), ("weight", weight.half()), ("bias", weight[:, 0].bfloat16())):
        with pytest.raises(TypeError, match=f"{key} has dtype .*; it must be torch.float32 like hidden"):
            call(name, valid(name) | {key: value})
    if name != "linear_token_log_probs":
        assert "[S, T, H]" in refused(name, "hidden", hidden[0])
        assert "[N, H]" in refused(name, "hidden", hidden, layout="packed")


@pytest.mark.parametrize("name", OF_HIDDEN)
@every_backend
def test_adapters(name, backend):
    lora_a, lora_b, scale = valid(name)["lora"]
    wrong = [lora_a, (lora_a, lora_b), (lora_a, lora_b, scale, 1), {"A": lora_a}, "lora", 1.0]
    wrong += [(lora_b, lora_a, scale), (lora_a[:1], lora_b, scale), (lora_a[:, :3], lora_b, scale)]
    wrong += [(lora_a, lora_b[:-1], scale), (lora_a[0], lora_b, scale), (lora_a, lora_b[None], scale)]
    wrong += [(lora_a.double(), lora_b, scale), (lora_a, lora_b.half(), scale), (lora_a.long(), lora_b, scale)]
    wrong += [(lora_a.to("meta"), lora_b, scale), (None, lora_b, scale), (lora_a, lora_b.to_sparse(), scale)]
    wrong += [(lora_a, lora_b, value) for value in (None, "1", True, torch.nan, torch.inf, 1e30, torch.tensor(1.0))]
    for value in wrong:
        assert "must be" in refused(name, "lora", value, backend=backend)


@pytest.mark.parametrize("name", OF_HIDDEN)
@every_backend
def test_too_few_active_rows(name, backend):
    counted = int(valid(name)["mask"].sum())
    call(name, valid(name) | {"num_active": counted}, backend)
    message = refused(name, "num_active", counted - 1, backend=backend)
    assert f"num_active is {counted - 1}, and {counted} rows count" in message


# Numbers, flags and choices.

NUMBERS = {
    "grad_scale": ([0, 0.0, -1.0, torch.nan, torch.inf, 1e39, 1e-320, 10**400], [None, "1", True, torch.tensor(1.0)]),
    "num_tokens": (
        [-1, -0.5, torch.nan, torch.inf, 10**400, torch.ones(1), torch.tensor(-1), torch.tensor(torch.nan)],
        ["12", True, [12], torch.tensor(1j)],
    ),
    "num_sequences": ([-1, torch.ones(4)], ["12", False, {}]),
    "temperature": (
        [0, 0.0, -0.7, torch.nan, torch.inf, 1e308, 1e-320, 10**400, torch.ones(3)],
        [None, "1", True, [1.0]],
    ),
    "logit_scale": ([0, 0.0, -1.0, torch.nan, torch.inf, 1e39, 1e-320, 10**400], [None, "1", True, torch.tensor(1.0)]),
    "logit_softcap": ([0, -30.0, torch.nan, torch.inf, 1e7, 10**400], ["30", True, torch.tensor(30.0)]),
    "num_active": ([-1, 2**63], ["2", 2.0, True, torch.tensor(2)]),
    "max_chunk_bytes": ([0, -1, 2**63], ["2", 2.0, True, torch.tensor(2)]),
    "group_size": ([0, -2, 10**30], ["2", 2.0, True, torch.tensor(2)]),
    "inplace_grad": ([], [None, 1, "no", torch.tensor(True)]),
    "return_entropy": ([], [None, 1, "no", torch.tensor(True)]),
    "metrics": (["some", ""], [None, True, ["all"]]),
    "recipe": (["ppo", ""], [None, 3, LOSS, ek.Recipe]),
    "config": ([], [None, "egpo", {}, ek.Recipe(), ek.PolicyLossConfig, ek.AdvantageConfig]),
}
CASES = [(name, key) for name in FUNCTIONS for key in NUMBERS if key in valid(name)]


@pytest.mark.parametrize("name, key", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_numbers_flags_and_choices(name, key, layout, backend):
    values, types = NUMBERS[key]
    for value in values + types:
        assert "must be" in refused(name, key, value, layout, backend)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backend(name):
    for value, error in (("cuda", ValueError), (None, TypeError), (3, TypeError), (["triton"], TypeError)):
        with pytest.raises(error, match=r"backend is .*; it must be one of 'auto', 'triton', 'portable', 'reference'"):
            call(name, valid(name), value)


@pytest.mark.parametrize("name", ["egpo_loss", "group_advantages"])
def test_groups(name):
    names = [[1, 2, 3], [("a", 1.5)] * 4, [1.5] * 4, [None] * 4, [[1]] * 4, np.ones((4, 2)), np.ones(4), np.array(4)]
    for value in (0, -1, 3, 10**400, True, None, 2.0, "aabb", {1, 2}, *names):
        assert "must" in refused(name, "groups", value)
    assert "group_size = 2" in refused(name, "groups", [1, 1, 1, 2])


# Arguments that need one another.


@pytest.mark.parametrize("name", ["egpo_loss", "logits_policy_loss", "policy_loss"])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_kl_needs_a_reference(name, layout, backend):
    assert "kl_coef = 0.1" in refused(name, "ref_log_probs", None, layout, backend)


def test_entropy_bonus_needs_the_entropy():
    arguments = valid("policy_loss") | {"config": ek.PolicyLossConfig(entropy_coef=0.1), "entropy": None}
    with pytest.raises(ValueError, match=r"entropy is None with entropy_coef = 0.1"):
        call("policy_loss", arguments)


@pytest.mark.parametrize("name", ["egpo_loss", "group_advantages", "policy_loss", "logits_policy_loss"])
def test_layouts_do_not_mix(name):
    offsets = make_batch("packed").cu_seqlens
    for value in (offsets, [0, 3, 7], 3):
        refused(name, "cu_seqlens", value)
    packed = {key: valid(name, "packed")[key] for key in valid(name)}
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(name, packed | {"cu_seqlens": None})
    for value in (offsets.float(), offsets[:0], offsets[None], [0, 3, 7, 9, 13], offsets.to("meta")):
        refused(name, "cu_seqlens", value, layout="packed")


def test_weights_per_sequence_must_be_as_many():
    rewards = torch.ones(3)
    with pytest.raises(ValueError, match="rewards has 3 entries; old_log_probs holds 4 sequences"):
        call("group_advantages", valid("group_advantages") | {"rewards": rewards, "correct": None, "groups": [1, 1, 1]})
    for value in (torch.ones(4, 1), torch.tensor(1.0)):
        assert "must be [S]" in refused("group_advantages", "rewards", value)
    for value in ([1.0, 0, 1, 0], None):
        assert "must be a real torch.Tensor" in refused("group_advantages", "rewards", value)


def test_next_token_targets():
    ids = torch.ones(2, 3, dtype=torch.long)
    for value in (None, [[1, 2]], ids.float(), torch.tensor(1), ids.bool()):
        refused("next_token_targets", "input_ids", value)
    for value in ([[1, 1, 1]], torch.ones(2, 2), torch.ones(2, 3, device="meta"), torch.ones(2, 3) * 1j):
        refused("next_token_targets", "mask", value)
    for value in (
        [0, 3],
        torch.tensor([0.0, 3.0]),
        torch.tensor([0, 2, 1]),
        torch.tensor([0, 7]),
        torch.tensor([1, 3]),
    ):
        with pytest.raises((TypeError, ValueError), match="cu_seqlens"):
            ek.next_token_targets(ids[:1], cu_seqlens=value)
    with pytest.raises(ValueError, match=r"input_ids has shape \[2, 3\] with cu_seqlens; it must be packed"):
        ek.next_token_targets(ids, cu_seqlens=torch.tensor([0, 6]))
    for value in ([[0, 1, 2]], ids[0], ids.float(), ids.to("meta")):
        with pytest.raises((TypeError, ValueError), match="position_ids"):
            ek.next_token_targets(ids, position_ids=value)
    with pytest.raises(ValueError, match=r"position_ids is .* with cu_seqlens"):
        ek.next_token_targets(ids[:1], cu_seqlens=torch.tensor([0, 3]), position_ids=ids[:1])
