"""Heads that peft has put something around."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")
pytest.importorskip("peft", reason="peft is not installed (make parity installs it)")

import peft

import egpo_kernels as ek
from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import assert_close_enough, assert_same, from_logits, fused, make_batch, make_model
from tests.support.accuracy import assert_bits


def adapted(name="Llama", targets=("q_proj", "lm_head"), **options):
    """A model with adapters that are not 0."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), **options)
    model = peft.get_peft_model(make_model(name, tie_word_embeddings=False), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    return model.eval()


def both_ways(model):
    batch = make_batch(model)
    assert_close_enough(copy.deepcopy(model), batch)
    model, batch = model.double(), batch.double()
    expected = from_logits(model, batch)
    assert_same(fused(model, batch), expected)
    return set(expected.gradients)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_adapters_of_the_head(name):
    trained = both_ways(adapted(name))
    assert {"lora_A", "lora_B"} <= {part for key in trained if "lm_head" in key for part in key.split(".")}
    assert not any("base_layer" in key for key in trained)


def test_adapters_elsewhere():
    trained = both_ways(adapted(targets=["q_proj", "v_proj"]))
    assert not any("lm_head" in key for key in trained)


def test_head_trained_whole():
    trained = both_ways(adapted(targets=["q_proj"], modules_to_save=["lm_head"]))
    assert any("lm_head.modules_to_save" in key for key in trained)


def test_more_of_lora():
    both_ways(adapted(use_rslora=True, lora_dropout=0.5))  # in eval mode dropout is none


@pytest.mark.parametrize("change", ["disabled", "merged", "merged and disabled"])
def test_adapters_that_are_not_added(change):
    model = adapted()
    batch = make_batch(model)
    if "merged" in change:
        model.merge_adapter()
    fuse_policy_loss(model)
    policy = {"tokens": batch.policy["tokens"]}

    def differences():
        wanted = ek.token_log_probs(model(batch.ids).logits, **policy).log_probs
        return (model(batch.ids, policy=policy).log_probs - wanted).abs().max()

    eps = 1e3 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        if "disabled" in change:
            with model.disable_adapter():
                assert differences() < eps
        else:
            assert differences() < eps


def test_peft_after_fusing():
    plain = make_model()
    batch = make_batch(plain)
    late = peft.get_peft_model(fuse_policy_loss(copy.deepcopy(plain)), peft.LoraConfig(target_modules=["lm_head"]))
    early = fuse_policy_loss(peft.get_peft_model(plain, peft.LoraConfig(target_modules=["lm_head"])))
    early.load_state_dict(late.state_dict())
    losses = [each(batch.ids, attention_mask=batch.attention, policy=batch.policy).loss for each in (late, early)]
    assert_bits(*losses, "loss")


def test_adapters_of_another_dtype():
    """peft keeps adapters of a bfloat16 model in float32; here they are multiplied in bfloat16."""
    model = adapted(targets=["lm_head"])
    model.base_model.model.model.bfloat16()
    model.base_model.model.lm_head.base_layer.bfloat16()
    batch = make_batch(model)
    found = fused(model, batch)
    assert {gradient.dtype for gradient in found.gradients.values()} == {torch.float32}
    assert all(gradient.abs().max() > 0 for gradient in found.gradients.values())


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "is no plain LoRA"),
        ({"lora_bias": True}, "has a bias"),
        ({"lora_dropout": 0.1}, "has dropout 0.1; it must be 0"),
    ],
)
def test_adapters_that_cannot_be_fused(options, message):
    model = adapted(**options)
    with pytest.raises(ValueError, match=message):
        fuse_policy_loss(model.train())


def test_two_active_adapters():
    model = fuse_policy_loss(adapted())
    model.add_adapter("second", peft.LoraConfig(target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"'default' is one of 2 that are active; it must be the only one"):
        model(torch.ones(1, 2, dtype=torch.long), policy={"tokens": torch.ones(1, 2, dtype=torch.long)})


def test_another_tuner():
    model = peft.get_peft_model(make_model(), peft.VeraConfig(target_modules=["lm_head"]))
    with pytest.raises(
        TypeError, match=r"the head is a peft.tuners.vera.*Linear around torch.nn.*Linear; it must be a torch.nn.Linear"
    ):
        fuse_policy_loss(model)
