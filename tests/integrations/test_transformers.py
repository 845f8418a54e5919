"""A fused model's losses and gradients are those of its own logits."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

import egpo_kernels as ek
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import (
    MODELS,
    VOCAB,
    assert_close_enough,
    assert_same,
    differentiated,
    from_logits,
    fused,
    fused_already,
    make_batch,
    make_model,
)
from tests.support.accuracy import assert_bits, assert_rounding


def both_ways(model, batch, **more):
    """In float64, where nothing but a mistake is visible."""
    model, batch = model.double(), batch.double()
    expected = from_logits(model, batch, **more)
    assert_same(fused(model, batch, **more), expected)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def batch(model):
    return make_batch(model)


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name):
    model = make_model(name)
    batch = make_batch(model)
    assert_close_enough(copy.deepcopy(model), batch)
    both_ways(model, batch)


@pytest.mark.parametrize("change", ["scale", "softcap"])
def test_scale_and_softcap_are_told_from_none(change):
    model = make_model("Granite" if change == "scale" else "Gemma2")
    batch = make_batch(model)
    expected = from_logits(model, batch).loss
    setattr(
        model.config,
        "logits_scaling" if change == "scale" else "final_logit_softcapping",
        1.0 if change == "scale" else None,
    )
    assert (fused(model, batch).loss - expected).abs() > 1e-3


@pytest.mark.parametrize("keep", [4, torch.tensor([3, 4, 7]), slice(2, 6)], ids=["last", "index", "slice"])
def test_logits_to_keep(model, batch, keep):
    places = slice(-keep, None) if isinstance(keep, int) else keep
    policy = {k: v[:, places] if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in batch.policy.items()}
    both_ways(model, batch._replace(policy=policy), logits_to_keep=keep)


def test_frozen_head(model, batch):
    model.lm_head.requires_grad_(False)
    both_ways(model, batch)


def test_bias(model, batch):
    model.lm_head = nn.Linear(16, VOCAB)
    both_ways(model, batch)


def test_tied_head(batch):
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    both_ways(model, batch)


def test_groups_and_rewards(model, batch):
    model, batch = model.double(), batch.double()
    rewards = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    given = {name: batch.policy[name] for name in ("tokens", "mask")} | {"groups": 2, "rewards": rewards}
    logits = model(batch.ids, attention_mask=batch.attention).logits
    expected = differentiated(model, ek.egpo_loss(logits, backend="reference", **given))
    assert_same(fused(model, batch._replace(policy=given)), expected)


def test_log_probs(model, batch):
    given = {"tokens": batch.policy["tokens"], "mask": batch.policy["mask"], "return_entropy": True}
    model = model.double()
    with torch.no_grad():
        expected = ek.token_log_probs(model(batch.ids).logits, **given)
        found = fuse_policy_loss(model)(batch.ids, policy=given)
    assert isinstance(found, ek.TokenLogProbs)
    assert_rounding(found.log_probs, expected.log_probs)
    assert_rounding(found.entropy, expected.entropy)


def test_packed(model, batch):
    """One row of several sequences, told apart by positions."""
    model, batch = model.double(), batch.double()
    inside = batch.attention.bool()
    ids, places = batch.ids[inside][None], torch.arange(9).expand(4, 9)[inside][None]
    policy = {k: v[inside] if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in batch.policy.items()}
    policy["cu_seqlens"] = nn.functional.pad(inside.sum(1).cumsum(0), (1, 0)).int()
    given = {"position_ids": places, "use_cache": False}  # with a cache transformers does not tell them apart
    logits = model(ids, **given).logits[0]
    expected = differentiated(model, ek.logits_policy_loss(logits, backend="reference", **policy))
    found = fuse_policy_loss(model)(ids, policy=policy, **given)
    assert_same(differentiated(model, found), expected)


def test_logits_are_never_made(model, batch, monkeypatch):
    """No tensor holds a row of the vocabulary for each position."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            flat = found if isinstance(found, (tuple, list)) else [found]
            sizes.extend(each.numel() for each in flat if isinstance(each, torch.Tensor))
            return found

    fuse_policy_loss(model)
    vocab, width = model.lm_head.weight.shape
    policy = batch.policy | {"max_chunk_bytes": 4 * 4 * vocab}
    with Watch():
        model(batch.ids, policy=policy).loss.backward()
    assert max(sizes) <= vocab * width < batch.ids.numel() * vocab


def test_without_policy_nothing_changes(model, batch):
    plain = copy.deepcopy(model)
    fuse_policy_loss(model)
    assert_bits(model(batch.ids).logits, plain(batch.ids).logits, "logits")
    labels = batch.ids
    assert_bits(model(batch.ids, labels=labels).loss, plain(batch.ids, labels=labels).loss, "loss")
    for each in (model, plain):
        each.generation_config.eos_token_id = None
    tokens = [
        each.generate(batch.ids, attention_mask=batch.attention, max_new_tokens=4, do_sample=False)
        for each in (model, plain)
    ]
    assert torch.equal(*tokens)
    names = [list(inspect.signature(each.forward).parameters) for each in (plain, model)]
    assert names[1] == [*names[0][:-1], "policy", names[0][-1]]


def test_twice_is_once(model, batch):
    expected = fused(model, batch)
    forward = model.forward
    assert fuse_policy_loss(model) is model and model.forward is forward and len(model._forward_pre_hooks) == 1
    assert_same(fused(model, batch), expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save_pretrained"])
def test_copies(model, batch, way, tmp_path):
    expected = fused(model, batch)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        model.save_pretrained(tmp_path)
        other = type(model).from_pretrained(tmp_path)
        assert "policy" not in inspect.signature(other.forward).parameters
        fuse_policy_loss(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a copy that leans on the original would show
    assert_same(fused(other, batch), expected)


def test_checkpointing_and_dropout(batch):
    model = make_model(attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()

    def seeded(way):
        torch.manual_seed(3)
        return way(model, batch)

    expected = seeded(from_logits)
    assert_same(seeded(fused), expected)
    model.eval()
    assert_same(fused(model, batch), from_logits(model, batch))
    assert (seeded(fused).loss - expected.loss).abs() > 1e-3


def test_autocast(model, batch):
    """Float32 weights, the head's product in bfloat16, as its logits would be."""
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch.ids).logits.dtype == torch.bfloat16
        assert_close_enough(model, batch)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_compiled(model, batch):
    expected = fused(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(batch.ids, attention_mask=batch.attention, policy=batch.policy)
    assert_same(differentiated(model, output), expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(model, batch, precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    prepared = Accelerator(cpu=True, mixed_precision=precision).prepare(fuse_policy_loss(model))
    output = prepared(batch.ids, attention_mask=batch.attention, policy=batch.policy)
    assert isinstance(output, ek.LossOutput)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert_bits(output.loss, model(batch.ids, attention_mask=batch.attention, policy=batch.policy).loss, "loss")


def test_forwards_wrapped_after_fusing():
    """As accelerate wraps those of a model, and of each of its modules."""
    model = make_model("Gemma2")
    batch = make_batch(model)
    expected = from_logits(model, batch)
    fuse_policy_loss(model)
    seen = []
    for module in (model, model.lm_head):
        inner = module.forward

        def wrapped(*inputs, inner=inner, **named):
            seen.append(inner)
            return inner(*inputs, **named)

        module.forward = functools.update_wrapper(wrapped, inner, assigned=(), updated=("__dict__",))
    for _ in range(2):
        assert_same(fused(model, batch), expected)
    seen.clear()
    assert_same(fused_already(model, batch), expected)
    assert len(seen) == 2


def test_a_changed_config_is_seen_by_fusing_again():
    model = make_model("Gemma2")
    batch = make_batch(model)
    fuse_policy_loss(model)
    model.config.final_logit_softcapping = 1.5
    expected = from_logits(model, batch)
    assert_same(fused(model, batch), expected)


def test_all_positions_are_kept_where_none_are_named():
    model = make_model()
    batch = make_batch(model)
    expected = from_logits(model, batch)
    assert_same(fused(model, batch, logits_to_keep=None), expected)
